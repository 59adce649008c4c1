// Vectors of any of the model's number types, and sums of them. Like block.h, all is always inlined.
#pragma once

#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

constexpr int kSums = 4;  // vectors summed side by side, so that an addition need not wait for the one before

// Native vectors: what the compiler would make of wider ones goes through memory.
template <int kCount>
struct Vector {
  using Floats __attribute__((vector_size(4 * kCount))) = float;
  using Bits __attribute__((vector_size(4 * kCount))) = uint32_t;
  using HalfBits __attribute__((vector_size(2 * kCount))) = uint16_t;
};
using Float4 = Vector<4>::Floats;
using Float16x = Vector<16>::Floats;

template <class V>
struct Pair {
  V low, high;

  friend FDFO_ALWAYS_INLINE Pair operator+(Pair a, Pair b) { return {a.low + b.low, a.high + b.high}; }
  friend FDFO_ALWAYS_INLINE Pair operator-(Pair a, Pair b) { return {a.low - b.low, a.high - b.high}; }
  friend FDFO_ALWAYS_INLINE Pair operator*(Pair a, Pair b) { return {a.low * b.low, a.high * b.high}; }
  friend FDFO_ALWAYS_INLINE Pair operator+(float a, Pair b) { return {a + b.low, a + b.high}; }
  friend FDFO_ALWAYS_INLINE Pair operator-(Pair a, float b) { return {a.low - b, a.high - b}; }
  friend FDFO_ALWAYS_INLINE Pair operator*(Pair a, float b) { return {a.low * b, a.high * b}; }
  friend FDFO_ALWAYS_INLINE Pair operator*(float a, Pair b) { return {a * b.low, a * b.high}; }
  FDFO_ALWAYS_INLINE Pair& operator+=(Pair b) { return *this = *this + b; }
};

// kLanes floats.
#if defined(__AVX512F__)
using Lanes = Float16x;
#elif defined(__AVX2__)
using Lanes = Pair<Float8>;
#else
using Lanes = Pair<Pair<Float4>>;
#endif

// Between 32-bit lanes and their low halves; __builtin_convertvector takes five instructions for it.
#if defined(__AVX512F__)
FDFO_INLINE Vector<16>::Bits widened(Vector<16>::HalfBits bits) {
  return (Vector<16>::Bits)_mm512_cvtepu16_epi32((__m256i)bits);
}
FDFO_INLINE Vector<16>::HalfBits narrowed(Vector<16>::Bits bits) {
  return (Vector<16>::HalfBits)_mm512_cvtepi32_epi16((__m512i)bits);
}
#elif defined(__AVX2__)
FDFO_INLINE Vector<8>::Bits widened(Vector<8>::HalfBits bits) {
  return (Vector<8>::Bits)_mm256_cvtepu16_epi32((__m128i)bits);
}
FDFO_INLINE Vector<8>::HalfBits narrowed(Vector<8>::Bits bits) {  // of values below 2^16
  const __m256i packed = _mm256_packus_epi32((__m256i)bits, (__m256i)bits);
  return (Vector<8>::HalfBits)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000));
}
#else
FDFO_INLINE Vector<4>::Bits widened(Vector<4>::HalfBits bits) {
  return __builtin_convertvector(bits, Vector<4>::Bits);
}
FDFO_INLINE Vector<4>::HalfBits narrowed(Vector<4>::Bits bits) {
  return __builtin_convertvector(bits, Vector<4>::HalfBits);
}
#endif

template <class V>
constexpr int kWidth = sizeof(V) / sizeof(float);

// Reads and writes kWidth<V> elements. A store rounds to the type of `to`, and returns the values that it left there.
// To bfloat16 it needs no care for NaN: one that comes from bfloat16 has no low bits, so rounding can't overflow it.
template <class V>
struct Access {
  using Bits = typename Vector<kWidth<V>>::Bits;
  using HalfBits = typename Vector<kWidth<V>>::HalfBits;

  static FDFO_ALWAYS_INLINE V load(const float* from) {
    V values;
    memcpy(&values, from, sizeof values);
    return values;
  }
  static FDFO_ALWAYS_INLINE V store(float* to, V value) {
    memcpy(to, &value, sizeof value);
    return value;
  }
  static FDFO_ALWAYS_INLINE V load(const BFloat16* from) {
    HalfBits bits;
    memcpy(&bits, from, sizeof bits);
    return (V)(widened(bits) << 16);
  }
  static FDFO_ALWAYS_INLINE V store(BFloat16* to, V value) {
    const Bits bits = (Bits)value, kept = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
    const HalfBits half = narrowed(kept);
    memcpy(to, &half, sizeof half);
    return (V)(kept << 16);
  }
  static FDFO_ALWAYS_INLINE V load(const Float16* from) {
    float values[kWidth<V>];
    for (int l = 0; l < kWidth<V>; ++l) values[l] = to_float(from[l]);
    return load(values);
  }
  static FDFO_ALWAYS_INLINE V store(Float16* to, V value) {
    float values[kWidth<V>];
    store(values, value);
    for (int l = 0; l < kWidth<V>; ++l) to[l] = from_float<Float16>(values[l]);
    return load(to);
  }
};

#if defined(__AVX512F__)
template <>
FDFO_ALWAYS_INLINE Float16x Access<Float16x>::load(const Float16* from) {
  return (Float16x)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
template <>
FDFO_ALWAYS_INLINE Float16x Access<Float16x>::store(Float16* to, Float16x value) {
  const __m256i bits = _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bits);
  return (Float16x)_mm512_cvtph_ps(bits);
}
#elif defined(__F16C__)
template <>
FDFO_ALWAYS_INLINE Float8 Access<Float8>::load(const Float16* from) {
  return (Float8)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
template <>
FDFO_ALWAYS_INLINE Float8 Access<Float8>::store(Float16* to, Float8 value) {
  const __m128i bits = _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
  return (Float8)_mm256_cvtph_ps(bits);
}
#endif

template <>
struct Access<float> {
  template <class T>
  static FDFO_ALWAYS_INLINE float load(const T* from) {
    return to_float(*from);
  }
  template <class T>
  static FDFO_ALWAYS_INLINE float store(T* to, float value) {
    return to_float(*to = from_float<T>(value));
  }
};

template <class V>
struct Access<Pair<V>> {
  template <class T>
  static FDFO_ALWAYS_INLINE Pair<V> load(const T* from) {
    return {Access<V>::load(from), Access<V>::load(from + kWidth<V>)};
  }
  template <class T>
  static FDFO_ALWAYS_INLINE Pair<V> store(T* to, Pair<V> value) {
    return {Access<V>::store(to, value.low), Access<V>::store(to + kWidth<V>, value.high)};
  }
};

template <class V, class T>
FDFO_INLINE V load(const T* from) {
  return Access<V>::load(from);
}

template <class T, class V>
FDFO_INLINE V store(T* to, V value) {
  return Access<V>::store(to, value);
}

// Halves added until one is left: the same order whatever the width of a native vector.
FDFO_INLINE float total(Float4 v) { return (v[0] + v[2]) + (v[1] + v[3]); }
FDFO_INLINE float total(Float8 v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
FDFO_INLINE float total(Float16x v) {
  return total(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
template <class V>
FDFO_INLINE float total(Pair<V> v) {
  return total(v.low + v.high);
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
    return fdfo::cpu::FDFO_ISA::total((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + rest;
  }
};

}  // namespace fdfo::cpu::FDFO_ISA
