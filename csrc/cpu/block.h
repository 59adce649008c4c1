// Pieces that every CPU kernel is made of. Included by files that are compiled once an instruction set: nothing here
// may leave a function behind that a linker could share between them, so all is always inlined.
#pragma once

#include "kernels.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if !defined(FDFO_ISA)
#error "compile with -DFDFO_ISA=generic, avx2 or avx512"
#endif

#define FDFO_ALWAYS_INLINE inline __attribute__((always_inline))
#define FDFO_INLINE static FDFO_ALWAYS_INLINE

namespace fdfo::cpu::FDFO_ISA {

constexpr int kBlock = 256;  // elements whose noise is made together: it stays in the first-level cache
constexpr int kCounters = kBlock / 4;
constexpr int kLanes = 16;  // partial sums side by side, added in order at the end

struct Span {
  int64_t row, begin;  // elements begin..begin + count of a row
  int count;
};

FDFO_INLINE Span span(int64_t task, int64_t size, int64_t block) {
  const int64_t per_row = blocks(size, block), begin = task % per_row * block;
  return {task / per_row, begin, static_cast<int>(size - begin < block ? size - begin : block)};
}

using Float8 = float __attribute__((vector_size(32)));
using Double8 = double __attribute__((vector_size(64)));
using Low8 = uint32_t __attribute__((vector_size(32)));

FDFO_INLINE Float8 load8(const float* from) {
  Float8 values;
  memcpy(&values, from, sizeof values);
  return values;
}

template <class T>
FDFO_INLINE Float8 load8(const T* from) {
  float values[8];
  for (int l = 0; l < 8; ++l) values[l] = to_float(from[l]);
  return load8(values);
}

// Written out where a compiler would convert halves and join them.
#if defined(__AVX2__)
FDFO_INLINE Float8 load8(const BFloat16* from) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return (Float8)_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16);
}
#endif

FDFO_INLINE Double8 to_double(Float8 values) {
#if defined(__AVX512F__)
  return (Double8)_mm512_cvtps_pd((__m256)values);
#else
  return __builtin_convertvector(values, Double8);
#endif
}

#if defined(__AVX2__)
using Words8 = uint64_t __attribute__((vector_size(64)));  // a 32-bit word in the low half of each lane

// Products of the low halves of each lane. Written out, since a compiler takes the slow full product of 64-bit lanes.
FDFO_INLINE Words8 product(Words8 a, uint32_t b) {
#if defined(__AVX512F__)
  return (Words8)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#else
  __m256i half[2];
  memcpy(half, &a, sizeof half);
  for (__m256i& h : half) h = _mm256_mul_epu32(h, _mm256_set1_epi64x(b));
  memcpy(&a, half, sizeof half);
  return a;
#endif
}

// The words of kCounters consecutive counters from `first` on, as `philox` gives them.
FDFO_INLINE void fill_words(uint32_t (*__restrict words)[kCounters], uint32_t first, uint32_t stream, int64_t pair,
                            Key key) {
  for (uint32_t j = 0; j < kCounters; j += 8) {
    Words8 c0 = Words8{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint64_t>(first + j), c1 = Words8{} + stream;
    Words8 c2 = Words8{} + static_cast<uint32_t>(pair), c3 = Words8{} + static_cast<uint64_t>(pair >> 32);
    Key k = key;
    for (int round = 0; round < 10; ++round) {
      const Words8 p0 = product(c0, 0xD2511F53u), p1 = product(c2, 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ k.low;
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ k.high;
      c3 = p0;
      k = {k.low + 0x9E3779B9u, k.high + 0xBB67AE85u};
    }
    const Words8 out[4] = {c0, c1, c2, c3};
    for (int w = 0; w < 4; ++w) {
      const auto low = __builtin_convertvector(out[w], Low8);
      memcpy(words[w] + j, &low, sizeof low);
    }
  }
}
#else
FDFO_INLINE void fill_words(uint32_t (*__restrict words)[kCounters], uint32_t first, uint32_t stream, int64_t pair,
                            Key key) {
  for (uint32_t j = 0; j < kCounters; ++j) {
    const Words w =
        philox({first + j, stream, static_cast<uint32_t>(pair), static_cast<uint32_t>(pair >> 32)}, key);
    words[0][j] = w.w0;
    words[1][j] = w.w1;
    words[2][j] = w.w2;
    words[3][j] = w.w3;
  }
}
#endif

// kBlock normals of one latent from element `begin` (a multiple of 4) on.
FDFO_INLINE void fill_normals(float* __restrict out, int64_t begin, uint32_t stream, int64_t pair, Key key) {
  uint32_t words[4][kCounters];
  fill_words(words, static_cast<uint32_t>(begin / 4), stream, pair, key);
  float part[4][kCounters];
  for (int j = 0; j < kCounters; ++j) box_muller(words[0][j], words[1][j], part[0][j], part[1][j]);
  for (int j = 0; j < kCounters; ++j) box_muller(words[2][j], words[3][j], part[2][j], part[3][j]);
  for (int j = 0; j < kCounters; ++j) {
    for (int i = 0; i < 4; ++i) out[4 * j + i] = part[i][j];
  }
}

// Calls `run<T>()` with the C++ type that `number` names.
template <class Run>
FDFO_INLINE void with_type(Number number, const Run& run) {
  switch (number) {
    case Number::kFloat32:
      return run.template operator()<float>();
    case Number::kBFloat16:
      return run.template operator()<BFloat16>();
    case Number::kFloat16:
      return run.template operator()<Float16>();
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
