#include "launch.cuh"

namespace fdfo::cuda {

// grid: pairs * blocks(size, kBlock); a thread makes the shared noise once for both branches
__global__ void __launch_bounds__(kThreads) paired_noise_kernel(const PairedNoise a) {
  const Place p = place(a.size);
  if (p.begin >= a.size) return;
  const Four<float> shared = four_normals(p.begin, kSharedStream, a.pair[p.row], a.key);
#pragma unroll
  for (uint32_t branch = 0; branch < 2; ++branch) {
    const Coefficients c = of_branch(a.coefficients[p.row], branch, a.antithetic);
    Four<float> x = shared;
    if (c.churned()) {
      const uint32_t stream = churn_stream(0, noise_branch(branch, a.antithetic));
      const Four<float> eps = four_normals(p.begin, stream, a.pair[p.row], a.key);
#pragma unroll
      for (int i = 0; i < kFour; ++i) x.v[i] = renoise(x.v[i], eps.v[i], c);
    }
    store(a.out + (2 * p.row + branch) * a.size + p.begin, x, a.size - p.begin);
  }
}

const char* paired_noise(const PairedNoise& a, void* stream) {
  paired_noise_kernel<<<a.pairs * blocks(a.size, kBlock), kThreads, 0, as_stream(stream)>>>(a);
  return launch_error();
}

}  // namespace fdfo::cuda
