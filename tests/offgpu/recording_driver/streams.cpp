// Streams, events, and the rules of a stream's capture into a graph.
//
// Torch's streams do not wait for the legacy stream, so that work on it beside a capture is allowed; one capture at a
// time is followed, which is all that torch does.
#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <thread>

#include "recorder.h"

namespace recorder {

namespace {

struct Event {
  std::chrono::steady_clock::time_point recorded_at;
  bool is_recorded = false;
  unsigned long long capture = 0;  // that it belongs to; 0 where it was recorded outside of one
  cudaStream_t stream = nullptr;
};

struct Capture {
  bool active = false;
  unsigned long long number = 0;
  cudaStream_t origin = nullptr;
  std::set<cudaStream_t> joined;  // by an event, and not back yet
  std::thread::id thread;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  size_t launches = 0;

  bool has(cudaStream_t stream) const { return active && (stream == origin || joined.count(stream) > 0); }
};

std::mutex mutex;
Capture capture;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

Event* of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

// A graph is known by the launches in it.
struct Graph {
  size_t launches;
};

// What becomes of a wait of `stream` for `event`: the reason why CUDA would refuse it, or nothing.
std::string waited(cudaStream_t stream, const Event& event) {
  std::lock_guard<std::mutex> lock(mutex);
  if (!capture.active || !event.is_recorded) return "";
  const bool captured = event.capture == capture.number;
  if (captured && stream == cudaStreamLegacy) return "the legacy stream waits for a captured event";
  if (captured && stream == nullptr) return "the legacy stream waits for a captured event";
  if (captured && stream == capture.origin) capture.joined.erase(event.stream);
  if (captured && stream != capture.origin) capture.joined.insert(stream);
  if (!captured && capture.has(stream)) return "a captured stream waits for an event from outside of the capture";
  return "";
}

}  // namespace

bool is_capturing(cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return capture.has(stream);
}

void forbidden_while_capturing(const std::string& call) {
  bool forbidden;
  {
    std::lock_guard<std::mutex> lock(mutex);
    const bool here = capture.thread == std::this_thread::get_id();
    const bool anywhere = capture.mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    forbidden = capture.active && thread_mode != cudaStreamCaptureModeRelaxed && (here || anywhere);
  }
  if (forbidden) note_refused(call + " in a capture");
}

void note_launch(const std::string& kernel, cudaStream_t stream) {
  bool beside;
  {
    std::lock_guard<std::mutex> lock(mutex);
    beside = capture.active && !capture.has(stream);
    capture.launches += capture.has(stream);
  }
  if (beside) note(kEvents, "a launch beside the capture: " + kernel);
  note(kKernels, kernel);
}

}  // namespace recorder

using namespace recorder;

namespace {

void stand_still(const char* call, bool captured) {
  note_wait(call);
  if (captured) return note_refused(std::string(call) + " of what is captured");
  forbidden_while_capturing(call);
}

bool is_captured(cudaEvent_t event) {
  std::lock_guard<std::mutex> lock(recorder::mutex);
  return capture.active && of(event)->capture == capture.number;
}

}  // namespace

ANSWER cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return *stream = as_handle<cudaStream_t>(next_handle()), cudaSuccess;
}
ANSWER cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }
ANSWER cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) { return cudaStreamCreate(stream); }
ANSWER cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
ANSWER cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { return *priority = 0, cudaSuccess; }

ANSWER cudaError_t cudaStreamQuery(cudaStream_t stream) {
  if (is_capturing(stream)) note_refused("cudaStreamQuery of what is captured");
  forbidden_while_capturing("cudaStreamQuery");
  return cudaSuccess;
}

ANSWER cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  return stand_still("cudaStreamSynchronize", is_capturing(stream)), cudaSuccess;
}

ANSWER cudaError_t cudaDeviceSynchronize() { return stand_still("cudaDeviceSynchronize", false), cudaSuccess; }

ANSWER cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void* data) {
  return function(data), cudaSuccess;
}

ANSWER cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t called, void* data, unsigned) {
  if (is_capturing(stream)) note_refused("cudaStreamAddCallback in a capture");
  return called(stream, cudaSuccess, data), cudaSuccess;
}

ANSWER cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
ANSWER cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return cudaEventCreate(event); }
ANSWER cudaError_t cudaEventDestroy(cudaEvent_t event) { return delete of(event), cudaSuccess; }

ANSWER cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  std::lock_guard<std::mutex> lock(recorder::mutex);
  *of(event) = {std::chrono::steady_clock::now(), true, capture.has(stream) ? capture.number : 0, stream};
  return cudaSuccess;
}
ANSWER cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

ANSWER cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const std::string why = waited(stream, *of(event));
  if (!why.empty()) note_refused(why);
  return cudaSuccess;
}

ANSWER cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (is_captured(event)) note_refused("cudaEventQuery of what is captured");
  forbidden_while_capturing("cudaEventQuery");
  return cudaSuccess;
}

ANSWER cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return stand_still("cudaEventSynchronize", is_captured(event)), cudaSuccess;
}

ANSWER cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  using Milliseconds = std::chrono::duration<float, std::milli>;
  *milliseconds = std::max(1e-3f, Milliseconds(of(to)->recorded_at - of(from)->recorded_at).count());
  return cudaSuccess;
}

ANSWER cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  note(kEvents, "capture");
  if (stream == nullptr) note_refused("a capture of the legacy stream");
  std::lock_guard<std::mutex> lock(recorder::mutex);
  capture = {true, capture.number + 1, stream, {}, std::this_thread::get_id(), mode, 0};
  return cudaSuccess;
}

ANSWER cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  bool unjoined, other;
  {
    std::lock_guard<std::mutex> lock(recorder::mutex);
    unjoined = !capture.joined.empty();
    other = stream != capture.origin;
    capture.active = false;
    *graph = reinterpret_cast<cudaGraph_t>(new Graph{capture.launches});
  }
  if (unjoined) note_refused("a stream that joined the capture has not come back");
  if (other) note_refused("another stream ends the capture");
  return cudaSuccess;
}

ANSWER cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

ANSWER cudaError_t cudaStreamGetCaptureInfo(
    cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* number, cudaGraph_t* graph,
    const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* count) {
  cudaStreamIsCapturing(stream, status);
  if (number != nullptr) *number = capture.number;
  if (graph != nullptr) *graph = nullptr;
  if (nodes != nullptr) *nodes = nullptr;
  if (edges != nullptr) *edges = nullptr;
  if (count != nullptr) *count = 0;
  return cudaSuccess;
}

ANSWER cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}

ANSWER cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}

ANSWER cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->launches, cudaSuccess;
}

ANSWER cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  note(kEvents, "replay of " + std::to_string(reinterpret_cast<Graph*>(graph)->launches) + " launches");
  return cudaSuccess;
}

ANSWER cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<Graph*>(graph), cudaSuccess; }
ANSWER cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  return delete reinterpret_cast<Graph*>(graph), cudaSuccess;
}
