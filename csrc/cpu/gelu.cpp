#include "block.h"
#include "fdfo/gelu.h"

namespace fdfo::cpu::FDFO_ISA {

template <class T>
FDFO_INLINE void load(const T* __restrict from, int count, float* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] = to_float(from[i]);
}

template <class T>
FDFO_INLINE void store(const float* __restrict from, int count, T* __restrict to) {
  for (int i = 0; i < count; ++i) to[i] = from_float<T>(from[i]);
}

// h + bias of one block. Blocks go through the first-level cache, since input and output may be one memory.
template <class T>
FDFO_INLINE void load_biased(const GeluInput& a, const Span& s, float* __restrict h) {
  load(static_cast<const T*>(a.h) + s.row * a.size + s.begin, s.count, h);
  if (a.bias == nullptr) return;
  const T* bias = static_cast<const T*>(a.bias) + s.begin;
  for (int i = 0; i < s.count; ++i) h[i] += to_float(bias[i]);
}

template <class T>
FDFO_INLINE void forward_block(const Gelu& a, const Span& s) {
  float h[kBlock];
  load_biased<T>(a.in, s, h);
  for (int i = 0; i < s.count; ++i) h[i] = gelu(h[i]).value;
  store(h, s.count, static_cast<T*>(a.out) + s.row * a.in.size + s.begin);
}

template <class T>
FDFO_INLINE void backward_block(const GeluBackward& a, const Span& s) {
  const int64_t at = s.row * a.in.size + s.begin;
  float h[kBlock], grad[kBlock];
  load_biased<T>(a.in, s, h);
  load(static_cast<const T*>(a.upstream) + at, s.count, grad);
  for (int i = 0; i < s.count; ++i) {
    const GeluPoint point = gelu(h[i]);
    grad[i] *= point.slope;
    h[i] = point.value;
  }
  store(grad, s.count, static_cast<T*>(a.dh) + at);
  if (a.activation != nullptr) store(h, s.count, static_cast<T*>(a.activation) + at);
}

void gelu_forward(const Gelu& a, int threads) {
  const int64_t tasks = a.in.rows * blocks(a.in.size, kBlock);
  with_type(a.in.number, [&]<class T>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) forward_block<T>(a, span(task, a.in.size, kBlock));
  });
}

void gelu_backward(const GeluBackward& a, int threads) {
  const int64_t tasks = a.in.rows * blocks(a.in.size, kBlock);
  with_type(a.in.number, [&]<class T>() {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task) backward_block<T>(a, span(task, a.in.size, kBlock));
  });
}

}  // namespace fdfo::cpu::FDFO_ISA
