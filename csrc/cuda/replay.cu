#include "launch.cuh"

namespace fdfo::cuda {

// grid: rows * blocks(size, kBlock); x stays in registers from the noise to the last step that is wanted
template <class T>
__global__ void __launch_bounds__(kThreads) replay_kernel(const Replay a) {
  const Place p = place(a.size);
  if (p.begin >= a.size) return;
  const int64_t pair = a.pair[p.row], last = a.last[p.row], left = a.size - p.begin;
  const uint32_t branch = static_cast<uint32_t>(a.branch[p.row]);
  const T* v = a.velocities.as<const T>().row(a.index[p.row], branch) + p.begin;
  Four<float> x = four_normals(p.begin, kSharedStream, pair, a.key);
  for (int64_t k = 0; k <= last; ++k) {
    const Coefficients c = of_branch(a.coefficients[p.row * (a.steps + 1) + k], branch, a.antithetic);
    if (k > 0) {
      const Four<T> used = load(v + (k - 1) * a.step_stride, left);
#pragma unroll
      for (int i = 0; i < kFour; ++i) x.v[i] = overshoot(x.v[i], to_float(used.v[i]), c);
    }
    if (c.churned()) {
      const uint32_t stream = churn_stream(static_cast<uint32_t>(k), noise_branch(branch, a.antithetic));
      const Four<float> eps = four_normals(p.begin, stream, pair, a.key);
#pragma unroll
      for (int i = 0; i < kFour; ++i) x.v[i] = renoise(x.v[i], eps.v[i], c);
    }
    const int64_t wanted = a.wanted[p.row * (a.steps + 1) + k];
    if (wanted >= 0) store(a.out + wanted * a.size + p.begin, x, left);
  }
}

const char* replay(const Replay& a, void* stream) {
  with_type(a.number, [&]<class T>() {
    replay_kernel<T><<<a.rows * blocks(a.size, kBlock), kThreads, 0, as_stream(stream)>>>(a);
  });
  return launch_error();
}

}  // namespace fdfo::cuda
