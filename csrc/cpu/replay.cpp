#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

// Walks one block of one trajectory from its noise on, and writes it out at every step that is wanted.
template <class T>
FDFO_INLINE void walk(const Replay& a, const Span& s) {
  const int64_t pair = a.pair[s.row];
  const int64_t* wanted = a.wanted + s.row * (a.steps + 1);
  const Coefficients* coefficients = a.coefficients + s.row * (a.steps + 1);
  const T* v = a.velocities.as<const T>().row(a.index[s.row], a.branch[s.row]) + s.begin;
  const uint32_t branch = static_cast<uint32_t>(a.branch[s.row]);
  float x[kBlock], eps[kBlock];
  fill_normals(x, s.begin, kSharedStream, pair, a.key);
  for (int64_t k = 0; k <= a.last[s.row]; ++k) {
    const Coefficients c = of_branch(coefficients[k], branch, a.antithetic);
    if (k > 0) {
      const T* used = v + (k - 1) * a.step_stride;
      for (int i = 0; i < s.count; ++i) x[i] = overshoot(x[i], to_float(used[i]), c);
    }
    if (c.churned()) {
      const uint32_t stream = churn_stream(static_cast<uint32_t>(k), noise_branch(branch, a.antithetic));
      fill_normals(eps, s.begin, stream, pair, a.key);
      for (int i = 0; i < s.count; ++i) x[i] = renoise(x[i], eps[i], c);
    }
    if (wanted[k] >= 0) {
      float* out = a.out + wanted[k] * a.size + s.begin;
      for (int i = 0; i < s.count; ++i) out[i] = x[i];
    }
  }
}

void replay(const Replay& a, int threads) {
  const int64_t tasks = a.rows * blocks(a.size, kBlock);
  with_type(a.number, [&]<class T>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) walk<T>(a, span(task, a.size, kBlock));
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
