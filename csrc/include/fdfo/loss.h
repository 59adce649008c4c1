// The clipped surrogate of one (sample, step): from the two means to the loss and to the scale of its gradient.
#pragma once

#include <cmath>

#include "fdfo/macros.h"

namespace fdfo {

struct LossRow {
  double log_ratio;  // l = -(mean(e^2) + 2 mean(e u))
  double loss;       // -A rho + |A| / (2 c) (rho - 1)^2, rho = exp(l)
  double scale;      // dL/dv = scale * (e + u): (-A rho + |A| / c (rho - 1) rho) (-2 / n)
};

// A = 0 gives exactly 0 whatever rho is; l -> -inf gives rho = 0 and scale 0.
FDFO_HD LossRow loss_row(double mean_ee, double mean_eu, double advantage, double clip_range, double n) {
  const double l = -(mean_ee + 2 * mean_eu);
  if (advantage == 0) return {l, 0.0, 0.0};
  const double rho = exp(l), weight = fabs(advantage) / clip_range;
  const double slope = -advantage * rho + weight * (rho - 1) * rho;
  return {l, -advantage * rho + 0.5 * weight * (rho - 1) * (rho - 1), rho == 0 ? 0.0 : slope * (-2 / n)};
}

}  // namespace fdfo
