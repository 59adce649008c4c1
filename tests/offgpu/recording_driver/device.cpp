// One H200 and its driver, as far as torch and Triton ask.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>

#include "recorder.h"

namespace recorder {

namespace {

constexpr int kVersion = CUDART_VERSION;

const std::map<int, int> kAttributes = {
    {cudaDevAttrMaxThreadsPerBlock, 1024},
    {cudaDevAttrMaxBlockDimX, 1024},
    {cudaDevAttrMaxBlockDimY, 1024},
    {cudaDevAttrMaxBlockDimZ, 64},
    {cudaDevAttrMaxGridDimX, 0x7fffffff},
    {cudaDevAttrMaxGridDimY, 65535},
    {cudaDevAttrMaxGridDimZ, 65535},
    {cudaDevAttrMaxSharedMemoryPerBlock, 49152},
    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 232448},
    {cudaDevAttrMaxSharedMemoryPerMultiprocessor, 233472},
    {cudaDevAttrWarpSize, 32},
    {cudaDevAttrMultiProcessorCount, 132},
    {cudaDevAttrMaxThreadsPerMultiProcessor, 2048},
    {cudaDevAttrMaxRegistersPerBlock, 65536},
    {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
    {cudaDevAttrComputeCapabilityMajor, 9},
    {cudaDevAttrComputeCapabilityMinor, 0},
    {cudaDevAttrClockRate, 1980000},
    {cudaDevAttrMemoryClockRate, 3201000},
    {cudaDevAttrGlobalMemoryBusWidth, 6144},
    {cudaDevAttrL2CacheSize, 60 << 20},
    {cudaDevAttrUnifiedAddressing, 1},
    {cudaDevAttrMemoryPoolsSupported, 1},
};

thread_local cudaError_t last_error = cudaSuccess;

CUresult succeed() { return CUDA_SUCCESS; }

CUcontext only_context() {
  static int context;
  return as_handle<CUcontext>(&context);
}

// The function of this library, whatever else the process has loaded.
void* function(const char* name) {
  Dl_info here;
  dladdr(reinterpret_cast<void*>(&succeed), &here);
  static void* const library = dlopen(here.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  void* const found = dlsym(library, name);
  return found != nullptr ? found : reinterpret_cast<void*>(&succeed);
}

}  // namespace

int attribute(int which) {
  const auto found = kAttributes.find(which);
  return found == kAttributes.end() ? 0 : found->second;
}

}  // namespace recorder

using namespace recorder;

ANSWER cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
ANSWER cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
ANSWER cudaError_t cudaSetDevice(int device) {
  return last_error = device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
ANSWER cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
ANSWER cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
ANSWER cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
ANSWER cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
ANSWER cudaError_t cudaPeekAtLastError() { return last_error; }
ANSWER const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "recorder"; }
ANSWER const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
ANSWER cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
ANSWER cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int) {
  return snprintf(text, size, "0000:00:1e.0"), cudaSuccess;
}
ANSWER cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  return *least = 0, *greatest = -5, cudaSuccess;
}

ANSWER cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
  memset(of, 0, sizeof *of);
  strcpy(of->name, "NVIDIA H200, recorded");
  of->totalGlobalMem = kTotalMemory;
  of->major = attribute(cudaDevAttrComputeCapabilityMajor);
  of->minor = attribute(cudaDevAttrComputeCapabilityMinor);
  of->multiProcessorCount = attribute(cudaDevAttrMultiProcessorCount);
  of->warpSize = attribute(cudaDevAttrWarpSize);
  of->maxThreadsPerBlock = attribute(cudaDevAttrMaxThreadsPerBlock);
  of->maxThreadsPerMultiProcessor = attribute(cudaDevAttrMaxThreadsPerMultiProcessor);
  of->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  of->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  of->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  of->regsPerBlock = of->regsPerMultiprocessor = attribute(cudaDevAttrMaxRegistersPerBlock);
  of->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  of->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  const int block[] = {1024, 1024, 64}, grid[] = {0x7fffffff, 65535, 65535};
  std::copy(block, block + 3, of->maxThreadsDim);
  std::copy(grid, grid + 3, of->maxGridSize);
  return cudaSuccess;
}

ANSWER cudaError_t cudaGetDriverEntryPointByVersion(
    const char* name, void** entry, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* result) {
  *entry = function(name);
  if (result != nullptr) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

ANSWER CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
ANSWER CUresult cuDriverGetVersion(int* version) { return *version = kVersion, CUDA_SUCCESS; }
ANSWER CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
ANSWER CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
ANSWER CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
ANSWER CUresult cuCtxGetCurrent(CUcontext* context) { return *context = only_context(), CUDA_SUCCESS; }
ANSWER CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
ANSWER CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
ANSWER CUresult cuStreamGetCtx(CUstream, CUcontext* context) { return *context = only_context(), CUDA_SUCCESS; }
ANSWER CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 1 << 20, CUDA_SUCCESS; }
ANSWER CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
ANSWER CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice) {
  return *context = only_context(), CUDA_SUCCESS;
}
ANSWER CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
ANSWER CUresult cuGetErrorString(CUresult, const char** text) { return *text = "recorder", CUDA_SUCCESS; }
ANSWER CUresult cuGetErrorName(CUresult, const char** text) { return *text = "recorder", CUDA_SUCCESS; }
// The CUDA runtime that is linked into an extension asks for functions that no header names: it can't work on this.
ANSWER CUresult cuGetExportTable(const void**, const CUuuid*) { return CUDA_ERROR_NOT_FOUND; }
ANSWER CUresult cuGetProcAddress_v2(
    const char* name, void** entry, int, cuuint64_t, CUdriverProcAddressQueryResult*) {
  return *entry = function(name), CUDA_SUCCESS;
}
