#include "tokens.h"

namespace fdfo::cpu::FDFO_ISA {

template <class T>
FDFO_INLINE void forward(const GatedResidual& a, int threads) {
  token_blocks(a.shape, 1, threads, [&](int64_t sample, int64_t, int64_t token, int64_t) {
    const T *x = a.x.row<T>(sample, token), *y = a.y.row<T>(sample, token), *gate = a.gate.row<T>(sample);
    T* to = static_cast<T*>(a.out) + (sample * a.shape.tokens + token) * a.shape.size;
    each(a.shape.size, [&]<class V>(int64_t i, int) {
      store(to + i, load<V>(x + i) + load<V>(gate + i) * load<V>(y + i));
    });
  });
}

template <class T>
FDFO_INLINE void backward(const GatedResidualBackward& a, float* partial, int threads) {
  T *dy = static_cast<T*>(a.dy), *d_gate = static_cast<T*>(a.d_gate);
  const int64_t size = a.shape.size, per_sample = blocks(a.shape.tokens, kTokenBlock);
  token_blocks(a.shape, kTokenBlock, threads, [&](int64_t sample, int64_t block, int64_t first, int64_t last) {
    float* sum = partial + (sample * per_sample + block) * size;
    if (d_gate != nullptr) memset(sum, 0, size * sizeof *sum);
    for (int64_t token = first; token < last; ++token) {
      const T *upstream = a.upstream.row<T>(sample, token), *gate = a.gate.row<T>(sample);
      if (dy != nullptr) {
        T* to = dy + (sample * a.shape.tokens + token) * size;
        each(size, [&]<class V>(int64_t i, int) { store(to + i, load<V>(gate + i) * load<V>(upstream + i)); });
      }
      if (d_gate != nullptr) {
        const T* y = a.y.row<T>(sample, token);
        each(size, [&]<class V>(int64_t i, int) {
          store(sum + i, load<V>(sum + i) + load<V>(upstream + i) * load<V>(y + i));
        });
      }
    }
  });
  if (d_gate == nullptr) return;
  add_partials<T>(a.shape, partial, 1, threads, [&](int64_t, int64_t sample) { return d_gate + sample * size; });
}

void gated_residual_forward(const GatedResidual& a, int threads) {
  with_type(a.shape.number, [&]<class T>() { forward<T>(a, threads); });
}

void gated_residual_backward(const GatedResidualBackward& a, float* partial, int threads) {
  with_type(a.shape.number, [&]<class T>() { backward<T>(a, partial, threads); });
}

}  // namespace fdfo::cpu::FDFO_ISA
