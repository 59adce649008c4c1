// The CUDA implementations. Each launches on `stream` (a cudaStream_t) of the current device and returns null, or what
// CUDA says went wrong with the launch.
#pragma once

#include "fdfo/arguments.h"

namespace fdfo::cuda {

// What the CUDA runtime linked here says against this machine (a driver too old for it, no device), or null.
const char* probe();

const char* philox_normal(const PhiloxNormal&, void* stream);
const char* paired_noise(const PairedNoise&, void* stream);
const char* paired_step(const PairedStep&, void* stream);
const char* replay(const Replay&, void* stream);
const char* pair_direction(const PairDirection&, void* stream);

constexpr int64_t kSumBlock = 4096;  // elements a partial sum of the loss

struct FdfoLossOutputs {
  const void* advantage;  // [rows], double or float
  bool advantage_is_double;
  double clip_range, normalizer;
  double* partial;   // [rows, blocks of kSumBlock, 2], scratch
  uint32_t* ticket;  // 0 before and after: which block of the grid is the last
  double* scale;     // [rows]: dL/dv = scale * (e + u)
  float *loss, *log_ratio;
};

const char* fdfo_loss_forward(const FdfoLoss&, const FdfoLossOutputs&, void* stream);
// grad [rows, size] of v's type; `upstream` is one float on the device.
const char* fdfo_loss_backward(const FdfoLoss&, const double* scale, const float* upstream, void* grad, void* stream);

}  // namespace fdfo::cuda
