#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

FDFO_INLINE float half_difference(const float* a, const float* b, int i) { return (a[i] - b[i]) / 2; }

FDFO_INLINE double sum_of_squares(const float* a, const float* b, int count) {
  double lanes[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) {
      const float d = half_difference(a, b, i + l);
      lanes[l] += d * d;
    }
  }
  for (int l = 0; i < count; ++i, ++l) {
    const float d = half_difference(a, b, i);
    lanes[l] += d * d;
  }
  double sum = 0;
  for (int l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

void pair_direction(const PairDirection& a, double* partial, int threads) {
  const int64_t per_row = blocks(a.size, kSumBlock), tasks = a.pairs * per_row;
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const Span s = span(task, a.size, kSumBlock);
      partial[task] = sum_of_squares(a.x.row(s.row, 0) + s.begin, a.x.row(s.row, 1) + s.begin, s.count);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const Span s = span(task, a.size, kSumBlock);
      double sum = 0;
      for (int64_t block = 0; block < per_row; ++block) sum += partial[s.row * per_row + block];
      const float scale = static_cast<float>(sum / static_cast<double>(a.size) + a.floor);
      const float *x = a.x.row(s.row, 0) + s.begin, *y = a.x.row(s.row, 1) + s.begin;
      float* out = a.out + s.row * a.out_stride + s.begin;
      for (int i = 0; i < s.count; ++i) out[i] = half_difference(x, y, i) / scale;
    }
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
