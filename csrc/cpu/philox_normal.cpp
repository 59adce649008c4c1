#include "block.h"

namespace fdfo::cpu::FDFO_ISA {

void philox_normal(const PhiloxNormal& a, int threads) {
  const int64_t tasks = a.rows * blocks(a.size, kBlock);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t task = 0; task < tasks; ++task) {
    const Span s = span(task, a.size, kBlock);
    float* out = a.out + s.row * a.size + s.begin;
    const uint32_t stream = static_cast<uint32_t>(a.stream[s.row]);
    if (s.count == kBlock) {
      fill_normals(out, s.begin, stream, a.pair[s.row], a.key);
    } else {
      float normal[kBlock];
      fill_normals(normal, s.begin, stream, a.pair[s.row], a.key);
      for (int i = 0; i < s.count; ++i) out[i] = normal[i];
    }
  }
}

}  // namespace fdfo::cpu::FDFO_ISA
