#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

void paired_noise(const PairedNoise& a, int threads) {
  const int64_t tasks = a.pairs * blocks(a.size, kBlock);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const Span s = span(task, a.size, kBlock);
    float shared[kBlock], eps[kBlock];
    fill_normals(shared, s.begin, kSharedStream, a.pair[s.row], a.key);
    for (uint32_t branch = 0; branch < 2; ++branch) {
      const Coefficients c = of_branch(a.coefficients[s.row], branch, a.antithetic);
      float* out = a.out + (2 * s.row + branch) * a.size + s.begin;
      if (c.churned()) {
        fill_normals(eps, s.begin, churn_stream(0, noise_branch(branch, a.antithetic)), a.pair[s.row], a.key);
        for (int i = 0; i < s.count; ++i) out[i] = renoise(shared[i], eps[i], c);
      } else {
        for (int i = 0; i < s.count; ++i) out[i] = shared[i];
      }
    }
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
