#include "block.h"

namespace fdfo::cpu {

namespace FDFO_ISA {
void philox_normal(const PhiloxNormal&, int threads);
void paired_noise(const PairedNoise&, int threads);
void paired_step(const PairedStep&, int threads);
void replay(const Replay&, int threads);
void pair_direction(const PairDirection&, double* partial, int threads);
void fdfo_loss_forward(const FdfoLoss&, const LossOutputs&, int threads);
void fdfo_loss_backward(const FdfoLoss&, const double* scale, void* grad, int threads);
void qk_rms_norm_forward(const QkRmsNorm&, const HeadRows* rows, int count, int threads);
void qk_rms_norm_backward(const QkRmsNorm&, const HeadRows* rows, int count, double* partial, int threads);
void gelu_forward(const Gelu&, int threads);
void gelu_backward(const Gelu&, int threads);
void gated_residual_forward(const GatedResidual&, void* out, int threads);
void gated_residual_backward(const GatedResidual&, void* dy, void* d_gate, float* partial, int threads);
void layer_norm_modulate_forward(const LayerNormModulate&, const NormOutputs&, float* wide, int threads);
void layer_norm_modulate_backward(const LayerNormModulate&, const NormGradients&, const NormScratch&, int threads);
}  // namespace FDFO_ISA

#define FDFO_STRING(name) FDFO_STRING_OF(name)
#define FDFO_STRING_OF(name) #name

extern const Table FDFO_TABLE{
    FDFO_STRING(FDFO_ISA),
    FDFO_ISA::philox_normal,
    FDFO_ISA::paired_noise,
    FDFO_ISA::paired_step,
    FDFO_ISA::replay,
    FDFO_ISA::pair_direction,
    FDFO_ISA::fdfo_loss_forward,
    FDFO_ISA::fdfo_loss_backward,
    FDFO_ISA::qk_rms_norm_forward,
    FDFO_ISA::qk_rms_norm_backward,
    FDFO_ISA::gelu_forward,
    FDFO_ISA::gelu_backward,
    FDFO_ISA::gated_residual_forward,
    FDFO_ISA::gated_residual_backward,
    FDFO_ISA::layer_norm_modulate_forward,
    FDFO_ISA::layer_norm_modulate_backward,
};

}  // namespace fdfo::cpu
