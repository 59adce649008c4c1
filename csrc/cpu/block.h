// Pieces that every CPU kernel is made of. Included by files that are compiled once an instruction set: nothing here
// may leave a function behind that a linker could share between them, so all is always inlined.
#pragma once

#include "kernels.h"

#if !defined(FDFO_ISA)
#error "compile with -DFDFO_ISA=generic, avx2 or avx512"
#endif

#define FDFO_INLINE static inline __attribute__((always_inline))

namespace fdfo::cpu::FDFO_ISA {

constexpr int kBlock = 256;  // elements whose noise is made together: it stays in the first-level cache
constexpr int kCounters = kBlock / 4;
constexpr int kLanes = 16;  // partial sums side by side, added in order at the end

struct Span {
  int64_t row, begin;  // elements begin..begin + count of a row
  int count;
};

FDFO_INLINE Span span(int64_t task, int64_t size, int64_t block) {
  const int64_t per_row = blocks(size, block), begin = task % per_row * block;
  return {task / per_row, begin, static_cast<int>(size - begin < block ? size - begin : block)};
}

// kBlock normals of one latent from element `begin` (a multiple of 4) on.
FDFO_INLINE void fill_normals(float* __restrict out, int64_t begin, uint32_t stream, int64_t pair, Key key) {
  const uint32_t low = static_cast<uint32_t>(pair), high = static_cast<uint32_t>(pair >> 32);
  const uint32_t first = static_cast<uint32_t>(begin / 4);
  float part[4][kCounters];
#pragma GCC ivdep
  for (uint32_t j = 0; j < kCounters; ++j) {
    const Normals n = normals({first + j, stream, low, high}, key);
    part[0][j] = n.n0;
    part[1][j] = n.n1;
    part[2][j] = n.n2;
    part[3][j] = n.n3;
  }
  for (int j = 0; j < kCounters; ++j) {
    for (int i = 0; i < 4; ++i) out[4 * j + i] = part[i][j];
  }
}

// Calls `run<T>()` with the C++ type that `number` names.
template <class Run>
FDFO_INLINE void with_type(Number number, const Run& run) {
  switch (number) {
    case Number::kFloat32:
      return run.template operator()<float>();
    case Number::kBFloat16:
      return run.template operator()<BFloat16>();
    case Number::kFloat16:
      return run.template operator()<Float16>();
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
