// Python's door to the compiled kernels: addresses and sizes that fdfo_engine/ops has checked, and nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_arguments.h"
#include "cpu/kernels.h"
#if defined(FDFO_WITH_CUDA)
#include "cuda/kernels.h"
#endif

namespace {

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

using Guard = py::call_guard<py::gil_scoped_release>;

// A kernel that takes its arguments and the number of threads alone.
template <class Arguments>
void bind_plain(py::module_& m, const char* name, void (*cpu::Table::*kernel)(const Arguments&, int)) {
  m.def(name, [kernel](const Arguments& a, int threads) { (table->*kernel)(a, threads); }, Guard());
}

// The ops of a transformer block.
void bind_cpu_block(py::module_& m) {
  bind_plain(m, "gelu_forward", &cpu::Table::gelu_forward);
  bind_plain(m, "gelu_backward", &cpu::Table::gelu_backward);
  bind_plain(m, "gated_residual_forward", &cpu::Table::gated_residual_forward);
  m.def(
      "gated_residual_backward",
      [](const GatedResidualBackward& a, int threads) {
        const Scratch partial(new float[a.d_gate ? cpu::partial_sums(a.shape, 1) : 0]);
        table->gated_residual_backward(a, partial.get(), threads);
      },
      Guard());
  m.def(
      "layer_norm_modulate_forward",
      [](const LayerNormModulate& a, int threads) {
        const Scratch wide(new float[cpu::kModulationRows * a.shape.samples * a.shape.size]);
        table->layer_norm_modulate_forward(a, wide.get(), threads);
      },
      Guard());
  m.def(
      "layer_norm_modulate_backward",
      [](const LayerNormModulateBackward& a, int threads) {
        const Scratch wide(new float[cpu::kModulationRows * a.shape.samples * a.shape.size]);
        const Scratch partial(new float[cpu::partial_sums(a.shape, a.kinds())]);
        table->layer_norm_modulate_backward(a, wide.get(), partial.get(), threads);
      },
      Guard());
  m.def(
      "qk_rms_norm_forward",
      [](const QkRmsNorm& a, const std::vector<HeadRowsForward>& rows, int threads) {
        table->qk_rms_norm_forward(a, rows.data(), static_cast<int>(rows.size()), threads);
      },
      Guard());
  m.def(
      "qk_rms_norm_backward",
      [](const QkRmsNorm& a, const std::vector<HeadRowsBackward>& rows, int threads) {
        std::int64_t most = 0;
        for (const HeadRowsBackward& r : rows) most = r.weight_grad ? std::max(most, r.rows.tokens) : most;
        std::vector<double> partial(cpu::blocks(a.batch * most, cpu::kHeadTokenBlock) * a.size);
        table->qk_rms_norm_backward(a, rows.data(), static_cast<int>(rows.size()), partial.data(), threads);
      },
      Guard());
}

void bind_cpu(py::module_& m) {
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
  bind_plain(m, "philox_normal", &cpu::Table::philox_normal);
  bind_plain(m, "paired_noise", &cpu::Table::paired_noise);
  bind_plain(m, "paired_step", &cpu::Table::paired_step);
  bind_plain(m, "replay", &cpu::Table::replay);
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
  bind_cpu_block(m);
}

#if defined(FDFO_WITH_CUDA)
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA launch failed: ") + error);
}

void bind_cuda(py::module_& m) {
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
