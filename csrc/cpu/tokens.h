// Loops over the tokens of a transformer block. Like block.h, all is always inlined.
#pragma once

#include "vector.h"

namespace fdfo::cpu::FDFO_ISA {

// Calls `body(sample, block, first, last)` for blocks of `length` tokens, on `threads` threads.
template <class Body>
FDFO_INLINE void token_blocks(const TokenShape& shape, int64_t length, int threads, const Body& body) {
  const int64_t per_sample = blocks(shape.tokens, length), tasks = shape.samples * per_sample;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t block = task % per_sample, first = block * length, last = first + length;
    body(task / per_sample, block, first, last < shape.tokens ? last : shape.tokens);
  }
}

// Adds partial sums, [samples, blocks, kinds, size], in order: element `kind` of a block goes to out(kind, sample).
template <class T, class Out>
FDFO_INLINE void add_partials(const TokenShape& shape, const float* partial, int kinds, int threads, const Out& out) {
  const int64_t per_sample = blocks(shape.tokens, kTokenBlock), tasks = shape.samples * kinds;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t sample = task / kinds, kind = task % kinds;
    T* to = out(kind, sample);
    each(shape.size, [&]<class V>(int64_t i, int) {
      V sum{};
      for (int64_t block = 0; block < per_sample; ++block) {
        sum += load<V>(partial + ((sample * per_sample + block) * kinds + kind) * shape.size + i);
      }
      store(to + i, sum);
    });
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
