#include "recorder.h"

#include <atomic>
#include <map>
#include <mutex>

namespace recorder {

namespace {

using Listener = void (*)(const char*);

std::mutex mutex;
std::map<std::string, long> counts[3];
std::atomic<Listener> listener{nullptr};
std::atomic<long> last_handle{0x1000};

}  // namespace

void note(Record record, const std::string& name) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    counts[record][name]++;
  }
  const Listener told = listener;
  if (record == kEvents && told != nullptr) told(name.c_str());
}

void note_wait(const std::string& call) { note(kEvents, "wait: " + call); }

void note_refused(const std::string& why) { note(kEvents, "refused: " + why); }

void* next_handle() { return reinterpret_cast<void*>(last_handle += 16); }

}  // namespace recorder

ANSWER void recorder_reset() {
  std::lock_guard<std::mutex> lock(recorder::mutex);
  for (auto& record : recorder::counts) record.clear();
}

// Lines of a name, a tab and how often; valid until the next call.
ANSWER const char* recorder_report(int record) {
  static std::string lines;
  std::lock_guard<std::mutex> lock(recorder::mutex);
  lines.clear();
  for (const auto& [name, count] : recorder::counts[record]) lines += name + "\t" + std::to_string(count) + "\n";
  return lines.c_str();
}

ANSWER void recorder_listen(void (*told)(const char*)) { recorder::listener = told; }

// What a function that nothing is known of does: it succeeds.
ANSWER long recorder_unmodelled(const char* name) {
  recorder::note(recorder::kUnmodelled, name);
  return 0;
}
