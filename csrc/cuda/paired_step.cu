#include "launch.cuh"

namespace fdfo::cuda {

// grid: 2 * pairs * blocks(size, kBlock); row 2 * pair + branch
template <class T>
__global__ void __launch_bounds__(kThreads) paired_step_kernel(const PairedStep a) {
  const Place p = place(a.size);
  if (p.begin >= a.size) return;
  const int64_t pair = p.row / 2, left = a.size - p.begin;
  const uint32_t branch = static_cast<uint32_t>(p.row % 2);
  const Coefficients c = of_branch(a.coefficients[pair], branch, a.antithetic);
  Four<T> v = load(a.v.as<const T>().row(pair, branch) + p.begin, left);
  if (a.v_uncond.data != nullptr) {
    const Four<T> uncond = load(a.v_uncond.as<const T>().row(pair, branch) + p.begin, left);
#pragma unroll
    for (int i = 0; i < kFour; ++i) v.v[i] = guided(v.v[i], uncond.v[i], a.guidance_scale);
  }
  if (a.v_out.data != nullptr) store(a.v_out.as<T>().row(pair, branch) + p.begin, v, left);
  Four<float> x = load(a.x.row(pair, branch) + p.begin, left);
#pragma unroll
  for (int i = 0; i < kFour; ++i) x.v[i] = overshoot(x.v[i], to_float(v.v[i]), c);
  if (c.churned()) {
    const uint32_t stream = churn_stream(a.step + 1, noise_branch(branch, a.antithetic));
    const Four<float> eps = four_normals(p.begin, stream, a.pair[pair], a.key);
#pragma unroll
    for (int i = 0; i < kFour; ++i) x.v[i] = renoise(x.v[i], eps.v[i], c);
  }
  store(a.out.row(pair, branch) + p.begin, x, left);
}

const char* paired_step(const PairedStep& a, void* stream) {
  with_type(a.number, [&]<class T>() {
    paired_step_kernel<T><<<2 * a.pairs * blocks(a.size, kBlock), kThreads, 0, as_stream(stream)>>>(a);
  });
  return launch_error();
}

}  // namespace fdfo::cuda
