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
  void (*philox_normal)(const PhiloxNormal&, int threads);
  void (*paired_noise)(const PairedNoise&, int threads);
  void (*paired_step)(const PairedStep&, int threads);
  void (*replay)(const Replay&, int threads);
  // partial: [pairs, blocks(size, kSumBlock)], scratch.
  void (*pair_direction)(const PairDirection&, double* partial, int threads);
  void (*fdfo_loss_forward)(const FdfoLoss&, const LossOutputs&, int threads);
  // grad [rows, size] of v's type: scale[row] * (e + u), exactly 0 where the scale is.
  void (*fdfo_loss_backward)(const FdfoLoss&, const double* scale, void* grad, int threads);
  void (*qk_rms_norm_forward)(const QkRmsNorm&, const HeadRows* rows, int count, int threads);
  // partial: [blocks(batch * tokens, kTokenBlock), size] for the longest of `rows`, scratch.
  void (*qk_rms_norm_backward)(const QkRmsNorm&, const HeadRows* rows, int count, double* partial, int threads);
  void (*gelu_forward)(const Gelu&, int threads);
  void (*gelu_backward)(const Gelu&, int threads);
};

extern const Table kGeneric, kAvx2, kAvx512;

constexpr int64_t kSumBlock = 4096;  // elements a partial sum
constexpr int64_t kTokenBlock = 16;  // tokens of one, for the gradient of a norm's weight

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

}  // namespace fdfo::cpu
