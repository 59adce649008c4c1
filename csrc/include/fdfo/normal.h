// Standard normals from Philox words: u = ((word >> 9) + 0.5) * 2^-23, then Box-Muller on (u0, u1) and (u2, u3).
//
// log, cos and sin are polynomials of our own: a vector loop and a GPU thread then give the same value, and no slow
// path for large arguments costs a kernel its registers.
#pragma once

#include <cmath>

#include "fdfo/philox.h"

namespace fdfo {

struct Normals {
  float n0, n1, n2, n3;
};

// ln(u) of u = (m + 0.5) * 2^-23, m < 2^23; relative error 2e-7 up to u next to 1, where ln(u) vanishes.
FDFO_HD float log_uniform(uint32_t m) {
  const uint32_t bits = bit_cast<uint32_t>((static_cast<float>(static_cast<int32_t>(m)) + 0.5f) * 0x1p-23f);
  const uint32_t shifted = bits - 0x3F3504F3u;  // of sqrt(1/2): the mantissa below lies in sqrt(1/2)..sqrt(2)
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float x = bit_cast<float>((shifted & 0x007FFFFFu) + 0x3F3504F3u) - 1.0f;
  float p = 7.0376836292e-2f;  // (ln(1 + x) - x + x^2 / 2) / x^3, minimax (Cephes logf)
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  const float square = x * x, e = static_cast<float>(exponent);
  const float tail = x * square * p - 0.5f * square + e * -2.12194440e-4f;
  return (x + tail) + e * 0.693359375f;
}

struct CosSin {
  float cosine, sine;
};

// cos and sin of 2 pi (m + 0.5) / 2^23, m < 2^23: Taylor series around the nearest quarter turn, good to 1e-9 there.
FDFO_HD CosSin cos_sin_turns(uint32_t m) {
  const int32_t quarter = static_cast<int32_t>(m + (1u << 20)) >> 21;  // 0..4
  const int32_t rest = static_cast<int32_t>(m) - (quarter << 21);
  const float x = (static_cast<float>(rest) + 0.5f) * 0x1p-23f * 6.283185307179586f;
  const float z = x * x;
  const float s = x * (1.0f + z * (-1.0f / 6 + z * (1.0f / 120 + z * (-1.0f / 5040 + z * (1.0f / 362880)))));
  const float c =
      1.0f + z * (-0.5f + z * (1.0f / 24 + z * (-1.0f / 720 + z * (1.0f / 40320 - z * (1.0f / 3628800)))));
  const uint32_t swap = (quarter & 1) ? 0xFFFFFFFFu : 0u;
  const uint32_t bits_c = bit_cast<uint32_t>(c), bits_s = bit_cast<uint32_t>(s);
  const uint32_t cosine = (bits_s & swap) | (bits_c & ~swap), sine = (bits_c & swap) | (bits_s & ~swap);
  const uint32_t sign_c = static_cast<uint32_t>((quarter + 1) & 2) << 30, sign_s = static_cast<uint32_t>(quarter & 2) << 30;
  return {bit_cast<float>(cosine ^ sign_c), bit_cast<float>(sine ^ sign_s)};
}

FDFO_HD void box_muller(uint32_t word_a, uint32_t word_b, float& first, float& second) {
  const float radius = sqrtf(-2.0f * log_uniform(word_a >> 9));
  const CosSin turn = cos_sin_turns(word_b >> 9);
  first = radius * turn.cosine;
  second = radius * turn.sine;
}

FDFO_HD Normals normals(Words counter, Key key) {
  const Words w = philox(counter, key);
  Normals n;
  box_muller(w.w0, w.w1, n.n0, n.n1);
  box_muller(w.w2, w.w3, n.n2, n.n3);
  return n;
}

}  // namespace fdfo
