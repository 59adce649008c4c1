// The model's number types: float, bfloat16 and float16, converted with rounding to nearest even.
#pragma once

#include "fdfo/macros.h"

namespace fdfo {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

FDFO_HD float to_float(float value) { return value; }

FDFO_HD float to_float(BFloat16 value) { return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16); }

FDFO_HD float to_float(Float16 value) {
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t rebased = magnitude + 0x38000000u;  // exponent bias 15 -> 127
  const float subnormal = bit_cast<float>(rebased + 0x00800000u) - 0x1p-14f;
  const uint32_t special = rebased + 0x38000000u;  // infinity and NaN
  const uint32_t bits = exponent == 0 ? bit_cast<uint32_t>(subnormal) : exponent == 0x0F800000u ? special : rebased;
  return bit_cast<float>(bits | static_cast<uint32_t>(value.bits & 0x8000u) << 16);
}

template <class T>
FDFO_HD T from_float(float value);

template <>
FDFO_HD float from_float<float>(float value) {
  return value;
}

template <>
FDFO_HD BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
  return {static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded)};
}

template <>
FDFO_HD Float16 from_float<Float16>(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const float denormal_magic = bit_cast<float>(0x3F000000u);  // 0.5: the addition rounds to multiples of 2^-24
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(magnitude) + denormal_magic) - 0x3F000000u;
  const uint32_t normal = (magnitude + 0xC8000FFFu + (magnitude >> 13 & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  const uint32_t half = magnitude >= 0x47800000u ? special : magnitude < 0x38800000u ? small : normal;
  return {static_cast<uint16_t>(half | sign >> 16)};
}

}  // namespace fdfo
