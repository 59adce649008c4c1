#include <type_traits>

#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

using Lanes = float __attribute__((vector_size(64)));
using LaneBits = uint32_t __attribute__((vector_size(64)));

constexpr int kChunk = 32;  // elements: two vectors
constexpr int kMaxChunks = kMaxHeadSize / kChunk;

// 32 elements with the two of a rotary pair in one lane.
struct Chunk {
  Lanes even, odd;
};

FDFO_INLINE Chunk load(const float* from) {
  Lanes a, b;
  memcpy(&a, from, sizeof a);
  memcpy(&b, from + 16, sizeof b);
  return {__builtin_shuffle(a, b, LaneBits{0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}),
          __builtin_shuffle(a, b, LaneBits{1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31})};
}

FDFO_INLINE Chunk load(const BFloat16* from) {
  LaneBits pairs;
  memcpy(&pairs, from, sizeof pairs);
  return {(Lanes)(pairs << 16), (Lanes)(pairs & 0xFFFF0000u)};
}

FDFO_INLINE Chunk load(const Float16* from) {
  float wide[kChunk];
  for (int i = 0; i < kChunk; ++i) wide[i] = to_float(from[i]);
  return load(wide);
}

FDFO_INLINE void store(float* to, const Chunk& c) {
  const Lanes low =
      __builtin_shuffle(c.even, c.odd, LaneBits{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  const Lanes high =
      __builtin_shuffle(c.even, c.odd, LaneBits{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  memcpy(to, &low, sizeof low);
  memcpy(to + 16, &high, sizeof high);
}

// To the nearest bfloat16, in the upper half; what is in the lower half doesn't count.
FDFO_INLINE LaneBits bfloat16_bits(Lanes x) {
  const LaneBits bits = (LaneBits)x, kept = bits + 0x7FFFu + (bits >> 16 & 1u);
  return x == x ? kept : LaneBits{} + 0x7FC00000u;
}

FDFO_INLINE void store(BFloat16* to, const Chunk& c) {
  const LaneBits pairs = bfloat16_bits(c.even) >> 16 | (bfloat16_bits(c.odd) & 0xFFFF0000u);
  memcpy(to, &pairs, sizeof pairs);
}

FDFO_INLINE void store(Float16* to, const Chunk& c) {
  float wide[kChunk];
  store(wide, c);
  for (int i = 0; i < kChunk; ++i) to[i] = from_float<Float16>(wide[i]);
}

template <class T>
FDFO_INLINE Chunk load(const T* from, int count) {
  if (count >= kChunk) return load(from);
  T padded[kChunk] = {};
  for (int i = 0; i < count; ++i) padded[i] = from[i];
  return load(padded);
}

template <class T>
FDFO_INLINE void store(T* to, const Chunk& c, int count) {
  if (count >= kChunk) return store(to, c);
  T padded[kChunk];
  store(padded, c);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

template <class T>
FDFO_INLINE Chunk rounded(const Chunk& c) {
  if constexpr (std::is_same_v<T, float>) return c;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {(Lanes)(bfloat16_bits(c.even) & 0xFFFF0000u), (Lanes)(bfloat16_bits(c.odd) & 0xFFFF0000u)};
  }
  T narrow[kChunk];
  store(narrow, c);
  return load(narrow);
}

FDFO_INLINE Chunk operator*(const Chunk& a, const Chunk& b) { return {a.even * b.even, a.odd * b.odd}; }
FDFO_INLINE Chunk operator*(const Chunk& a, float b) { return {a.even * b, a.odd * b}; }
FDFO_INLINE Chunk operator-(const Chunk& a, const Chunk& b) { return {a.even - b.even, a.odd - b.odd}; }

FDFO_INLINE Lanes products(const Chunk& a, const Chunk& b) { return a.even * b.even + a.odd * b.odd; }

// By halves: the same order whatever the width of the registers.
FDFO_INLINE float total(const Lanes& lanes) {
  float __attribute__((vector_size(32))) a[2];
  memcpy(a, &lanes, sizeof a);
  a[0] += a[1];
  float __attribute__((vector_size(16))) b[2];
  memcpy(b, a, sizeof b);
  b[0] += b[1];
  return (b[0][0] + b[0][2]) + (b[0][1] + b[0][3]);
}

// What the heads of one token have in common.
struct Token {
  int size;
  float inverse_size, eps;
  bool normed, round, rotary;  // round: to T before and after the product with the weight
  Chunk weight[kMaxChunks], cos[kMaxChunks], sin[kMaxChunks];
};

FDFO_INLINE float inverse_root(const Token& t, const Lanes& squares) {
  return 1.0f / sqrtf(total(squares) * t.inverse_size + t.eps);
}

// kSize is the head's size where it is known to the compiler, else 0.
template <int kSize>
FDFO_INLINE int size_of(const Token& t) {
  return kSize ? kSize : t.size;
}

template <class T, int kSize>
FDFO_INLINE void forward_head(const Token& t, const T* __restrict from, T* __restrict to) {
  constexpr int kChunks = kSize ? kSize / kChunk : kMaxChunks;
  const int size = size_of<kSize>(t), chunks = static_cast<int>(blocks(size, kChunk));
  Chunk x[kChunks];
  Lanes squares = {};
  for (int c = 0; c < chunks; ++c) {
    x[c] = load(from + c * kChunk, size - c * kChunk);
    squares += products(x[c], x[c]);
  }
  const float r = inverse_root(t, squares);
  for (int c = 0; c < chunks; ++c) {
    Chunk y = x[c];
    if (t.normed) {
      y = y * r;
      if (t.round) y = rounded<T>(y);
      y = y * t.weight[c];
    }
    if (t.rotary) {
      if (t.round) y = rounded<T>(y);
      const Chunk a = y * t.cos[c], b = {y.odd * t.sin[c].even, y.even * t.sin[c].odd};
      y = {a.even - b.even, a.odd + b.odd};
    }
    store(to + c * kChunk, y, size - c * kChunk);
  }
}

// dx = r (d - n mean(d n)) with n = x r and d = weight * gradient of the product; `sums` gains what the weight's has.
template <class T, int kSize>
FDFO_INLINE void backward_head(const Token& t, const T* __restrict from, const T* __restrict grad, T* __restrict to,
                               Chunk* __restrict sums) {
  constexpr int kChunks = kSize ? kSize / kChunk : kMaxChunks;
  const int size = size_of<kSize>(t), chunks = static_cast<int>(blocks(size, kChunk));
  Chunk n[kChunks], d[kChunks];
  Lanes squares = {}, dots = {};
  for (int c = 0; c < chunks; ++c) {
    d[c] = load(grad + c * kChunk, size - c * kChunk);
    if (t.rotary) {
      const Chunk a = d[c] * t.cos[c], b = d[c] * t.sin[c];
      d[c] = {a.even + b.odd, a.odd - b.even};
    }
    if (!t.normed) store(to + c * kChunk, d[c], size - c * kChunk);
  }
  if (!t.normed) return;
  for (int c = 0; c < chunks; ++c) {
    n[c] = load(from + c * kChunk, size - c * kChunk);
    squares += products(n[c], n[c]);
  }
  const float r = inverse_root(t, squares);
  for (int c = 0; c < chunks; ++c) {
    n[c] = n[c] * r;
    if (sums != nullptr) {
      const Chunk by = t.round ? rounded<T>(n[c]) : n[c];
      sums[c] = {sums[c].even + d[c].even * by.even, sums[c].odd + d[c].odd * by.odd};
    }
    d[c] = d[c] * t.weight[c];
    dots += products(d[c], n[c]);
  }
  const float mean = total(dots) * t.inverse_size;
  for (int c = 0; c < chunks; ++c) store(to + c * kChunk, (d[c] - n[c] * mean) * r, size - c * kChunk);
}

template <class T>
FDFO_INLINE void load_row(Chunk* to, const T* from, int size) {
  for (int c = 0; c < blocks(size, kChunk); ++c) to[c] = load(from + c * kChunk, size - c * kChunk);
}

template <class T>
FDFO_INLINE Token token_of(const QkRmsNorm& a, const HeadRows& rows) {
  Token t;
  t.size = static_cast<int>(a.size);
  t.inverse_size = 1.0f / static_cast<float>(a.size);
  t.eps = a.eps;
  t.normed = rows.weight != nullptr;
  t.round = a.weight_number == a.number;
  t.rotary = rows.rotary;
  if (t.normed && t.round) load_row(t.weight, static_cast<const T*>(rows.weight), t.size);
  if (t.normed && !t.round) load_row(t.weight, static_cast<const float*>(rows.weight), t.size);
  return t;
}

// Calls `run(from, packed, index, token)` for each token of a task, `index` counting those of the stream over batches.
template <class T, class Run>
FDFO_INLINE void each_token(const QkRmsNorm& a, const HeadRows& rows, int64_t task, const Run& run) {
  Token t = token_of<T>(a, rows);
  const int64_t begin = task * kTokenBlock, all = a.batch * rows.tokens;
  for (int64_t index = begin; index < (begin + kTokenBlock < all ? begin + kTokenBlock : all); ++index) {
    const int64_t batch = index / rows.tokens, token = index % rows.tokens;
    if (t.rotary) {
      load_row(t.cos, a.cos + (rows.first + token) * a.size, t.size);
      load_row(t.sin, a.sin + (rows.first + token) * a.size, t.size);
    }
    run(static_cast<const T*>(rows.x) + batch * rows.x_batch + token * rows.x_token,
        static_cast<T*>(rows.packed) + batch * rows.packed_batch + token * rows.packed_token, index, t);
  }
}

template <class T, int kSize>
FDFO_INLINE void forward_task(const QkRmsNorm& a, const HeadRows& rows, int64_t task) {
  each_token<T>(a, rows, task, [&](const T* from, T* to, int64_t, const Token& t) {
    if (!t.normed && !t.rotary) {
      memcpy(to, from, sizeof(T) * static_cast<size_t>(a.heads * a.size));
      return;
    }
    for (int64_t head = 0; head < a.heads; ++head) {
      forward_head<T, kSize>(t, from + head * a.size, to + head * rows.packed_head);
    }
  });
}

// Sums over the heads of a token in float, over tokens in double.
FDFO_INLINE void add_in_double(double* __restrict to, const Chunk* sums, int size) {
  for (int c = 0; c < blocks(size, kChunk); ++c) {
    float wide[kChunk];
    store(wide, sums[c]);
    for (int i = 0; i < kChunk; ++i) to[c * kChunk + i] += static_cast<double>(wide[i]);
  }
}

template <class T, int kSize>
FDFO_INLINE void backward_task(const QkRmsNorm& a, const HeadRows& rows, int64_t task, double* partial) {
  double weight_grad[kMaxHeadSize] = {};
  each_token<T>(a, rows, task, [&](const T* from, const T* grad, int64_t index, const Token& t) {
    T* to = static_cast<T*>(rows.grad) + index * a.heads * a.size;
    Chunk sums[kMaxChunks] = {};
    for (int64_t head = 0; head < a.heads; ++head) {
      const int64_t at = head * a.size;
      const T* upstream = grad + head * rows.packed_head;
      if (!t.normed && !t.rotary) {
        memcpy(to + at, upstream, sizeof(T) * static_cast<size_t>(a.size));
      } else {
        backward_head<T, kSize>(t, from + at, upstream, to + at, partial != nullptr ? sums : nullptr);
      }
    }
    if (partial != nullptr) add_in_double(weight_grad, sums, t.size);
  });
  if (partial != nullptr) memcpy(partial + task * a.size, weight_grad, sizeof(double) * static_cast<size_t>(a.size));
}

// Calls `run<T, kSize>()` with the activations' type and the head's size, where there is code for it.
template <class Run>
FDFO_INLINE void with_type_and_size(const QkRmsNorm& a, const Run& run) {
  with_type(a.number, [&]<class T>() {
    switch (a.size) {
      case 32:
        return run.template operator()<T, 32>();
      case 64:
        return run.template operator()<T, 64>();
      case 128:
        return run.template operator()<T, 128>();
      default:
        return run.template operator()<T, 0>();
    }
  });
}

void qk_rms_norm_forward(const QkRmsNorm& a, const HeadRows* rows, int count, int threads) {
  with_type_and_size(a, [&]<class T, int kSize>() {
#pragma omp parallel num_threads(threads)
    for (int i = 0; i < count; ++i) {
#pragma omp for schedule(static) nowait
      for (int64_t task = 0; task < blocks(a.batch * rows[i].tokens, kTokenBlock); ++task) {
        forward_task<T, kSize>(a, rows[i], task);
      }
    }
  });
}

template <class T>
FDFO_INLINE void add_partials(void* to, const double* partial, int64_t count, int64_t size) {
  for (int64_t e = 0; e < size; ++e) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += partial[i * size + e];
    static_cast<T*>(to)[e] = from_float<T>(static_cast<float>(sum));
  }
}

void qk_rms_norm_backward(const QkRmsNorm& a, const HeadRows* rows, int count, double* partial, int threads) {
  with_type_and_size(a, [&]<class T, int kSize>() {
    for (int i = 0; i < count; ++i) {
      const int64_t tasks = blocks(a.batch * rows[i].tokens, kTokenBlock);
      double* sums = rows[i].weight_grad != nullptr ? partial : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t task = 0; task < tasks; ++task) backward_task<T, kSize>(a, rows[i], task, sums);
      if (sums == nullptr) continue;
      if (a.weight_number == a.number) {
        add_partials<T>(rows[i].weight_grad, sums, tasks, a.size);
      } else {
        add_partials<float>(rows[i].weight_grad, sums, tasks, a.size);
      }
    }
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
