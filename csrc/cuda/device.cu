#include "launch.cuh"

namespace fdfo::cuda {

const char* probe() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fdfo::cuda
