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

constexpr int kModulationRows = 4;  // scale and shift, twice

struct NormScratch {
  float* wide;     // [samples, kModulationRows, size]
  float* partial;  // `partial_sums(shape, kinds)` floats, kinds as `gradient_kinds` tells
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
  // partial: [blocks(batch * tokens, kHeadTokenBlock), size] for the longest of `rows`, scratch.
  void (*qk_rms_norm_backward)(const QkRmsNorm&, const HeadRows* rows, int count, double* partial, int threads);
  void (*gelu_forward)(const Gelu&, int threads);
  void (*gelu_backward)(const Gelu&, int threads);
  void (*gated_residual_forward)(const GatedResidual&, void* out, int threads);
  // dy and d_gate may be null. partial: `partial_sums(shape, 1)` floats of scratch where d_gate is not.
  void (*gated_residual_backward)(const GatedResidual&, void* dy, void* d_gate, float* partial, int threads);
  // wide: as in NormScratch.
  void (*layer_norm_modulate_forward)(const LayerNormModulate&, const NormOutputs&, float* wide, int threads);
  void (*layer_norm_modulate_backward)(const LayerNormModulate&, const NormGradients&, const NormScratch&, int threads);
};

extern const Table kGeneric, kAvx2, kAvx512;

constexpr int64_t kSumBlock = 4096;      // elements a partial sum
constexpr int64_t kTokenBlock = 32;      // tokens of one
constexpr int64_t kHeadTokenBlock = 16;  // tokens of one, for the gradient of a norm's weight

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Floats that hold the partial sums over tokens of `kinds` rows a sample.
inline int64_t partial_sums(const TokenShape& shape, int kinds) {
  return shape.samples * blocks(shape.tokens, kTokenBlock) * kinds * shape.size;
}

// Rows a sample whose gradient is a sum over tokens.
inline int gradient_kinds(const LayerNormModulate& a, const NormGradients& g) {
  return (g.d_modulation == nullptr ? 0 : a.scale[1].data == nullptr ? 2 : 4) + (g.d_gate != nullptr);
}

}  // namespace fdfo::cpu
