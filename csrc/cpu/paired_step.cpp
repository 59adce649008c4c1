#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

// The velocity of a block: guided where there is an unconditional one, kept where it is wanted.
template <class T>
FDFO_INLINE void velocity(const PairedStep& a, const Span& s, int64_t branch, float* __restrict used) {
  const T* own = a.v.as<const T>().row(s.row, branch) + s.begin;
  T rounded[kBlock];
  if (a.v_uncond.data != nullptr) {
    const T* uncond = a.v_uncond.as<const T>().row(s.row, branch) + s.begin;
    for (int i = 0; i < s.count; ++i) rounded[i] = guided(own[i], uncond[i], a.guidance_scale);
  } else {
    for (int i = 0; i < s.count; ++i) rounded[i] = own[i];
  }
  for (int i = 0; i < s.count; ++i) used[i] = to_float(rounded[i]);
  if (a.v_out.data != nullptr) {
    T* kept = a.v_out.as<T>().row(s.row, branch) + s.begin;
    for (int i = 0; i < s.count; ++i) kept[i] = rounded[i];
  }
}

template <class T>
FDFO_INLINE void step_block(const PairedStep& a, const Span& s, uint32_t branch) {
  const Coefficients c = of_branch(a.coefficients[s.row], branch, a.antithetic);
  float x[kBlock], v[kBlock], eps[kBlock];
  velocity<T>(a, s, branch, v);
  const float* from = a.x.row(s.row, branch) + s.begin;  // copied first: `out` may be the same memory
  for (int i = 0; i < s.count; ++i) x[i] = from[i];
  float* out = a.out.row(s.row, branch) + s.begin;
  if (c.churned()) {
    const uint32_t stream = churn_stream(a.step + 1, noise_branch(branch, a.antithetic));
    fill_normals(eps, s.begin, stream, a.pair[s.row], a.key);
    for (int i = 0; i < s.count; ++i) out[i] = renoise(overshoot(x[i], v[i], c), eps[i], c);
  } else {
    for (int i = 0; i < s.count; ++i) out[i] = overshoot(x[i], v[i], c);
  }
}

void paired_step(const PairedStep& a, int threads) {
  const int64_t tasks = a.pairs * blocks(a.size, kBlock);
  with_type(a.number, [&]<class T>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) {
      const Span s = span(task, a.size, kBlock);
      for (uint32_t branch = 0; branch < 2; ++branch) step_block<T>(a, s, branch);
    }
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
