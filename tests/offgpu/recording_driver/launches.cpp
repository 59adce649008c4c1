// Kernels of torch, of Triton and of the libraries that torch calls.
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "recorder.h"

namespace recorder {

namespace {

std::mutex mutex;
std::unordered_map<const void*, std::string> names;

void name(const void* function, const std::string& name) {
  std::lock_guard<std::mutex> lock(mutex);
  names[function] = name;
}

std::string name_of(const void* function) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = names.find(function);
  return found == names.end() ? "unnamed" : found->second;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> pushed;

}  // namespace

}  // namespace recorder

using namespace recorder;

// What nvcc puts into a program around its kernels.
ANSWER void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
ANSWER void __cudaRegisterFatBinaryEnd(void**) {}
ANSWER void __cudaUnregisterFatBinary(void**) {}
ANSWER char __cudaInitModule(void**) { return 1; }
ANSWER void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
ANSWER void __cudaRegisterFunction(
    void**, const char* function, char*, const char* symbol, int, uint3*, uint3*, dim3*, dim3*, int*) {
  name(function, symbol);
}
ANSWER unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  return pushed.push_back({grid, block, shared, stream}), 0;
}
ANSWER cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = pushed.back();
  pushed.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
ANSWER cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  return *kernel = as_handle<cudaKernel_t>(const_cast<void*>(function)), cudaSuccess;
}

ANSWER cudaError_t cudaLaunchKernel(const void* function, dim3, dim3, void**, size_t, cudaStream_t stream) {
  return note_launch(name_of(function), stream), cudaSuccess;
}
ANSWER cudaError_t __cudaLaunchKernel(
    cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}
ANSWER cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void**) {
  return note_launch(name_of(function), how->stream), cudaSuccess;
}

ANSWER cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* of, const void*) {
  memset(of, 0, sizeof *of);
  of->maxThreadsPerBlock = 1024;
  of->numRegs = 64;
  of->binaryVersion = of->ptxVersion = 90;
  return cudaSuccess;
}
ANSWER cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
ANSWER cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
ANSWER cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void*, int, size_t, unsigned) {
  return *blocks = 2, cudaSuccess;
}

// Triton.
ANSWER CUresult cuModuleLoadData(CUmodule* module, const void*) {
  forbidden_while_capturing("cuModuleLoadData");
  return *module = as_handle<CUmodule>(next_handle()), CUDA_SUCCESS;
}
ANSWER CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* symbol) {
  *function = as_handle<CUfunction>(next_handle());
  note(kEvents, std::string("load: ") + symbol);
  return name(*function, std::string("triton ") + symbol), CUDA_SUCCESS;
}
ANSWER CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 64 : 0;
  return CUDA_SUCCESS;
}
ANSWER CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
ANSWER CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
ANSWER CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  return *clusters = 1, CUDA_SUCCESS;
}
ANSWER CUresult cuLaunchKernelEx(const CUlaunchConfig* how, CUfunction function, void**, void**) {
  const bool fits = how->gridDimX <= 0x7fffffffu && how->gridDimY <= 65535 && how->gridDimZ <= 65535;
  if (!fits) note_refused("a grid that is too large: " + name_of(function));
  return note_launch(name_of(function), how->hStream), fits ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}
