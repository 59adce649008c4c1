#include "launch.cuh"

namespace fdfo::cuda {

// grid: rows * blocks(size, kBlock)
__global__ void __launch_bounds__(kThreads) philox_normal_kernel(const PhiloxNormal a) {
  const Place p = place(a.size);
  if (p.begin >= a.size) return;
  const Four<float> n = four_normals(p.begin, static_cast<uint32_t>(a.stream[p.row]), a.pair[p.row], a.key);
  store(a.out + p.row * a.size + p.begin, n, a.size - p.begin);
}

const char* philox_normal(const PhiloxNormal& a, void* stream) {
  philox_normal_kernel<<<a.rows * blocks(a.size, kBlock), kThreads, 0, as_stream(stream)>>>(a);
  return launch_error();
}

}  // namespace fdfo::cuda
