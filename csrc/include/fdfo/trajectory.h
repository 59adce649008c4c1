// One latent element on its way: the prior, and a solver step. Sampling and replay both call these, so they agree bit
// for bit. Compiled without contraction of multiply and add (-ffp-contract=off, --fmad=false).
#pragma once

#include "fdfo/number.h"
#include "fdfo/normal.h"

namespace fdfo {

constexpr uint32_t kSharedStream = 0;

// Stream of the fresh noise at grid point k (0: the prior; step i has k = i + 1).
FDFO_HD uint32_t churn_stream(uint32_t k, uint32_t branch) { return 1 + 2 * k + branch; }

// x_next = keep * (x + move * v) + noise * eps; the prior has no move. Rounded once from float64 by the Python side.
struct Coefficients {
  float move, keep, noise;

  // Without churn a step is Euler's and draws no noise.
  FDFO_HD bool churned() const { return noise != 0 || keep != 1; }
};

// Guidance in float32, then rounding to the model's type T.
template <class T>
FDFO_HD T guided(T v, T v_uncond, float scale) {
  const float uncond = to_float(v_uncond);
  return from_float<T>(uncond + scale * (to_float(v) - uncond));
}

FDFO_HD float overshoot(float x, float v, Coefficients c) { return x + c.move * v; }

// Antithetic branches share the stream of branch 0; branch 1 takes its noise with the other sign.
FDFO_HD uint32_t noise_branch(uint32_t branch, bool antithetic) { return antithetic ? 0 : branch; }

FDFO_HD Coefficients of_branch(Coefficients c, uint32_t branch, bool antithetic) {
  if (antithetic && branch == 1) c.noise = -c.noise;
  return c;
}

FDFO_HD float renoise(float x, float eps, Coefficients c) { return c.keep * x + c.noise * eps; }

}  // namespace fdfo
