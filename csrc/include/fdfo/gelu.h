// GELU by tanh, and its slope. As x times a sigmoid: no difference of numbers near 1 for negative x, and one exponential.
#pragma once

#include "fdfo/macros.h"

namespace fdfo {

// e^x for |x| <= 87: the Taylor series to r^7 around the nearest multiple of ln 2, 5e-9 off, times a power of two.
FDFO_HD float exp_within(float x) {
  const float n = x * 1.44269504f + 12582912.0f - 12582912.0f;  // rounds to an integer
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;   // the first product is exact
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  return p * bit_cast<float>((static_cast<uint32_t>(static_cast<int32_t>(n)) + 127u) << 23);
}

struct GeluPoint {
  float value, slope;
};

// Beyond 9.9 GELU is x or 1e-37: the exponential stays within float. NaN stays NaN.
FDFO_HD GeluPoint gelu(float x) {
  const float above = x < -9.9f ? -9.9f : x;
  const float inside = above > 9.9f ? 9.9f : above;
  const float square = inside * inside;
  const float e = exp_within(inside * (-1.595769122f - 0.0713548163f * square));  // e^(-2u)
  const float sigmoid = 1.0f / (1.0f + e);
  const float slope_of_2u = 1.595769122f + 0.2140644489f * square;
  return {above * sigmoid, sigmoid + inside * (e * sigmoid) * sigmoid * slope_of_2u};
}

}  // namespace fdfo
