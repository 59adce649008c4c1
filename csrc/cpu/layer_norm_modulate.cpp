#include "tokens.h"

namespace fdfo::cpu::FDFO_ISA {

struct Statistics {
  float mean, rstd;
};

// Adds the gated y, where there is one, and returns what is normalised; `sum` becomes its sum.
template <class T>
FDFO_INLINE const T* joined(const LayerNormModulate& a, T* x_new, int64_t sample, int64_t token, Sum& sum) {
  const T *x = a.x.row<T>(sample, token), *y = a.y.row<T>(sample, token), *gate = a.gate.row<T>(sample);
  if (a.gate.data == nullptr) {
    each(a.shape.size, [&]<class V>(int64_t i, int k) { sum.add(k, load<V>(x + i)); });
    return x;
  }
  each(a.shape.size, [&]<class V>(int64_t i, int k) {
    sum.add(k, store(x_new + i, load<V>(x + i) + load<V>(gate + i) * load<V>(y + i)));
  });
  return x_new;
}

template <class T>
FDFO_INLINE Statistics statistics(const T* x, int64_t size, float sum, float eps) {
  const float mean = sum / static_cast<float>(size);
  Sum squares;
  each(size, [&]<class V>(int64_t i, int k) {
    const V centred = load<V>(x + i) - mean;
    squares.add(k, centred * centred);
  });
  return {mean, 1 / __builtin_sqrtf(squares.total() / static_cast<float>(size) + eps)};
}

// 1 + scale of each modulation, and its shift if it is there, as floats, [samples, kModulationRows, size]: made once,
// not at every token.
template <class T>
FDFO_INLINE void widen(const TokenShape& shape, const SampleRows* scale, const SampleRows* shift, float* wide,
                       int threads) {
  const int64_t size = shape.size, tasks = kModulationRows * shape.samples;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / kModulationRows, m = task % kModulationRows / 2;
    const bool is_scale = task % 2 == 0;
    const SampleRows* rows = is_scale ? scale : shift;
    if (rows == nullptr || rows[m].data == nullptr) continue;
    const T* from = rows[m].row<T>(sample);
    const float offset = is_scale ? 1.0f : 0.0f;
    each(size, [&]<class V>(int64_t i, int) { store(wide + task * size + i, offset + load<V>(from + i)); });
  }
}

template <class T>
FDFO_INLINE void forward(const LayerNormModulate& a, float* wide, int threads) {
  const int64_t size = a.shape.size;
  widen<T>(a.shape, a.scale, a.shift, wide, threads);
  token_blocks(a.shape, 1, threads, [&](int64_t sample, int64_t, int64_t token, int64_t) {
    const int64_t row = sample * a.shape.tokens + token;
    Sum sum;
    const T* x = joined(a, static_cast<T*>(a.x_new) + row * size, sample, token, sum);
    const auto [mean, rstd] = statistics(x, size, sum.total(), a.eps);
    if (a.statistics != nullptr) {
      a.statistics[2 * row] = mean;
      a.statistics[2 * row + 1] = rstd;
    }
    for (int m = 0; m < kModulations && a.scale[m].data != nullptr; ++m) {
      const float *factor = wide + (kModulationRows * sample + 2 * m) * size, *shift = factor + size;
      T* to = static_cast<T*>(a.out[m]) + row * size;
      each(size, [&, mean = mean, rstd = rstd]<class V>(int64_t i, int) {
        store(to + i, (load<V>(x + i) - mean) * rstd * load<V>(factor + i) + load<V>(shift + i));
      });
    }
  });
}

// One token of a backward.
template <class T>
struct Row {
  const T *x, *y, *gate, *upstream[2], *upstream_x;
  const float* factor[2];  // 1 + scale
  Statistics s;
  T *dx, *dy;
  float *d_modulation, *d_gate;  // sums over tokens so far, or null
};

template <class T, bool kSecond>
FDFO_INLINE void backward_row(const Row<T>& r, int64_t size) {
  const auto normed = [&]<class V>(int64_t i, V*) { return (load<V>(r.x + i) - r.s.mean) * r.s.rstd; };
  const auto inner = [&]<class V>(int64_t i, V*) {  // the gradient of the normalised x
    V h = load<V>(r.upstream[0] + i) * load<V>(r.factor[0] + i);
    if constexpr (kSecond) h += load<V>(r.upstream[1] + i) * load<V>(r.factor[1] + i);
    return h;
  };
  Sum sum, sum_normed;
  each(size, [&]<class V>(int64_t i, int k) {
    const V h = inner(i, (V*)nullptr);
    sum.add(k, h);
    sum_normed.add(k, h * normed(i, (V*)nullptr));
  });
  const float mean = sum.total() / static_cast<float>(size), slope = sum_normed.total() / static_cast<float>(size);
  each(size, [&]<class V>(int64_t i, int) {
    V d = r.s.rstd * (inner(i, (V*)nullptr) - mean - normed(i, (V*)nullptr) * slope);
    if (r.upstream_x != nullptr) d += load<V>(r.upstream_x + i);
    store(r.dx + i, d);
    if (r.gate == nullptr) return;
    store(r.dy + i, load<V>(r.gate + i) * d);
    if (r.d_gate != nullptr) store(r.d_gate + i, load<V>(r.d_gate + i) + d * load<V>(r.y + i));
  });
  if (r.d_modulation == nullptr) return;
  for (int m = 0; m < 1 + kSecond; ++m) {
    float *d_scale = r.d_modulation + 2 * m * size, *d_shift = d_scale + size;
    each(size, [&]<class V>(int64_t i, int) {
      const V upstream = load<V>(r.upstream[m] + i);
      store(d_scale + i, load<V>(d_scale + i) + upstream * normed(i, (V*)nullptr));
      store(d_shift + i, load<V>(d_shift + i) + upstream);
    });
  }
}

template <class T>
FDFO_INLINE const T* row_or_null(const TokenRows& t, int64_t sample, int64_t token) {
  return t.data == nullptr ? nullptr : t.row<T>(sample, token);
}

template <class T>
FDFO_INLINE const T* row_or_null(const SampleRows& t, int64_t sample) {
  return t.data == nullptr ? nullptr : t.row<T>(sample);
}

template <class T, bool kSecond>
FDFO_INLINE void backward(const LayerNormModulateBackward& a, float* wide, float* partial, int threads) {
  const int64_t size = a.shape.size;
  const int kinds = a.kinds(), modulations = kinds - (a.d_gate != nullptr);
  const int64_t length = kinds == 0 ? 1 : kTokenBlock, per_sample = blocks(a.shape.tokens, length);
  widen<T>(a.shape, a.scale, nullptr, wide, threads);
  token_blocks(a.shape, length, threads, [&](int64_t sample, int64_t block, int64_t first, int64_t last) {
    const float* factor = wide + kModulationRows * sample * size;
    float* sums = partial + (sample * per_sample + block) * kinds * size;
    memset(sums, 0, kinds * size * sizeof *sums);
    for (int64_t token = first; token < last; ++token) {
      const int64_t row = sample * a.shape.tokens + token;
      const Row<T> r{
          a.normed_from.row<T>(sample, token),
          row_or_null<T>(a.y, sample, token),
          row_or_null<T>(a.gate, sample),
          {a.upstream[0].row<T>(sample, token), row_or_null<T>(a.upstream[1], sample, token)},
          row_or_null<T>(a.upstream_x, sample, token),
          {factor, factor + 2 * size},
          {a.statistics[2 * row], a.statistics[2 * row + 1]},
          static_cast<T*>(a.dx) + row * size,
          static_cast<T*>(a.dy) + row * size,
          modulations == 0 ? nullptr : sums,
          a.d_gate == nullptr ? nullptr : sums + modulations * size,
      };
      backward_row<T, kSecond>(r, size);
    }
  });
  add_partials<T>(a.shape, partial, kinds, threads, [&](int64_t kind, int64_t sample) {
    if (kind == modulations) return static_cast<T*>(a.d_gate) + sample * size;
    return static_cast<T*>(a.d_modulation) + (kind * a.shape.samples + sample) * size;
  });
}

void layer_norm_modulate_forward(const LayerNormModulate& a, float* wide, int threads) {
  with_type(a.shape.number, [&]<class T>() { forward<T>(a, wide, threads); });
}

void layer_norm_modulate_backward(const LayerNormModulateBackward& a, float* wide, float* partial, int threads) {
  with_type(a.shape.number, [&]<class T>() {
    if (a.scale[1].data == nullptr) return backward<T, false>(a, wide, partial, threads);
    backward<T, true>(a, wide, partial, threads);
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
