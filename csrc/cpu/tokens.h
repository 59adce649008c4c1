// Loops over the elements of a token, for the ops of a transformer block. Like block.h, all is always inlined.
#pragma once

#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

constexpr int kSums = 4;  // vectors summed side by side, so that an addition need not wait for the one before

using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Bits = uint32_t __attribute__((vector_size(4 * kLanes)));
using HalfBits = uint16_t __attribute__((vector_size(2 * kLanes)));

// `load<V>(from)` reads one float or kLanes of them; `store(to, v)` rounds to the type of `to`.
template <class V>
struct Access {
  template <class T>
  static FDFO_ALWAYS_INLINE V load(const T* from) {
    return to_float(*from);
  }
  template <class T>
  static FDFO_ALWAYS_INLINE void store(T* to, V value) {
    *to = from_float<T>(value);
  }
};

template <>
struct Access<Lanes> {
  static FDFO_ALWAYS_INLINE Lanes load(const float* from) {
    Lanes values;
    memcpy(&values, from, sizeof values);
    return values;
  }
  static FDFO_ALWAYS_INLINE Lanes load(const BFloat16* from) {
    HalfBits bits;
    memcpy(&bits, from, sizeof bits);
    return (Lanes)(__builtin_convertvector(bits, Bits) << 16);
  }
  static FDFO_ALWAYS_INLINE Lanes load(const Float16* from) {
#if defined(__AVX512F__)
    __m256i bits;
    memcpy(&bits, from, sizeof bits);
    return (Lanes)_mm512_cvtph_ps(bits);
#else
    float values[kLanes];
    for (int l = 0; l < kLanes; ++l) values[l] = to_float(from[l]);
    return load(values);
#endif
  }
  static FDFO_ALWAYS_INLINE void store(float* to, Lanes value) { memcpy(to, &value, sizeof value); }
  static FDFO_ALWAYS_INLINE void store(BFloat16* to, Lanes value) {
    const Bits bits = (Bits)value, rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const Bits kept = (bits & 0x7FFFFFFFu) > 0x7F800000u ? Bits{} + 0x7FC0u : rounded;
    const HalfBits half = __builtin_convertvector(kept, HalfBits);
    memcpy(to, &half, sizeof half);
  }
  static FDFO_ALWAYS_INLINE void store(Float16* to, Lanes value) {
#if defined(__AVX512F__)
    const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    memcpy(to, &bits, sizeof bits);
#else
    for (int l = 0; l < kLanes; ++l) to[l] = from_float<Float16>(value[l]);
#endif
  }
};

template <class V, class T>
FDFO_INLINE V load(const T* from) {
  return Access<V>::load(from);
}

template <class T, class V>
FDFO_INLINE void store(T* to, V value) {
  Access<V>::store(to, value);
}

// Calls `body<V>(i, k)` for the elements of a row: V is Lanes, or float for the rest; k is the sum that they go to.
template <class Body>
FDFO_INLINE void each(int64_t size, const Body& body) {
  int64_t i = 0;
  for (; i + kSums * kLanes <= size; i += kSums * kLanes) {
    body.template operator()<Lanes>(i, 0);
    body.template operator()<Lanes>(i + kLanes, 1);
    body.template operator()<Lanes>(i + 2 * kLanes, 2);
    body.template operator()<Lanes>(i + 3 * kLanes, 3);
  }
  for (; i + kLanes <= size; i += kLanes) body.template operator()<Lanes>(i, 0);
  for (; i < size; ++i) body.template operator()<float>(i, 0);
}

// A sum over a row in a fixed order.
struct Sum {
  Lanes lanes[kSums] = {};
  float rest = 0;

  FDFO_ALWAYS_INLINE void add(int k, Lanes value) { lanes[k] += value; }
  FDFO_ALWAYS_INLINE void add(int, float value) { rest += value; }
  FDFO_ALWAYS_INLINE float total() const {
    const Lanes sum = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    float parts[kLanes];
    memcpy(parts, &sum, sizeof parts);
    for (int width = kLanes / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) parts[l] += parts[l + width];
    }
    return parts[0] + rest;
  }
};

// Calls `body(sample, block, first, last)` for blocks of `length` tokens, on `threads` threads.
template <class Body>
FDFO_INLINE void token_blocks(const TokenShape& shape, int64_t length, int threads, const Body& body) {
  const int64_t per_sample = blocks(shape.tokens, length), tasks = shape.samples * per_sample;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t block = task % per_sample, first = block * length, last = first + length;
    body(task / per_sample, block, first, last < shape.tokens ? last : shape.tokens);
  }
}

// Adds partial sums, [samples, blocks, kinds, size], in order: element `kind` of a block goes to out(kind, sample).
template <class T, class Out>
FDFO_INLINE void add_partials(const TokenShape& shape, const float* partial, int kinds, int threads, const Out& out) {
  const int64_t per_sample = blocks(shape.tokens, kTokenBlock), tasks = shape.samples * kinds;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / kinds, kind = task % kinds;
    T* to = out(kind, sample);
    each(shape.size, [&]<class V>(int64_t i, int) {
      V sum{};
      for (int64_t block = 0; block < per_sample; ++block) {
        sum += load<V>(partial + ((sample * per_sample + block) * kinds + kind) * shape.size + i);
      }
      store(to + i, sum);
    });
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
