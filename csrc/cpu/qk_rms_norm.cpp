#include <type_traits>

#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

using Lanes = float __attribute__((vector_size(64)));
using LaneBits = uint32_t __attribute__((vector_size(64)));

constexpr int kChunk = 32;  // elements: two vectors
constexpr int kMaxChunks = kMaxHeadSize / kChunk;
constexpr int kHeads = 8;  // taken together

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

template <bool = true>
FDFO_INLINE void store(float* to, const Chunk& c) {
  const Lanes low =
      __builtin_shuffle(c.even, c.odd, LaneBits{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
  const Lanes high =
      __builtin_shuffle(c.even, c.odd, LaneBits{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
  memcpy(to, &low, sizeof low);
  memcpy(to + 16, &high, sizeof high);
}

// To the nearest bfloat16, in the upper half; what is in the lower half doesn't count. A NaN made of bfloat16 alone has
// zeros there and stays one; another may have to be kept from wrapping around to a number.
template <bool kAnyNan>
FDFO_INLINE LaneBits bfloat16_bits(Lanes x) {
  const LaneBits bits = (LaneBits)x, kept = bits + 0x7FFFu + (bits >> 16 & 1u);
  if constexpr (!kAnyNan) return kept;
  return x == x ? kept : LaneBits{} + 0x7FC00000u;
}

template <bool kAnyNan>
FDFO_INLINE void store(BFloat16* to, const Chunk& c) {
  const LaneBits even = bfloat16_bits<kAnyNan>(c.even), odd = bfloat16_bits<kAnyNan>(c.odd);
  const LaneBits pairs = even >> 16 | (odd & 0xFFFF0000u);
  memcpy(to, &pairs, sizeof pairs);
}

template <bool>
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

template <bool kAnyNan, class T>
FDFO_INLINE void store(T* to, const Chunk& c, int count) {
  if (count >= kChunk) return store<kAnyNan>(to, c);
  T padded[kChunk];
  store<kAnyNan>(padded, c);
  for (int i = 0; i < count; ++i) to[i] = padded[i];
}

template <bool kAnyNan, class T>
FDFO_INLINE Chunk rounded(const Chunk& c) {
  if constexpr (std::is_same_v<T, float>) return c;
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {(Lanes)(bfloat16_bits<kAnyNan>(c.even) & 0xFFFF0000u), (Lanes)(bfloat16_bits<kAnyNan>(c.odd) & 0xFFFF0000u)};
  }
  T narrow[kChunk];
  store<kAnyNan>(narrow, c);
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

// What the compiler knows of a token; kSize 0 means nothing.
template <int kSize, bool kRotary>
struct Known {
  static constexpr int kChunks = kSize ? kSize / kChunk : kMaxChunks;
  static constexpr bool kAnyNan = !kSize || kRotary;

  const Token& token;

  FDFO_HD bool normed() const { return kSize || token.normed; }
  FDFO_HD bool round() const { return kSize || token.round; }
  FDFO_HD bool rotary() const { return kSize ? kRotary : token.rotary; }
  FDFO_HD int size() const { return kSize ? kSize : token.size; }
  FDFO_HD int chunks() const { return kSize ? kChunks : (token.size + kChunk - 1) / kChunk; }
  FDFO_HD int count(int chunk) const { return kSize ? kChunk : token.size - chunk * kChunk; }
};

// From each head's sum of squares to its 1 / rms, several heads at a time.
FDFO_INLINE void inverse_roots(const Token& t, float* __restrict squares) {
  for (int h = 0; h < kHeads; ++h) squares[h] = 1.0f / sqrtf(squares[h] * t.inverse_size + t.eps);
}

template <class Known, class T>
FDFO_INLINE void forward_head(const Known& known, const T* __restrict from, T* __restrict to, float inverse_root) {
  const Token& t = known.token;
  for (int c = 0; c < known.chunks(); ++c) {
    Chunk y = load(from + c * kChunk, known.count(c));
    if (known.normed()) {
      y = y * inverse_root;
      if (known.round()) y = rounded<Known::kAnyNan, T>(y);
      y = y * t.weight[c];
    }
    if (known.rotary()) {
      if (known.round()) y = rounded<Known::kAnyNan, T>(y);
      const Chunk a = y * t.cos[c], b = {y.odd * t.sin[c].even, y.even * t.sin[c].odd};
      y = {a.even - b.even, a.odd + b.odd};
    }
    store<Known::kAnyNan>(to + c * kChunk, y, known.count(c));
  }
}

// The heads of one token in two passes: the roots of one are not waited for while another is written.
template <class Known, class T>
FDFO_INLINE void forward_heads(const Known& known, const T* from, T* to, int64_t to_head, int heads) {
  float roots[kHeads] = {};
  for (int h = 0; known.normed() && h < heads; ++h) {
    Lanes squares = {};
    for (int c = 0; c < known.chunks(); ++c) {
      const Chunk x = load(from + h * known.size() + c * kChunk, known.count(c));
      squares += products(x, x);
    }
    roots[h] = total(squares);
  }
  inverse_roots(known.token, roots);
  for (int h = 0; h < heads; ++h) forward_head(known, from + h * known.size(), to + h * to_head, roots[h]);
}

// The gradient of what the rotary embedding was given.
template <class Known, class T>
FDFO_INLINE Chunk before_rotary(const Known& known, const T* grad, int c) {
  const Chunk g = load(grad + c * kChunk, known.count(c));
  if (!known.rotary()) return g;
  const Chunk a = g * known.token.cos[c], b = g * known.token.sin[c];
  return {a.even + b.odd, a.odd - b.even};
}

// With n = x r and d the gradient of n: dx = r (d - n mean(d n)). `sums` gains the gradient of the weight.
template <class Known, class T>
FDFO_INLINE void backward_heads(const Known& known, const T* __restrict from, const T* __restrict grad,
                                int64_t grad_head, T* __restrict to, int heads, Chunk* __restrict sums) {
  const Token& t = known.token;
  Chunk d[kHeads][Known::kChunks];
  float roots[kHeads] = {}, dots[kHeads];
  for (int h = 0; h < heads; ++h) {
    Lanes squares = {}, products_d = {};
    for (int c = 0; c < known.chunks(); ++c) {
      const Chunk x = load(from + h * known.size() + c * kChunk, known.count(c));
      const Chunk g = before_rotary(known, grad + h * grad_head, c);
      if (sums != nullptr) d[h][c] = g;
      const Chunk by = g * t.weight[c];
      if (sums == nullptr) d[h][c] = by;
      squares += products(x, x);
      products_d += products(by, x);
    }
    roots[h] = total(squares);
    dots[h] = total(products_d);
  }
  inverse_roots(t, roots);
  for (int h = 0; h < heads; ++h) {
    const float r = roots[h], mean = dots[h] * r * t.inverse_size;
    for (int c = 0; c < known.chunks(); ++c) {
      const Chunk n = load(from + h * known.size() + c * kChunk, known.count(c)) * r;
      Chunk by = d[h][c];
      if (sums != nullptr) {
        sums[c] = {sums[c].even + by.even * n.even, sums[c].odd + by.odd * n.odd};
        by = by * t.weight[c];
      }
      store<Known::kAnyNan>(to + h * known.size() + c * kChunk, (by - n * mean) * r, known.count(c));
    }
  }
}

template <int kSize, class Run>
FDFO_INLINE void with_known(const Token& t, const Run& run) {
  if constexpr (kSize != 0) {
    if (t.rotary) return run(Known<kSize, true>{t});
  }
  run(Known<kSize, false>{t});
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

template <class T, class Void>
FDFO_INLINE T* packed_token(const PackedRows<Void>& packed, int64_t batch, int64_t token) {
  return static_cast<T*>(packed.data) + batch * packed.batch_stride + token * packed.token_stride;
}

// Calls `run(from, batch, token, t)` for each token of a task: of a block of tokens, counted over batches.
template <class T, class Run>
FDFO_INLINE void each_token(const QkRmsNorm& a, const HeadRows& rows, int64_t task, const Run& run) {
  Token t = token_of<T>(a, rows);
  const int64_t begin = task * kHeadTokenBlock, all = a.batch * rows.tokens;
  for (int64_t index = begin; index < (begin + kHeadTokenBlock < all ? begin + kHeadTokenBlock : all); ++index) {
    const int64_t batch = index / rows.tokens, token = index % rows.tokens;
    if (t.rotary) {
      load_row(t.cos, a.cos + (rows.first + token) * a.size, t.size);
      load_row(t.sin, a.sin + (rows.first + token) * a.size, t.size);
    }
    run(static_cast<const T*>(rows.x) + batch * rows.x_batch + token * rows.x_token, batch, token, t);
  }
}

template <class T, int kSize>
FDFO_INLINE void forward_task(const QkRmsNorm& a, const HeadRowsForward& r, int64_t task) {
  each_token<T>(a, r.rows, task, [&](const T* from, int64_t batch, int64_t token, const Token& t) {
    T* to = packed_token<T>(r.out, batch, token);
    if (!t.normed && !t.rotary) {
      memcpy(to, from, sizeof(T) * static_cast<size_t>(a.heads * a.size));
      return;
    }
    with_known<kSize>(t, [&](const auto& known) {
      for (int64_t head = 0; head < a.heads; head += kHeads) {
        const int heads = static_cast<int>(a.heads - head < kHeads ? a.heads - head : kHeads);
        forward_heads(known, from + head * a.size, to + head * r.out.head_stride, r.out.head_stride, heads);
      }
    });
  });
}

// Where there is no norm: the gradients of one token's heads, turned back.
template <class T>
FDFO_INLINE void backward_rotary(const QkRmsNorm& a, const Token& t, const T* grad, int64_t head_stride, T* to) {
  const Known<0, false> known{t};
  for (int64_t head = 0; head < a.heads; ++head, to += a.size, grad += head_stride) {
    if (!t.rotary) memcpy(to, grad, sizeof(T) * static_cast<size_t>(a.size));
    for (int c = 0; t.rotary && c < known.chunks(); ++c) {
      store<true>(to + c * kChunk, before_rotary(known, grad, c), known.count(c));
    }
  }
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
FDFO_INLINE void backward_task(const QkRmsNorm& a, const HeadRowsBackward& r, int64_t task, double* partial) {
  double weight_grad[kMaxHeadSize] = {};
  const int64_t head_stride = r.upstream.head_stride;
  each_token<T>(a, r.rows, task, [&](const T* from, int64_t batch, int64_t token, const Token& t) {
    const T* grad = packed_token<const T>(r.upstream, batch, token);
    T* to = static_cast<T*>(r.dx) + (batch * r.rows.tokens + token) * a.heads * a.size;
    if (!t.normed) return backward_rotary(a, t, grad, head_stride, to);
    Chunk sums[kMaxChunks] = {};
    with_known<kSize>(t, [&](const auto& known) {
      for (int64_t head = 0; head < a.heads; head += kHeads) {
        const int heads = static_cast<int>(a.heads - head < kHeads ? a.heads - head : kHeads);
        backward_heads(known, from + head * a.size, grad + head * head_stride, head_stride,
                       to + head * a.size, heads, partial != nullptr ? sums : nullptr);
      }
    });
    if (partial != nullptr) add_in_double(weight_grad, sums, t.size);
  });
  if (partial != nullptr) memcpy(partial + task * a.size, weight_grad, sizeof(double) * static_cast<size_t>(a.size));
}

// Calls `run<T, kSize>()` with the activations' type and, where there is code for it, the head's size: for the sizes and
// the weights that models have.
template <class Run>
FDFO_INLINE void with_type_and_size(const QkRmsNorm& a, const HeadRows& rows, const Run& run) {
  const bool is_usual = rows.weight != nullptr && a.weight_number == a.number;
  with_type(a.number, [&]<class T>() {
    if constexpr (!std::is_same_v<T, Float16>) {
      if (is_usual && a.size == 32) return run.template operator()<T, 32>();
      if (is_usual && a.size == 64) return run.template operator()<T, 64>();
      if (is_usual && a.size == 128) return run.template operator()<T, 128>();
    }
    run.template operator()<T, 0>();
  });
}

void qk_rms_norm_forward(const QkRmsNorm& a, const HeadRowsForward* rows, int count, int threads) {
  for (int i = 0; i < count; ++i) {
    with_type_and_size(a, rows[i].rows, [&]<class T, int kSize>() {
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t task = 0; task < blocks(a.batch * rows[i].rows.tokens, kHeadTokenBlock); ++task) {
        forward_task<T, kSize>(a, rows[i], task);
      }
    });
  }
}

template <class T>
FDFO_INLINE void add_partials(void* to, const double* partial, int64_t count, int64_t size) {
  for (int64_t e = 0; e < size; ++e) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += partial[i * size + e];
    static_cast<T*>(to)[e] = from_float<T>(static_cast<float>(sum));
  }
}

void qk_rms_norm_backward(const QkRmsNorm& a, const HeadRowsBackward* rows, int count, double* partial, int threads) {
  for (int i = 0; i < count; ++i) {
    with_type_and_size(a, rows[i].rows, [&]<class T, int kSize>() {
      const int64_t tasks = blocks(a.batch * rows[i].rows.tokens, kHeadTokenBlock);
      double* sums = rows[i].weight_grad != nullptr ? partial : nullptr;
#pragma omp parallel for schedule(static) num_threads(threads)
      for (int64_t task = 0; task < tasks; ++task) backward_task<T, kSize>(a, rows[i], task, sums);
      if (sums == nullptr) return;
      if (a.weight_number == a.number) {
        add_partials<T>(rows[i].weight_grad, sums, tasks, a.size);
      } else {
        add_partials<float>(rows[i].weight_grad, sums, tasks, a.size);
      }
    });
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
