// Python's door to the compiled kernels: addresses and sizes that fdfo_engine/ops has checked, and nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#if defined(FDFO_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace py = pybind11;

namespace {

using namespace fdfo;
using Address = std::uintptr_t;
using Strided = std::tuple<Address, std::int64_t, std::int64_t>;  // address, strides of pair and branch
using Row = std::tuple<Address, std::int64_t>;                    // address, stride of samples
using Shape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
using Seed = std::tuple<std::uint32_t, std::uint32_t>;            // low and high word

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

template <class T>
PairedRows<T> rows(const Strided& r) {
  return {at<T>(std::get<0>(r)), std::get<1>(r), std::get<2>(r)};
}

Key key(const Seed& seed) { return {std::get<0>(seed), std::get<1>(seed)}; }

PhiloxNormal philox_normal(Address out, Address pair, Address stream, std::int64_t count, std::int64_t size, Seed seed) {
  return {at<float>(out), at<const std::int64_t>(pair), at<const std::int64_t>(stream), count, size, key(seed)};
}

PairedNoise paired_noise(Address out, Address pair, Address coefficients, std::int64_t pairs, std::int64_t size,
                         Seed seed) {
  return {at<float>(out), at<const std::int64_t>(pair), at<const Coefficients>(coefficients), pairs, size, key(seed)};
}

PairedStep paired_step(Strided x, Strided v, Strided v_uncond, Strided v_out, Strided out, int number, Address pair,
                       Address coefficients, float guidance_scale, std::int64_t pairs, std::int64_t size,
                       std::uint32_t step, Seed seed) {
  return {rows<const float>(x),
          rows<const void>(v),
          rows<const void>(v_uncond),
          rows<void>(v_out),
          rows<float>(out),
          static_cast<Number>(number),
          at<const std::int64_t>(pair),
          at<const Coefficients>(coefficients),
          guidance_scale,
          pairs,
          size,
          step,
          key(seed)};
}

Replay replay(Strided velocities, std::int64_t step_stride, int number, Address out, Address index, Address branch,
              Address pair, Address last, Address wanted, Address coefficients, std::int64_t count, std::int64_t steps,
              std::int64_t size, Seed seed) {
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
          count,
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
                   std::int64_t count, std::int64_t size) {
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
          count,
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

// `packed`: address, strides of batch, token and head.
HeadRows head_rows(Strided x, std::tuple<Address, std::int64_t, std::int64_t, std::int64_t> packed, Address weight,
                   bool rotary, std::int64_t tokens, std::int64_t first, Address grad, Address weight_grad) {
  const auto [packed_address, packed_batch, packed_token, packed_head] = packed;
  return {at<const void>(std::get<0>(x)),
          std::get<1>(x),
          std::get<2>(x),
          at<void>(packed_address),
          packed_batch,
          packed_token,
          packed_head,
          at<const void>(weight),
          rotary,
          tokens,
          first,
          at<void>(grad),
          at<void>(weight_grad)};
}

Gelu gelu(Address h, Address bias, Address grad, Address out, Address activation, int number, std::int64_t count,
          std::int64_t size) {
  return {at<const void>(h), at<const void>(bias),        at<const void>(grad), at<void>(out),
          at<void>(activation), static_cast<Number>(number), count,                size};
}

TokenRows token_rows(const Strided& t) { return {at<const void>(std::get<0>(t)), std::get<1>(t), std::get<2>(t)}; }

SampleRows sample_rows(const Row& r) { return {at<const void>(std::get<0>(r)), std::get<1>(r)}; }

TokenShape token_shape(const Shape& s, int number) {
  return {std::get<0>(s), std::get<1>(s), std::get<2>(s), static_cast<Number>(number)};
}

GatedResidual gated_residual(const Strided& x, const Strided& y, const Row& gate, const Shape& shape, int number) {
  return {token_rows(x), token_rows(y), sample_rows(gate), token_shape(shape, number)};
}

LayerNormModulate layer_norm_modulate(const Strided& x, const Strided& y, const Row& gate, const Row& scale,
                                      const Row& shift, const Row& scale2, const Row& shift2, Address statistics,
                                      float eps, const Shape& shape, int number) {
  return {token_rows(x),
          token_rows(y),
          sample_rows(gate),
          {sample_rows(scale), sample_rows(scale2)},
          {sample_rows(shift), sample_rows(shift2)},
          at<float>(statistics),
          eps,
          token_shape(shape, number)};
}

using Scratch = std::unique_ptr<float[]>;  // unlike a vector's, its elements are not set first

std::vector<const cpu::Table*> supported_tables() {
  std::vector<const cpu::Table*> found{&cpu::kGeneric};
#if defined(FDFO_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found.push_back(&cpu::kAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found.push_back(&cpu::kAvx512);
  }
#endif
  return found;
}

const cpu::Table* table = supported_tables().back();

// The ops of a transformer block.
void bind_cpu_block(py::module_& m) {
  using Guard = py::call_guard<py::gil_scoped_release>;
  m.def(
      "gated_residual_forward",
      [](const GatedResidual& a, Address out, int threads) {
        table->gated_residual_forward(a, at<void>(out), threads);
      },
      Guard());
  m.def(
      "gated_residual_backward",
      [](const GatedResidual& a, Address dy, Address d_gate, int threads) {
        const Scratch partial(new float[d_gate ? cpu::partial_sums(a.shape, 1) : 0]);
        table->gated_residual_backward(a, at<void>(dy), at<void>(d_gate), partial.get(), threads);
      },
      Guard());
  m.def(
      "layer_norm_modulate_forward",
      [](const LayerNormModulate& a, Address x_new, Address out, Address out2, int threads) {
        const Scratch wide(new float[cpu::kModulationRows * a.shape.samples * a.shape.size]);
        table->layer_norm_modulate_forward(a, {at<void>(x_new), {at<void>(out), at<void>(out2)}}, wide.get(), threads);
      },
      Guard());
  m.def(
      "layer_norm_modulate_backward",
      [](const LayerNormModulate& a, const Strided& upstream, const Strided& upstream2, const Strided& upstream_x,
         Address dx, Address dy, Address d_modulation, Address d_gate, int threads) {
        const NormGradients g{{token_rows(upstream), token_rows(upstream2)}, token_rows(upstream_x), at<void>(dx),
                              at<void>(dy), at<void>(d_modulation), at<void>(d_gate)};
        const Scratch wide(new float[cpu::kModulationRows * a.shape.samples * a.shape.size]);
        const Scratch partial(new float[cpu::partial_sums(a.shape, cpu::gradient_kinds(a, g))]);
        table->layer_norm_modulate_backward(a, g, {wide.get(), partial.get()}, threads);
      },
      Guard());
}

void bind_cpu(py::module_& m) {
  using Guard = py::call_guard<py::gil_scoped_release>;
  m.def("instruction_set", [] { return table->name; });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (const cpu::Table* supported : supported_tables()) names.emplace_back(supported->name);
    return names;
  });
  m.def("use_instruction_set", [](const std::string& name) {
    for (const cpu::Table* supported : supported_tables()) {
      if (supported->name == name) {
        table = supported;
        return;
      }
    }
    throw std::invalid_argument("this processor has no " + name);
  });
  m.def("philox_normal", [](const PhiloxNormal& a, int threads) { table->philox_normal(a, threads); }, Guard());
  m.def("paired_noise", [](const PairedNoise& a, int threads) { table->paired_noise(a, threads); }, Guard());
  m.def("paired_step", [](const PairedStep& a, int threads) { table->paired_step(a, threads); }, Guard());
  m.def("replay", [](const Replay& a, int threads) { table->replay(a, threads); }, Guard());
  m.def(
      "pair_direction",
      [](const PairDirection& a, int threads) {
        std::vector<double> partial(a.pairs * cpu::blocks(a.size, cpu::kSumBlock));
        table->pair_direction(a, partial.data(), threads);
      },
      Guard());
  m.def(
      "fdfo_loss_forward",
      [](const FdfoLoss& a, Address advantage, double clip_range, double normalizer, Address scale, Address loss,
         Address log_ratio, Address grad, int threads) {
        std::vector<double> terms(a.rows);
        const cpu::LossOutputs outputs{at<const double>(advantage), clip_range,        normalizer,    terms.data(),
                                       at<float>(log_ratio),        at<double>(scale), at<void>(grad)};
        table->fdfo_loss_forward(a, outputs, threads);
        *at<float>(loss) = static_cast<float>(std::accumulate(terms.begin(), terms.end(), 0.0));
      },
      Guard());
  m.def(
      "fdfo_loss_backward",
      [](const FdfoLoss& a, Address scale, Address grad, int threads) {
        table->fdfo_loss_backward(a, at<const double>(scale), at<void>(grad), threads);
      },
      Guard());
  m.def(
      "qk_rms_norm_forward",
      [](const QkRmsNorm& a, const std::vector<HeadRows>& rows, int threads) {
        table->qk_rms_norm_forward(a, rows.data(), static_cast<int>(rows.size()), threads);
      },
      Guard());
  m.def(
      "qk_rms_norm_backward",
      [](const QkRmsNorm& a, const std::vector<HeadRows>& rows, int threads) {
        std::int64_t most = 0;
        for (const HeadRows& r : rows) most = r.weight_grad != nullptr ? std::max(most, r.tokens) : most;
        std::vector<double> partial(cpu::blocks(a.batch * most, cpu::kHeadTokenBlock) * a.size);
        table->qk_rms_norm_backward(a, rows.data(), static_cast<int>(rows.size()), partial.data(), threads);
      },
      Guard());
  m.def("gelu_forward", [](const Gelu& a, int threads) { table->gelu_forward(a, threads); }, Guard());
  m.def("gelu_backward", [](const Gelu& a, int threads) { table->gelu_backward(a, threads); }, Guard());
  bind_cpu_block(m);
}

#if defined(FDFO_WITH_CUDA)
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA launch failed: ") + error);
}

void bind_cuda(py::module_& m) {
  using Guard = py::call_guard<py::gil_scoped_release>;
  m.attr("SUM_BLOCK") = cuda::kSumBlock;
  m.def("probe", &cuda::probe, "What is wrong with this machine's CUDA, or None");
  m.def("philox_normal", [](const PhiloxNormal& a, Address s) { check(cuda::philox_normal(a, at<void>(s))); }, Guard());
  m.def("paired_noise", [](const PairedNoise& a, Address s) { check(cuda::paired_noise(a, at<void>(s))); }, Guard());
  m.def("paired_step", [](const PairedStep& a, Address s) { check(cuda::paired_step(a, at<void>(s))); }, Guard());
  m.def("replay", [](const Replay& a, Address s) { check(cuda::replay(a, at<void>(s))); }, Guard());
  m.def("pair_direction", [](const PairDirection& a, Address s) { check(cuda::pair_direction(a, at<void>(s))); },
        Guard());
  m.def(
      "fdfo_loss_forward",
      [](const FdfoLoss& a, Address advantage, bool advantage_is_double, double clip_range, double normalizer,
         Address partial, Address ticket, Address scale, Address loss, Address log_ratio, Address stream) {
        const cuda::FdfoLossOutputs outputs{at<const void>(advantage), advantage_is_double, clip_range, normalizer,
                                            at<double>(partial), at<std::uint32_t>(ticket), at<double>(scale),
                                            at<float>(loss), at<float>(log_ratio)};
        check(cuda::fdfo_loss_forward(a, outputs, at<void>(stream)));
      },
      Guard());
  m.def(
      "fdfo_loss_backward",
      [](const FdfoLoss& a, Address scale, Address upstream, Address grad, Address stream) {
        check(cuda::fdfo_loss_backward(a, at<const double>(scale), at<const float>(upstream), at<void>(grad),
                                       at<void>(stream)));
      },
      Guard());
}
#endif

// The arguments of an op, made once and handed to either device's function.
void bind_arguments(py::module_& m) {
  py::class_<PhiloxNormal>(m, "PhiloxNormal").def(py::init(&philox_normal));
  py::class_<PairedNoise>(m, "PairedNoise").def(py::init(&paired_noise));
  py::class_<PairedStep>(m, "PairedStep").def(py::init(&paired_step));
  py::class_<Replay>(m, "Replay").def(py::init(&replay));
  py::class_<PairDirection>(m, "PairDirection").def(py::init(&pair_direction));
  py::class_<FdfoLoss>(m, "FdfoLoss").def(py::init(&fdfo_loss));
  py::class_<QkRmsNorm>(m, "QkRmsNorm").def(py::init(&qk_rms_norm));
  py::class_<HeadRows>(m, "HeadRows").def(py::init(&head_rows));
  py::class_<Gelu>(m, "Gelu").def(py::init(&gelu));
  py::class_<GatedResidual>(m, "GatedResidual").def(py::init(&gated_residual));
  py::class_<LayerNormModulate>(m, "LayerNormModulate").def(py::init(&layer_norm_modulate));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Compiled kernels of fdfo_engine.ops; call those instead";
  bind_arguments(m);
  py::module_ on_cpu = m.def_submodule("cpu", "On host memory; the last argument is the number of threads");
  bind_cpu(on_cpu);
#if defined(FDFO_WITH_CUDA)
  py::module_ on_cuda = m.def_submodule("cuda", "On the current device's memory; the last argument is the stream");
  bind_cuda(on_cuda);
  m.attr("CUDA_ARCHITECTURES") = FDFO_CUDA_ARCHITECTURES;
#else
  m.attr("CUDA_ARCHITECTURES") = "";
#endif
}
