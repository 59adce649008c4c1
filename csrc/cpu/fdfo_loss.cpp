#include "block.h"
#include "fdfo/loss.h"

namespace fdfo::cpu::FDFO_ISA {

template <class T, class O>
struct Row {
  const T* v;
  const O* v_old;
  const float* u;
  float sign;
};

template <class T, class O>
FDFO_INLINE Row<T, O> row_of(const FdfoLoss& a, const Span& s) {
  return {static_cast<const T*>(a.v) + s.row * a.v_stride + s.begin,
          static_cast<const O*>(a.v_old) + s.row * a.v_old_stride + s.begin,
          a.u + a.pair[s.row] * a.u_stride + s.begin, a.branch[s.row] ? -1.0f : 1.0f};
}

// Products and sums of two in float, a rounding of 6e-8 each; all further sums in double, where they lose nothing.
template <class T, class O>
FDFO_INLINE int fast_sums(const Row<T, O>& r, int count, double* __restrict out) {
  Double8 ee[2] = {}, eu[2] = {};
  int i = 0;
  for (; i + 32 <= count; i += 32) {
    for (int half = 0; half < 2; ++half) {
      const int at = i + 16 * half;
      const Float8 e0 = load8(r.v + at) - load8(r.v_old + at), e1 = load8(r.v + at + 8) - load8(r.v_old + at + 8);
      ee[half] += to_double(e0 * e0 + e1 * e1);
      eu[half] += to_double(e0 * load8(r.u + at) + e1 * load8(r.u + at + 8));
    }
  }
  for (int l = 0; l < 8; ++l) {
    out[0] += ee[0][l] + ee[1][l];
    out[1] += eu[0][l] + eu[1][l];
  }
  return i;
}

// In double alone: the square of any float stays finite.
template <class T, class O>
FDFO_INLINE void exact_sums(const Row<T, O>& r, int begin, int count, double* __restrict out) {
  for (int i = begin; i < count; ++i) {
    const double e = static_cast<double>(to_float(r.v[i])) - static_cast<double>(to_float(r.v_old[i]));
    out[0] += e * e;
    out[1] += e * static_cast<double>(r.u[i]);
  }
}

template <class T, class O>
FDFO_INLINE void sums(const Row<T, O>& r, int count, double* __restrict out) {
  out[0] = out[1] = 0;
  int done = fast_sums(r, count, out);
  if (!(out[0] < INFINITY && out[1] - out[1] == 0)) out[0] = out[1] = done = 0;  // a float overflowed
  exact_sums(r, done, count, out);
  out[1] *= static_cast<double>(r.sign);
}

template <class T, class O>
FDFO_INLINE void gradient(const Row<T, O>& r, int count, double scale, T* __restrict grad) {
  const float by = static_cast<float>(scale);
  if (by == 0) {  // e may be infinite here
    for (int i = 0; i < count; ++i) grad[i] = from_float<T>(0.0f);
    return;
  }
  for (int i = 0; i < count; ++i) {
    grad[i] = from_float<T>(by * (to_float(r.v[i]) - to_float(r.v_old[i]) + r.sign * r.u[i]));
  }
}

// Calls `run<T, O>()` with the types of v and v_old.
template <class Run>
FDFO_INLINE void with_types(const FdfoLoss& a, const Run& run) {
  with_type(a.number, [&]<class T>() {
    with_type(a.number_old, [&]<class O>() { run.template operator()<T, O>(); });
  });
}

// One row from its sums, added block by block, to its gradient while it is still in the cache.
template <class T, class O>
FDFO_INLINE void whole_row(const FdfoLoss& a, const LossOutputs& o, int64_t row) {
  double ee = 0, eu = 0;
  for (int64_t begin = 0; begin < a.size; begin += kSumBlock) {
    const Span s = span(row * blocks(a.size, kSumBlock) + begin / kSumBlock, a.size, kSumBlock);
    double partial[2];
    sums(row_of<T, O>(a, s), s.count, partial);
    ee += partial[0];
    eu += partial[1];
  }
  const double n = static_cast<double>(a.size);
  const LossRow found = loss_row(ee / n, eu / n, o.advantage[row], o.clip_range, n);
  o.loss[row] = found.loss / o.normalizer;
  o.log_ratio[row] = static_cast<float>(found.log_ratio);
  o.scale[row] = found.scale / o.normalizer;
  if (o.grad == nullptr) return;
  for (int64_t begin = 0; begin < a.size; begin += kSumBlock) {
    const Span s = span(row * blocks(a.size, kSumBlock) + begin / kSumBlock, a.size, kSumBlock);
    gradient(row_of<T, O>(a, s), s.count, o.scale[row], static_cast<T*>(o.grad) + row * a.size + s.begin);
  }
}

void fdfo_loss_forward(const FdfoLoss& a, const LossOutputs& o, int threads) {
  with_types(a, [&]<class T, class O>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < a.rows; ++row) whole_row<T, O>(a, o, row);
  });
}

void fdfo_loss_backward(const FdfoLoss& a, const double* scale, void* grad, int threads) {
  const int64_t tasks = a.rows * blocks(a.size, kSumBlock);
  with_types(a, [&]<class T, class O>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
      const Span s = span(task, a.size, kSumBlock);
      gradient(row_of<T, O>(a, s), s.count, scale[s.row], static_cast<T*>(grad) + s.row * a.size + s.begin);
    }
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
