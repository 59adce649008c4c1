#include "block.h"

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

// In double: the square of any float stays finite, and a sum loses nothing.
template <class T, class O>
FDFO_INLINE void sums(const Row<T, O>& r, int count, double* __restrict out) {
  double ee[kLanes] = {}, eu[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const double e = static_cast<double>(to_float(r.v[i + l])) - static_cast<double>(to_float(r.v_old[i + l]));
      ee[l] += e * e;
      eu[l] += e * static_cast<double>(r.u[i + l]);
    }
  }
  for (int l = 0; i < count; ++i, ++l) {
    const double e = static_cast<double>(to_float(r.v[i])) - static_cast<double>(to_float(r.v_old[i]));
    ee[l] += e * e;
    eu[l] += e * static_cast<double>(r.u[i]);
  }
  out[0] = out[1] = 0;
  for (int l = 0; l < kLanes; ++l) {
    out[0] += ee[l];
    out[1] += static_cast<double>(r.sign) * eu[l];
  }
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

void fdfo_loss_sums(const FdfoLoss& a, double* partial, int threads) {
  const int64_t tasks = a.rows * blocks(a.size, kSumBlock);
  with_types(a, [&]<class T, class O>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
      const Span s = span(task, a.size, kSumBlock);
      sums(row_of<T, O>(a, s), s.count, partial + 2 * task);
    }
  });
}

void fdfo_loss_gradient(const FdfoLoss& a, const double* scale, void* grad, int threads) {
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
