#include "fdfo/loss.h"
#include "launch.cuh"

namespace fdfo::cuda {

static_assert(kSumBlock % kBlock == 0, "a partial sum is whole rounds of a thread block");

template <class T, class O>
struct Row {
  const T* v;
  const O* v_old;
  const float* u;
  float sign;
};

template <class T, class O>
__device__ inline Row<T, O> row_of(const FdfoLoss& a, int64_t row) {
  return {static_cast<const T*>(a.v) + row * a.v_stride, static_cast<const O*>(a.v_old) + row * a.v_old_stride,
          a.u + a.pair[row] * a.u_stride, a.branch[row] ? -1.0f : 1.0f};
}

// The last thread block of the grid turns the partial sums into rows and the loss, in a fixed order.
__device__ inline void finish(const FdfoLoss& a, const FdfoLossOutputs& o) {
  const int64_t per_row = blocks(a.size, kSumBlock);
  double mine = 0;
  for (int64_t row = threadIdx.x; row < a.rows; row += kThreads) {
    double ee = 0, eu = 0;
    for (int64_t block = row * per_row; block < (row + 1) * per_row; ++block) {
      ee += __ldcg(o.partial + 2 * block);
      eu += __ldcg(o.partial + 2 * block + 1);
    }
    const double n = static_cast<double>(a.size);
    const double advantage = o.advantage_is_double ? static_cast<const double*>(o.advantage)[row]
                                                   : static_cast<const float*>(o.advantage)[row];
    const LossRow found = loss_row(ee / n, eu / n, advantage, o.clip_range, n);
    o.log_ratio[row] = static_cast<float>(found.log_ratio);
    o.scale[row] = found.scale / o.normalizer;
    mine += found.loss;
  }
  const double sum = block_sum(mine);
  if (threadIdx.x == 0) {
    *o.loss = static_cast<float>(sum / o.normalizer);
    *o.ticket = 0;
  }
}

// grid: rows * blocks(size, kSumBlock); the ticket only tells which thread block comes last, so sums don't depend on it
template <class T, class O>
__global__ void __launch_bounds__(kThreads) fdfo_loss_forward_kernel(const FdfoLoss a, const FdfoLossOutputs o) {
  __shared__ bool is_last;
  const int64_t per_row = blocks(a.size, kSumBlock), row = blockIdx.x / per_row;
  const int64_t first = (blockIdx.x - row * per_row) * kSumBlock;
  const Row<T, O> r = row_of<T, O>(a, row);
  double ee = 0, eu = 0;
  for (int64_t round = 0; round < kSumBlock; round += kBlock) {
    const int64_t begin = first + round + threadIdx.x * kFour, left = a.size - begin;
    if (left <= 0) break;
    const Four<T> v = load(r.v + begin, left);
    const Four<O> v_old = load(r.v_old + begin, left);
    const Four<float> u = load(r.u + begin, left);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      const double e = static_cast<double>(to_float(v.v[i])) - static_cast<double>(to_float(v_old.v[i]));
      ee += e * e;
      eu += e * static_cast<double>(u.v[i]);
    }
  }
  const double sum_ee = block_sum(ee), sum_eu = block_sum(eu);
  if (threadIdx.x == 0) {
    o.partial[2 * static_cast<int64_t>(blockIdx.x)] = sum_ee;
    o.partial[2 * static_cast<int64_t>(blockIdx.x) + 1] = r.sign * sum_eu;
    __threadfence();
    is_last = atomicAdd(o.ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    finish(a, o);
  }
}

// grid: rows * blocks(size, kBlock)
template <class T, class O>
__global__ void __launch_bounds__(kThreads)
    fdfo_loss_backward_kernel(const FdfoLoss a, const double* scale, const float* upstream, T* grad) {
  const Place p = place(a.size);
  if (p.begin >= a.size) return;
  const int64_t left = a.size - p.begin;
  const Row<T, O> r = row_of<T, O>(a, p.row);
  const float by = static_cast<float>(scale[p.row] * *upstream);
  Four<T> out{};  // exactly 0 where the scale is: e may be infinite there
  if (by != 0) {
    const Four<T> v = load(r.v + p.begin, left);
    const Four<O> v_old = load(r.v_old + p.begin, left);
    const Four<float> u = load(r.u + p.begin, left);
#pragma unroll
    for (int i = 0; i < kFour; ++i) {
      out.v[i] = from_float<T>(by * (to_float(v.v[i]) - to_float(v_old.v[i]) + r.sign * u.v[i]));
    }
  }
  store(grad + p.row * a.size + p.begin, out, left);
}

template <class Run>
void with_types(const FdfoLoss& a, const Run& run) {
  with_type(a.number, [&]<class T>() {
    with_type(a.number_old, [&]<class O>() { run.template operator()<T, O>(); });
  });
}

const char* fdfo_loss_forward(const FdfoLoss& a, const FdfoLossOutputs& o, void* stream) {
  with_types(a, [&]<class T, class O>() {
    const int64_t grid = a.rows * blocks(a.size, kSumBlock);
    fdfo_loss_forward_kernel<T, O><<<grid, kThreads, 0, as_stream(stream)>>>(a, o);
  });
  return launch_error();
}

const char* fdfo_loss_backward(const FdfoLoss& a, const double* scale, const float* upstream, void* grad,
                               void* stream) {
  with_types(a, [&]<class T, class O>() {
    const int64_t grid = a.rows * blocks(a.size, kBlock);
    fdfo_loss_backward_kernel<T, O>
        <<<grid, kThreads, 0, as_stream(stream)>>>(a, scale, upstream, static_cast<T*>(grad));
  });
  return launch_error();
}

}  // namespace fdfo::cuda
