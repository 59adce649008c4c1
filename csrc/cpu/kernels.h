// The CPU implementations, one table an instruction set; binding.cpp picks one at run time.
//
// Work is cut into blocks of fixed size whatever the number of threads, and sums of blocks are added in order: results
// repeat bit for bit, and are the same on every instruction set.
#pragma once

#include "fdfo/arguments.h"

namespace fdfo::cpu {

struct LossOutputs {
  const double* advantage;  // [rows]
  double clip_range, normalizer;
  double* loss;  // [rows], terms of the sum
  float* log_ratio;
  double* scale;  // dL/dv = scale * (e + u)
  void* grad;     // [rows, size] of v's type, for an upstream factor of 1; or null
};

struct Table {
  const char* name;
#define KERNEL(name, ...) void (*name)(__VA_ARGS__);
#include "kernel_list.h"
#undef KERNEL
};

extern const Table kGeneric, kAvx2, kAvx512;

constexpr int64_t kSumBlock = 4096;      // elements a partial sum
constexpr int64_t kTokenBlock = 32;      // tokens of one
constexpr int64_t kHeadTokenBlock = 16;  // tokens of one, for the gradient of a norm's weight
constexpr int kModulationRows = 2 * kModulations;  // scale and shift of each

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Floats that hold the partial sums over tokens of `kinds` rows a sample.
inline int64_t partial_sums(const TokenShape& shape, int kinds) {
  return shape.samples * blocks(shape.tokens, kTokenBlock) * kinds * shape.size;
}

}  // namespace fdfo::cpu
