// The arguments of ops as Python makes them: addresses, sizes and strides, each by its name. For binding.cpp alone.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>

#include "fdfo/arguments.h"

namespace py = pybind11;

namespace {

using namespace fdfo;
using Address = std::uintptr_t;
using Strided = std::tuple<Address, std::int64_t, std::int64_t>;  // address, strides of the first two axes
using Row = std::tuple<Address, std::int64_t>;                    // address, stride of samples
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
using Seed = std::tuple<std::uint32_t, std::uint32_t>;            // low and high word
using Packed = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;  // address, strides of batch, token, head

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
PairedRows<T> rows(const Strided& r) {
  return {at<T>(std::get<0>(r)), std::get<1>(r), std::get<2>(r)};
}

Key key(const Seed& seed) { return {std::get<0>(seed), std::get<1>(seed)}; }

PhiloxNormal philox_normal(Address out, Address pair, Address stream, std::int64_t rows, std::int64_t size, Seed seed) {
  return {at<float>(out), at<const std::int64_t>(pair), at<const std::int64_t>(stream), rows, size, key(seed)};
}

PairedNoise paired_noise(Address out, Address pair, Address coefficients, bool antithetic, std::int64_t pairs,
                         std::int64_t size, Seed seed) {
  return {at<float>(out), at<const std::int64_t>(pair), at<const Coefficients>(coefficients), antithetic, pairs, size,
          key(seed)};
}

PairedStep paired_step(Strided x, Strided v, Strided v_uncond, Strided v_out, Strided out, int number, Address pair,
                       Address coefficients, bool antithetic, float guidance_scale, std::int64_t pairs,
                       std::int64_t size, std::uint32_t step, Seed seed) {
  return {rows<const float>(x),
          rows<const void>(v),
          rows<const void>(v_uncond),
          rows<void>(v_out),
          rows<float>(out),
          static_cast<Number>(number),
          at<const std::int64_t>(pair),
          at<const Coefficients>(coefficients),
          antithetic,
          guidance_scale,
          pairs,
          size,
          step,
          key(seed)};
}

Replay replay(Strided velocities, std::int64_t step_stride, int number, Address out, Address index, Address branch,
              Address pair, Address last, Address wanted, Address coefficients, bool antithetic,
              std::int64_t row_count, std::int64_t steps, std::int64_t size, Seed seed) {
  return {rows<const void>(velocities),
          step_stride,
          static_cast<Number>(number),
          at<float>(out),
          at<const std::int64_t>(index),
          at<const std::int64_t>(branch),
          at<const std::int64_t>(pair),
          at<const std::int64_t>(last),
          at<const std::int64_t>(wanted),
          at<const Coefficients>(coefficients),
          antithetic,
          row_count,
          steps,
          size,
          key(seed)};
}

PairDirection pair_direction(Strided x, Address out, std::int64_t out_stride, std::int64_t pairs, std::int64_t size,
                             double floor) {
  return {rows<const float>(x), at<float>(out), out_stride, pairs, size, floor};
}

FdfoLoss fdfo_loss(Address v, Address v_old, int number, int number_old, std::int64_t v_stride,
                   std::int64_t v_old_stride, Address u, std::int64_t u_stride, Address pair, Address branch,
                   std::int64_t rows, std::int64_t size) {
  return {at<const void>(v),
          at<const void>(v_old),
          static_cast<Number>(number),
          static_cast<Number>(number_old),
          v_stride,
          v_old_stride,
          at<const float>(u),
          u_stride,
          at<const std::int64_t>(pair),
          at<const std::int64_t>(branch),
          rows,
          size};
}

QkRmsNorm qk_rms_norm(int number, int weight_number, Address cos, Address sin, std::int64_t batch, std::int64_t heads,
                      std::int64_t size, float eps) {
  return {static_cast<Number>(number),
          static_cast<Number>(weight_number),
          at<const float>(cos),
          at<const float>(sin),
          batch,
          heads,
          size,
          eps};
}

HeadRows head_rows(const Strided& x, Address weight, bool rotary, std::int64_t tokens, std::int64_t first) {
  const auto [address, batch, token] = x;
  return {at<const void>(address), batch, token, at<const void>(weight), rotary, tokens, first};
}

template <class T>
PackedRows<T> packed_rows(const Packed& p) {
  return {at<T>(std::get<0>(p)), std::get<1>(p), std::get<2>(p), std::get<3>(p)};
}

HeadRowsForward head_rows_forward(const HeadRows& rows, const Packed& out) { return {rows, packed_rows<void>(out)}; }

HeadRowsBackward head_rows_backward(const HeadRows& rows, const Packed& upstream, Address dx, Address weight_grad) {
  return {rows, packed_rows<const void>(upstream), at<void>(dx), at<void>(weight_grad)};
}

GeluInput gelu_input(Address h, Address bias, int number, std::int64_t rows, std::int64_t size) {
  return {at<const void>(h), at<const void>(bias), static_cast<Number>(number), rows, size};
}

Gelu gelu(const GeluInput& in, Address out) { return {in, at<void>(out)}; }

GeluBackward gelu_backward(const GeluInput& in, Address upstream, Address dh, Address activation) {
  return {in, at<const void>(upstream), at<void>(dh), at<void>(activation)};
}

TokenRows token_rows(const Strided& t) { return {at<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

SampleRows sample_rows(const Row& r) { return {at<const void>(std::get<0>(r)), std::get<1>(r)}; }

TokenShape token_shape(const Shape& s, int number) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), static_cast<Number>(number)};
}

GatedResidual gated_residual(const Strided& x, const Strided& y, const Row& gate, Address out, const Shape& shape,
                             int number) {
  return {token_rows(x), token_rows(y), sample_rows(gate), at<void>(out), token_shape(shape, number)};
}

GatedResidualBackward gated_residual_backward(const Strided& upstream, const Strided& y, const Row& gate, Address dy,
                                              Address d_gate, const Shape& shape, int number) {
  return {token_rows(upstream), token_rows(y),    sample_rows(gate),
          at<void>(dy),         at<void>(d_gate), token_shape(shape, number)};
}

LayerNormModulate layer_norm_modulate(const Strided& x, const Strided& y, const Row& gate, const Row& scale,
                                      const Row& shift, const Row& scale2, const Row& shift2, float eps, Address x_new,
                                      Address out, Address out2, Address statistics, const Shape& shape, int number) {
  return {token_rows(x),
          token_rows(y),
          sample_rows(gate),
          {sample_rows(scale), sample_rows(scale2)},
          {sample_rows(shift), sample_rows(shift2)},
          eps,
          at<void>(x_new),
          {at<void>(out), at<void>(out2)},
          at<float>(statistics),
          token_shape(shape, number)};
}

LayerNormModulateBackward layer_norm_modulate_backward(
    const Strided& normed_from, Address statistics, const Strided& y, const Row& gate, const Row& scale,
    const Row& scale2, const Strided& upstream, const Strided& upstream2, const Strided& upstream_x, Address dx,
    Address dy, Address d_modulation, Address d_gate, const Shape& shape, int number) {
  return {token_rows(normed_from),
          at<const float>(statistics),
          token_rows(y),
          sample_rows(gate),
          {sample_rows(scale), sample_rows(scale2)},
          {token_rows(upstream), token_rows(upstream2)},
          token_rows(upstream_x),
          at<void>(dx),
          at<void>(dy),
          at<void>(d_modulation),
          at<void>(d_gate),
          token_shape(shape, number)};
}

void bind_block_arguments(py::module_& m) {
  using namespace py::literals;
  py::class_<QkRmsNorm>(m, "QkRmsNorm")
      .def(py::init(&qk_rms_norm), "number"_a, "weight_number"_a, "cos"_a, "sin"_a, "batch"_a, "heads"_a, "size"_a,
           "eps"_a);
  py::class_<HeadRows>(m, "HeadRows")
      .def(py::init(&head_rows), "x"_a, "weight"_a, "rotary"_a, "tokens"_a, "first"_a);
  py::class_<HeadRowsForward>(m, "HeadRowsForward").def(py::init(&head_rows_forward), "rows"_a, "out"_a);
  py::class_<HeadRowsBackward>(m, "HeadRowsBackward")
      .def(py::init(&head_rows_backward), "rows"_a, "upstream"_a, "dx"_a, "weight_grad"_a);
  py::class_<GeluInput>(m, "GeluInput")
      .def(py::init(&gelu_input), "h"_a, "bias"_a, "number"_a, "rows"_a, "size"_a);
  py::class_<Gelu>(m, "Gelu").def(py::init(&gelu), "input"_a, "out"_a);
  py::class_<GeluBackward>(m, "GeluBackward")
      .def(py::init(&gelu_backward), "input"_a, "upstream"_a, "dh"_a, "activation"_a);
  py::class_<GatedResidual>(m, "GatedResidual")
      .def(py::init(&gated_residual), "x"_a, "y"_a, "gate"_a, "out"_a, "shape"_a, "number"_a);
  py::class_<GatedResidualBackward>(m, "GatedResidualBackward")
      .def(py::init(&gated_residual_backward), "upstream"_a, "y"_a, "gate"_a, "dy"_a, "d_gate"_a, "shape"_a,
           "number"_a);
  py::class_<LayerNormModulate>(m, "LayerNormModulate")
      .def(py::init(&layer_norm_modulate), "x"_a, "y"_a, "gate"_a, "scale"_a, "shift"_a, "scale2"_a, "shift2"_a,
           "eps"_a, "x_new"_a, "out"_a, "out2"_a, "statistics"_a, "shape"_a, "number"_a);
  py::class_<LayerNormModulateBackward>(m, "LayerNormModulateBackward")
      .def(py::init(&layer_norm_modulate_backward), "normed_from"_a, "statistics"_a, "y"_a, "gate"_a, "scale"_a,
           "scale2"_a, "upstream"_a, "upstream2"_a, "upstream_x"_a, "dx"_a, "dy"_a, "d_modulation"_a, "d_gate"_a,
           "shape"_a, "number"_a);
}

// Made once and handed to either device's function.
void bind_arguments(py::module_& m) {
  using namespace py::literals;
  py::class_<PhiloxNormal>(m, "PhiloxNormal")
      .def(py::init(&philox_normal), "out"_a, "pair"_a, "stream"_a, "rows"_a, "size"_a, "seed"_a);
  py::class_<PairedNoise>(m, "PairedNoise")
      .def(py::init(&paired_noise), "out"_a, "pair"_a, "coefficients"_a, "antithetic"_a, "pairs"_a, "size"_a,
           "seed"_a);
  py::class_<PairedStep>(m, "PairedStep")
      .def(py::init(&paired_step), "x"_a, "v"_a, "v_uncond"_a, "v_out"_a, "out"_a, "number"_a, "pair"_a,
           "coefficients"_a, "antithetic"_a, "guidance_scale"_a, "pairs"_a, "size"_a, "step"_a, "seed"_a);
  py::class_<Replay>(m, "Replay")
      .def(py::init(&replay), "velocities"_a, "step_stride"_a, "number"_a, "out"_a, "index"_a, "branch"_a, "pair"_a,
           "last"_a, "wanted"_a, "coefficients"_a, "antithetic"_a, "rows"_a, "steps"_a, "size"_a, "seed"_a);
  py::class_<PairDirection>(m, "PairDirection")
      .def(py::init(&pair_direction), "x"_a, "out"_a, "out_stride"_a, "pairs"_a, "size"_a, "floor"_a);
  py::class_<FdfoLoss>(m, "FdfoLoss")
      .def(py::init(&fdfo_loss), "v"_a, "v_old"_a, "number"_a, "number_old"_a, "v_stride"_a, "v_old_stride"_a, "u"_a,
           "u_stride"_a, "pair"_a, "branch"_a, "rows"_a, "size"_a);
  bind_block_arguments(m);
}

}  // namespace
