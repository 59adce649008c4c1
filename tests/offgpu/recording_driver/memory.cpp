// Memory of the GPU is addresses that nobody may touch; what is copied from it to the host is zeros.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "recorder.h"

namespace recorder {

namespace {

class Blocks {
 public:
  void add(void* start, size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    sizes_[static_cast<char*>(start)] = bytes;
    total_ += bytes;
  }

  // Its size; 0 where there is none that starts here.
  size_t remove(void* start) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = sizes_.find(static_cast<char*>(start));
    if (found == sizes_.end()) return 0;
    const size_t bytes = found->second;
    sizes_.erase(found);
    total_ -= bytes;
    return bytes;
  }

  bool has(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const char* const byte = static_cast<const char*>(address);
    auto after = sizes_.upper_bound(const_cast<char*>(byte));
    if (after == sizes_.begin()) return false;
    --after;
    return byte < after->first + after->second;
  }

  size_t total() {
    std::lock_guard<std::mutex> lock(mutex_);
    return total_;
  }

 private:
  std::mutex mutex_;
  std::map<char*, size_t> sizes_;
  size_t total_ = 0;
};

Blocks on_device, pinned;

cudaError_t allocate(void** start, size_t bytes) {
  note(kEvents, "allocation");
  if (on_device.total() + bytes > kTotalMemory) return cudaErrorMemoryAllocation;
  *start = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*start == MAP_FAILED) return cudaErrorMemoryAllocation;
  on_device.add(*start, bytes);
  return cudaSuccess;
}

cudaError_t release(void* start) {
  const size_t bytes = on_device.remove(start);
  if (bytes > 0) munmap(start, bytes);
  return cudaSuccess;
}

// The host copies pageable memory itself, and stands still for it, even where it asked not to.
void copy(void* into, const void* from, size_t bytes) {
  const bool arrives = on_device.has(into), leaves = on_device.has(from);
  if (arrives && leaves) return note(kEvents, "copy within the GPU");
  const std::string way = arrives ? "to the GPU" : "from the GPU";
  const bool is_pinned = pinned.has(arrives ? from : into);
  note(kEvents, (is_pinned ? "copy of pinned memory " : "copy of pageable memory ") + way);
  if (leaves) memset(into, 0, bytes);
}

}  // namespace

}  // namespace recorder

using namespace recorder;

ANSWER cudaError_t cudaMalloc(void** start, size_t bytes) {
  forbidden_while_capturing("cudaMalloc");
  return allocate(start, bytes);
}

ANSWER cudaError_t cudaFree(void* start) {
  if (start != nullptr) {
    forbidden_while_capturing("cudaFree");
    note(kEvents, "wait: cudaFree");
  }
  return release(start);
}

ANSWER cudaError_t cudaMallocAsync(void** start, size_t bytes, cudaStream_t) { return allocate(start, bytes); }
ANSWER cudaError_t cudaFreeAsync(void* start, cudaStream_t) { return release(start); }
ANSWER CUresult cuMemAlloc_v2(CUdeviceptr* start, size_t bytes) {
  return static_cast<CUresult>(cudaMalloc(reinterpret_cast<void**>(start), bytes));
}

ANSWER cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *total = kTotalMemory, *free = kTotalMemory - on_device.total(), cudaSuccess;
}

ANSWER cudaError_t cudaHostAlloc(void** start, size_t bytes, unsigned) {
  constexpr size_t kPage = 4096;
  forbidden_while_capturing("cudaHostAlloc");
  note(kEvents, "allocation of pinned memory");
  *start = aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  pinned.add(*start, bytes);
  return cudaSuccess;
}

ANSWER cudaError_t cudaFreeHost(void* start) {
  pinned.remove(start);
  free(start);
  return cudaSuccess;
}

ANSWER cudaError_t cudaHostRegister(void* start, size_t bytes, unsigned) { return pinned.add(start, bytes), cudaSuccess; }
ANSWER cudaError_t cudaHostUnregister(void* start) { return pinned.remove(start), cudaSuccess; }

ANSWER cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* of, const void* address) {
  memset(of, 0, sizeof *of);
  of->type = on_device.has(address) ? cudaMemoryTypeDevice
             : pinned.has(address)  ? cudaMemoryTypeHost
                                    : cudaMemoryTypeUnregistered;
  if (of->type != cudaMemoryTypeUnregistered) of->devicePointer = const_cast<void*>(address);
  if (of->type == cudaMemoryTypeHost) of->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}

ANSWER CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr address) {
  const bool known = on_device.has(reinterpret_cast<void*>(address));
  *static_cast<CUdeviceptr*>(value) = known ? address : 0;
  return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

ANSWER cudaError_t cudaMemcpyAsync(void* into, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return copy(into, from, bytes), cudaSuccess;
}

ANSWER cudaError_t cudaMemcpy(void* into, const void* from, size_t bytes, cudaMemcpyKind) {
  forbidden_while_capturing("cudaMemcpy");
  note_wait("cudaMemcpy");
  return copy(into, from, bytes), cudaSuccess;
}

ANSWER cudaError_t cudaMemcpyPeerAsync(void* into, int, const void* from, int, size_t bytes, cudaStream_t) {
  return copy(into, from, bytes), cudaSuccess;
}

ANSWER cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return note(kEvents, "memset"), cudaSuccess; }
ANSWER cudaError_t cudaMemset(void*, int, size_t) { return note(kEvents, "memset"), cudaSuccess; }

ANSWER cudaError_t cudaGetSymbolAddress(void** address, const void*) {
  static char somewhere[4096];
  return *address = somewhere, cudaSuccess;
}
