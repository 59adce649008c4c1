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
  bool antithetic;                   // the branches' fresh noise
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
  bool antithetic;                   // the branches' fresh noise
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
  bool antithetic;                   // the branches' fresh noise
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

// q, k or v of one stream.
struct HeadRows {
  const void* x;  // [batch, tokens, heads * size]; a backward reads it where it is normed
  int64_t x_batch, x_token;
  const void* weight;     // [size], or null: it is not normed
  bool rotary;
  int64_t tokens, first;  // `first` of its tokens among the packed ones
};

// The part of a stream, from its first token on, in a tensor that packs the streams along the tokens.
template <class T>
struct PackedRows {
  T* data;
  int64_t batch_stride, token_stride, head_stride;
};

struct HeadRowsForward {
  HeadRows rows;
  PackedRows<void> out;
};

struct HeadRowsBackward {
  HeadRows rows;
  PackedRows<const void> upstream;
  void* dx;           // [batch, tokens, heads * size] without gaps
  void* weight_grad;  // [size], or null
};

// What GELU is taken of, h + bias: contiguous [rows, size].
struct GeluInput {
  const void *h, *bias;  // bias [size] may be null
  Number number;         // of all tensors
  int64_t rows, size;
};

struct Gelu {
  GeluInput in;
  void* out;  // may be h itself
};

struct GeluBackward {
  GeluInput in;
  const void* upstream;
  void *dh, *activation;  // dh may be `upstream` itself; activation, the forward's value once more, may be null
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
  TokenRows x, y;
  SampleRows gate;
  void* out;
  TokenShape shape;
};

// The gradient of x is the upstream one.
struct GatedResidualBackward {
  TokenRows upstream;
  TokenRows y;        // null where the gate takes no gradient
  SampleRows gate;    // null where y takes none
  void *dy, *d_gate;  // [samples, tokens, size] and [samples, size]; null likewise
  TokenShape shape;
};

constexpr int kModulations = 2;  // of one norm at most: SD3.5-Medium's blocks have two

struct LayerNormModulate {
  TokenRows x;
  TokenRows y;      // with a gate
  SampleRows gate;  // null: no residual is added before
  SampleRows scale[kModulations], shift[kModulations];  // the second ones may be null
  float eps;
  void* x_new;              // with a gate
  void* out[kModulations];  // one a modulation
  float* statistics;        // [samples, tokens, 2]: mean and 1 / sqrt(var + eps); may be null
  TokenShape shape;
};

struct LayerNormModulateBackward {
  TokenRows normed_from;             // what the forward has normalised: x_new, or x without a gate
  const float* statistics;           // the forward's
  TokenRows y;                       // with a gate that takes a gradient, else null
  SampleRows gate;                   // null: no residual was added before
  SampleRows scale[kModulations];    // the second one may be null
  TokenRows upstream[kModulations];  // of each normalised output
  TokenRows upstream_x;              // of x_new, or null
  void *dx, *dy;                     // dy with a gate
  void* d_modulation;                // [kinds, samples, size]: of scale and shift of each modulation, or null
  void* d_gate;                      // [samples, size], or null
  TokenShape shape;

  // Rows a sample whose gradient is a sum over tokens: of each scale and shift, and of the gate.
  int kinds() const { return (d_modulation == nullptr ? 0 : scale[1].data == nullptr ? 2 : 4) + (d_gate != nullptr); }
};

}  // namespace fdfo
