// Pieces that every CUDA kernel is made of. A thread handles four consecutive elements: one Philox counter.
#pragma once

#include <cuda_runtime.h>

#include "kernels.h"

namespace fdfo::cuda {

constexpr int kThreads = 256;
constexpr int kFour = 4;
constexpr int64_t kBlock = kThreads * kFour;  // elements a thread block handles

__host__ __device__ inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Which row of `size` elements this thread block works on, and this thread's first element there.
struct Place {
  int64_t row, begin;
};

__device__ inline Place place(int64_t size) {
  const int64_t per_row = blocks(size, kBlock), row = blockIdx.x / per_row;
  return {row, (blockIdx.x - row * per_row) * kBlock + threadIdx.x * kFour};
}

template <class T>
struct alignas(kFour * sizeof(T)) Four {
  T v[kFour];
};

template <class T>
__device__ inline bool whole(const T* address, int64_t left) {
  return left >= kFour && reinterpret_cast<uintptr_t>(address) % sizeof(Four<T>) == 0;
}

// Up to four elements, zeros beyond `left`; one load where the address allows it.
template <class T>
__device__ inline Four<T> load(const T* address, int64_t left) {
  if (whole(address, left)) return *reinterpret_cast<const Four<T>*>(address);
  Four<T> four{};
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < left) four.v[i] = address[i];
  }
  return four;
}

template <class T>
__device__ inline void store(T* address, const Four<T>& four, int64_t left) {
  if (whole(address, left)) {
    *reinterpret_cast<Four<T>*>(address) = four;
    return;
  }
#pragma unroll
  for (int i = 0; i < kFour; ++i) {
    if (i < left) address[i] = four.v[i];
  }
}

__device__ inline Four<float> four_normals(int64_t begin, uint32_t stream, int64_t pair, Key key) {
  const uint32_t low = static_cast<uint32_t>(pair), high = static_cast<uint32_t>(pair >> 32);
  const Normals n = normals({static_cast<uint32_t>(begin / kFour), stream, low, high}, key);
  return {{n.n0, n.n1, n.n2, n.n3}};
}

// Sum over the thread block, in a fixed order; valid in thread 0.
__device__ inline double block_sum(double value) {
  __shared__ double warps[kThreads / 32];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, offset);
  __syncthreads();  // an earlier sum may still be read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < kThreads / 32; ++w) sum += warps[w];
  }
  return sum;
}

// Calls `run<T>()` with the C++ type that `number` names.
template <class Run>
void with_type(Number number, const Run& run) {
  switch (number) {
    case Number::kFloat32:
      return run.template operator()<float>();
    case Number::kBFloat16:
      return run.template operator()<BFloat16>();
    case Number::kFloat16:
      return run.template operator()<Float16>();
  }
}

inline cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fdfo::cuda
