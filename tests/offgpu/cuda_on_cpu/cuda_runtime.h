// As much of CUDA as csrc/cuda takes, on a CPU. Thread blocks run one after the other; the threads of a block are fibres
// that take turns, each until its next barrier or shuffle.
#pragma once

#include <cmath>
#include <cstdint>

#define __host__
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shared__ static  // one thread block runs at a time: what is static is the block's

struct dim3 {
  unsigned x, y, z;
};
using cudaStream_t = void*;
using cudaError_t = int;
constexpr int cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

namespace emulated {

extern dim3 thread_index, block_index, grid_size;

void barrier();
double shuffle_down(double value, int offset);
void run_grid(long grid, int threads, void (*body)(void*), void* argument);

template <class Kernel, class... Arguments>
void launch(long grid, int threads, Kernel kernel, Arguments... arguments) {
  auto call = [=] { kernel(arguments...); };
  run_grid(grid, threads, [](void* f) { (*static_cast<decltype(call)*>(f))(); }, &call);
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::barrier(); }
inline void __threadfence() {}
inline double __shfl_down_sync(unsigned, double value, int offset) { return emulated::shuffle_down(value, offset); }
template <class T>
T __ldcg(const T* address) {
  return *address;
}
inline uint32_t atomicAdd(uint32_t* address, uint32_t value) {
  const uint32_t old = *address;
  *address += value;
  return old;
}
