// What every implementation of an op is handed: addresses and sizes that the Python side has checked. Strides are in
// elements, of tensors whose latents are contiguous. On a GPU every address is the device's.
#pragma once

#include "fdfo/philox.h"
#include "fdfo/trajectory.h"

namespace fdfo {

enum class Number : int { kFloat32, kBFloat16, kFloat16 };

// A [P, 2, *shape] tensor.
template <class T>
struct PairedRows {
  T* data;
  int64_t pair_stride, branch_stride;

  FDFO_HD T* row(int64_t pair, int64_t branch) const { return data + pair * pair_stride + branch * branch_stride; }

  template <class U>
  FDFO_HD PairedRows<U> as() const {
    return {static_cast<U*>(data), pair_stride, branch_stride};
  }
};

struct PhiloxNormal {
  float* out;             // [rows, size]
  const int64_t* pair;    // [rows]
  const int64_t* stream;  // [rows]
  int64_t rows, size;
  Key key;
};

struct PairedNoise {
  float* out;                        // [pairs, 2, size]
  const int64_t* pair;               // [pairs]
  const Coefficients* coefficients;  // [pairs]
  int64_t pairs, size;
  Key key;
};

struct PairedStep {
  PairedRows<const float> x;
  PairedRows<const void> v, v_uncond;  // v_uncond.data may be null
  PairedRows<void> v_out;              // likewise
  PairedRows<float> out;
  Number number;                     // of the velocities
  const int64_t* pair;               // [pairs]
  const Coefficients* coefficients;  // [pairs]
  float guidance_scale;
  int64_t pairs, size;
  uint32_t step;
  Key key;
};

struct Replay {
  PairedRows<const void> velocities;  // [P, 2, T, *shape]
  int64_t step_stride;
  Number number;
  float* out;                        // [items, size]
  const int64_t *index, *branch;     // [rows]: which trajectories are walked
  const int64_t* pair;               // [rows]: global pair of each
  const int64_t* last;               // [rows]: how far
  const int64_t* wanted;             // [rows, steps + 1]: row of `out` that step k goes to, or -1
  const Coefficients* coefficients;  // [rows, steps + 1]: of the prior, then of each step
  int64_t rows, steps, size;
  Key key;
};

struct PairDirection {
  PairedRows<const float> x;
  float* out;
  int64_t out_stride, pairs, size;
  double floor;
};

struct FdfoLoss {
  const void *v, *v_old;
  Number number, number_old;
  int64_t v_stride, v_old_stride;
  const float* u;
  int64_t u_stride;
  const int64_t *pair, *branch;  // [rows]: row of u, and where to negate it
  int64_t rows, size;
};

constexpr int kMaxHeadSize = 256;

struct QkRmsNorm {
  Number number, weight_number;  // weight_number: as `number`, or float32
  const float *cos, *sin;        // [packed tokens, size], or null
  int64_t batch, heads, size;    // size: of one head
  float eps;
};

// q, k or v of one stream and its place in the tensor that packs the streams along the tokens.
struct HeadRows {
  const void* x;  // [batch, tokens, heads * size]
  int64_t x_batch, x_token;
  void* packed;  // from the stream's first token on: the output of the forward, its gradient in the backward
  int64_t packed_batch, packed_token, packed_head;
  const void* weight;     // [size], or null: it is not normed
  bool rotary;
  int64_t tokens, first;  // `first` of the packed tokens
  void* grad;             // backward: of x, [batch, tokens, heads * size] without gaps
  void* weight_grad;      // backward: [size], or null
};

// Contiguous [rows, size] tensors of one number type; out may be h or grad itself.
struct Gelu {
  const void *h, *bias, *grad;  // bias [size] may be null; grad is the backward's alone
  void *out, *activation;       // activation, the forward's value once more from a backward, may be null
  Number number;
  int64_t rows, size;
};

// [samples, tokens, size], a token's elements contiguous. `data` may be null.
struct TokenRows {
  const void* data;
  int64_t sample_stride, token_stride;

  template <class T>
  FDFO_HD const T* row(int64_t sample, int64_t token) const {
    return static_cast<const T*>(data) + sample * sample_stride + token * token_stride;
  }
};

// [samples, size]. `data` may be null.
struct SampleRows {
  const void* data;
  int64_t stride;

  template <class T>
  FDFO_HD const T* row(int64_t sample) const {
    return static_cast<const T*>(data) + sample * stride;
  }
};

struct TokenShape {
  int64_t samples, tokens, size;
  Number number;  // of all tensors but statistics
};

struct GatedResidual {
  TokenRows x, y;  // in a backward x is the upstream gradient, and y.data is null where the gate takes no gradient
  SampleRows gate;
  TokenShape shape;
};

struct LayerNormModulate {
  TokenRows x;      // in a backward what was normalised
  TokenRows y;      // with a gate; in a backward null where the gate takes no gradient
  SampleRows gate;  // null: no residual is added before
  SampleRows scale[2], shift[2];  // the second ones may be null; in a backward there is no shift
  float* statistics;              // [samples, tokens, 2]: mean and 1 / sqrt(var + eps); may be null in a forward
  float eps;
  TokenShape shape;
};

struct NormOutputs {
  void* x_new;   // with a gate
  void* out[2];  // one a modulation
};

struct NormGradients {
  TokenRows upstream[2];  // of each normalised output
  TokenRows upstream_x;   // of x_new, or null
  void *dx, *dy;          // dy with a gate
  void* d_modulation;     // [kinds, samples, size]: of scale and shift of each modulation, or null
  void* d_gate;           // [samples, size], or null
};

}  // namespace fdfo
