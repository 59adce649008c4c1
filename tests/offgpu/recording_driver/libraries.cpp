// cuBLAS and NCCL: what torch asks of them before it calls them, and their calls, by name.
#include <cstdio>
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "recorder.h"

using recorder::next_handle;
using recorder::note;
using recorder::note_launch;

namespace {

std::mutex mutex;
std::unordered_map<void*, cudaStream_t> streams;

// A product on the stream that its handle, the first argument, was given.
int product(const char* name, void* handle) {
  cudaStream_t stream;
  {
    std::lock_guard<std::mutex> lock(mutex);
    stream = streams[handle];
  }
  return note_launch(name, stream), 0;
}

int collective(const char* name) { return note(recorder::kEvents, std::string("collective ") + name), 0; }

}  // namespace

#define PRODUCT(name) \
  ANSWER int name(void* handle) { return product(#name, handle); }

ANSWER int cublasCreate_v2(void** handle) { return *handle = next_handle(), 0; }
ANSWER int cublasDestroy_v2(void*) { return 0; }
ANSWER int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return streams[handle] = stream, 0;
}
ANSWER int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
ANSWER int cublasSetMathMode(void*, int) { return 0; }
ANSWER int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
ANSWER int cublasSetPointerMode_v2(void*, int) { return 0; }
ANSWER int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
PRODUCT(cublasGemmEx)
PRODUCT(cublasSgemm_v2)
PRODUCT(cublasDgemm_v2)
PRODUCT(cublasSgemmEx)
PRODUCT(cublasGemmStridedBatchedEx)
PRODUCT(cublasSgemmStridedBatched)
PRODUCT(cublasSgemv_v2)
PRODUCT(cublasSdot_v2)

ANSWER size_t cublasLtGetVersion() { return 130100; }
ANSWER int cublasLtMatmulDescCreate(void** made, int, int) { return *made = next_handle(), 0; }
ANSWER int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t) { return 0; }
ANSWER int cublasLtMatmulDescDestroy(void*) { return 0; }
ANSWER int cublasLtMatrixLayoutCreate(void** made, int, uint64_t, uint64_t, int64_t) { return *made = next_handle(), 0; }
ANSWER int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t) { return 0; }
ANSWER int cublasLtMatrixLayoutDestroy(void*) { return 0; }
ANSWER int cublasLtMatmulPreferenceCreate(void** made) { return *made = next_handle(), 0; }
ANSWER int cublasLtMatmulPreferenceSetAttribute(void*, int, const void*, size_t) { return 0; }
ANSWER int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
ANSWER int cublasLtMatmulAlgoGetHeuristic(
    void*, void*, void*, void*, void*, void*, void*, int, void* results, int* count) {
  constexpr size_t kResultBytes = 128;
  return memset(results, 0, kResultBytes), *count = 1, 0;
}
ANSWER int cublasLtMatmul(
    void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*, void*, void*,
    const void*, void*, size_t, cudaStream_t stream) {
  return note_launch("cublasLtMatmul", stream), 0;
}


ANSWER int ncclGetVersion(int* version) { return *version = 22809, 0; }
ANSWER int ncclGetUniqueId(void* id) {
  constexpr size_t kIdBytes = 128;
  return memset(id, 7, kIdBytes), 0;
}
ANSWER int ncclCommInitRank(void** made, int, ...) { return *made = next_handle(), 0; }
ANSWER int ncclCommInitRankConfig(void** made, int, ...) { return *made = next_handle(), 0; }
ANSWER int ncclCommGetAsyncError(void*, int* error) { return *error = 0, 0; }
ANSWER int ncclCommCount(void*, int* count) { return *count = 1, 0; }
ANSWER int ncclCommUserRank(void*, int* rank) { return *rank = 0, 0; }
ANSWER const char* ncclGetErrorString(int) { return "recorder"; }
ANSWER const char* ncclGetLastError(void*) { return "recorder"; }
ANSWER int ncclAllReduce() { return collective("ncclAllReduce"); }
ANSWER int ncclBroadcast() { return collective("ncclBroadcast"); }
ANSWER int ncclAllGather() { return collective("ncclAllGather"); }
ANSWER int ncclReduceScatter() { return collective("ncclReduceScatter"); }
