#include "launch.cuh"

namespace fdfo::cuda {

__device__ inline float half_difference(float a, float b) { return (a - b) / 2; }

// grid: pairs; a thread block sums its pair and then scales it: the second read comes from the cache
__global__ void __launch_bounds__(kThreads) pair_direction_kernel(const PairDirection a) {
  __shared__ float divisor;
  const float *first = a.x.row(blockIdx.x, 0), *second = a.x.row(blockIdx.x, 1);
  double mine = 0;
  for (int64_t begin = threadIdx.x * kFour; begin < a.size; begin += kBlock) {
    const Four<float> p = load(first + begin, a.size - begin), q = load(second + begin, a.size - begin);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const float d = half_difference(p.v[i], q.v[i]);
      mine += d * d;
    }
  }
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) divisor = static_cast<float>(sum / static_cast<double>(a.size) + a.floor);
  __syncthreads();
  for (int64_t begin = threadIdx.x * kFour; begin < a.size; begin += kBlock) {
    const Four<float> p = load(first + begin, a.size - begin), q = load(second + begin, a.size - begin);
    Four<float> u;
#pragma unroll
    for (int i = 0; i < kFour; ++i) u.v[i] = half_difference(p.v[i], q.v[i]) / divisor;
    store(a.out + blockIdx.x * a.out_stride + begin, u, a.size - begin);
  }
}

const char* pair_direction(const PairDirection& a, void* stream) {
  pair_direction_kernel<<<a.pairs, kThreads, 0, as_stream(stream)>>>(a);
  return launch_error();
}

}  // namespace fdfo::cuda
