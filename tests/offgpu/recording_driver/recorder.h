// What a program asks of a GPU that is not there, written down by name, and what of it CUDA would refuse.
//
// A refused call is noted and goes on: one run shows all of them.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <string>

#define ANSWER extern "C" __attribute__((visibility("default")))

namespace recorder {

enum Record { kEvents, kKernels, kUnmodelled };

constexpr size_t kTotalMemory = size_t{141} << 30;

// Counts `name`; of an event the listener hears, after the call has been looked at.
void note(Record record, const std::string& name);

// The host stands still until the GPU is done.
void note_wait(const std::string& call);

void note_refused(const std::string& why);

// A kernel on `stream`, by name: a node of the graph where the stream is captured.
void note_launch(const std::string& kernel, cudaStream_t stream);

// Refused in a thread whose capture mode forbids it while some stream captures.
void forbidden_while_capturing(const std::string& call);

bool is_capturing(cudaStream_t stream);

// Another value at each call: what handles are made of.
void* next_handle();

int attribute(int which);

template <class T>
T as_handle(void* handle) {
  return reinterpret_cast<T>(handle);
}

}  // namespace recorder
