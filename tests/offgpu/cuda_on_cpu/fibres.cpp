// Runs a grid on one CPU thread. FDFO_THREAD_ORDER=backwards lets the last thread of a block, and the last block of the
// grid, go first: a barrier that is missing shows in one order or in the other.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda_runtime.h"

namespace emulated {

dim3 thread_index, block_index, grid_size;

namespace {

enum class Waits { kNot, kAtBarrier, kAtShuffle, kBehindShuffle };

struct Fibre {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  Waits waits;
};

constexpr int kWarp = 32, kStack = 64 << 10;
std::vector<Fibre> fibres;
ucontext_t scheduler;
int current;
double exchanged[1024];
void (*kernel)(void*);
void* kernel_argument;

void begin() {
  kernel(kernel_argument);
  fibres[current].done = true;
  swapcontext(&fibres[current].context, &scheduler);
}

void yield(Waits why) {
  const int own = current;
  fibres[own].waits = why;
  swapcontext(&fibres[own].context, &scheduler);
  thread_index = {static_cast<unsigned>(own), 0, 0};
}

void make(Fibre& fibre) {
  if (fibre.stack.empty()) fibre.stack.resize(kStack);
  fibre.done = false;
  fibre.waits = Waits::kNot;
  getcontext(&fibre.context);
  fibre.context.uc_stack.ss_sp = fibre.stack.data();
  fibre.context.uc_stack.ss_size = fibre.stack.size();
  fibre.context.uc_link = &scheduler;
  makecontext(&fibre.context, begin, 0);
}

[[noreturn]] void refuse(const char* why) {
  std::fprintf(stderr, "emulated CUDA: %s\n", why);
  std::abort();
}

void resume(int thread) {
  current = thread;
  fibres[thread].waits = Waits::kNot;
  thread_index = {static_cast<unsigned>(thread), 0, 0};
  swapcontext(&scheduler, &fibres[thread].context);
}

// The threads of a warp, in step from shuffle to shuffle, until each has ended or is at a barrier.
void run_warp(int first, int threads, bool backwards) {
  for (bool moved = true; moved;) {
    moved = false;
    for (int i = 0; i < threads; ++i) {
      const int thread = first + (backwards ? threads - 1 - i : i);
      if (fibres[thread].done || fibres[thread].waits == Waits::kAtBarrier) continue;
      resume(thread);
      moved = true;
    }
  }
}

// Warp after warp, each as far as it gets, from barrier to barrier: a warp that runs ahead of another shows a barrier
// that is missing between them.
void run_block(bool backwards) {
  const int threads = static_cast<int>(fibres.size()), warps = threads / kWarp;
  for (;;) {
    for (int i = 0; i < warps; ++i) run_warp((backwards ? warps - 1 - i : i) * kWarp, kWarp, backwards);
    int live = 0;
    for (Fibre& fibre : fibres) {
      live += !fibre.done;
      fibre.waits = Waits::kNot;
    }
    if (live == 0) return;
    if (live != threads) refuse("some threads are at a barrier that others will never reach");
  }
}

}  // namespace

void barrier() { yield(Waits::kAtBarrier); }

double shuffle_down(double value, int offset) {
  const int own = current;
  exchanged[own] = value;
  yield(Waits::kAtShuffle);
  const double found = own % kWarp + offset < kWarp ? exchanged[own + offset] : value;
  yield(Waits::kBehindShuffle);
  return found;
}

void run_grid(long grid, int threads, void (*body)(void*), void* argument) {
  const char* order = std::getenv("FDFO_THREAD_ORDER");
  const bool backwards = order != nullptr && std::strcmp(order, "backwards") == 0;
  kernel = body;
  kernel_argument = argument;
  grid_size = {static_cast<unsigned>(grid), 1, 1};
  fibres.resize(threads);
  for (long i = 0; i < grid; ++i) {
    block_index = {static_cast<unsigned>(backwards ? grid - 1 - i : i), 0, 0};
    for (Fibre& fibre : fibres) make(fibre);
    run_block(backwards);
  }
}

}  // namespace emulated
