// Every CPU kernel, once: its name and what it takes. Where this is included, KERNEL is defined to make of each a field
// of a table, a prototype of an instruction set, or an entry of its table. So there is no include guard.
KERNEL(philox_normal, const PhiloxNormal&, int threads)
KERNEL(paired_noise, const PairedNoise&, int threads)
KERNEL(paired_step, const PairedStep&, int threads)
KERNEL(replay, const Replay&, int threads)
// partial: [pairs, blocks(size, kSumBlock)], scratch.
KERNEL(pair_direction, const PairDirection&, double* partial, int threads)
KERNEL(fdfo_loss_forward, const FdfoLoss&, const LossOutputs&, int threads)
// grad [rows, size] of v's type: scale[row] * (e + u), exactly 0 where the scale is.
KERNEL(fdfo_loss_backward, const FdfoLoss&, const double* scale, void* grad, int threads)
KERNEL(qk_rms_norm_forward, const QkRmsNorm&, const HeadRowsForward* rows, int count, int threads)
// partial: [blocks(batch * tokens, kHeadTokenBlock), size] for the longest of `rows`, scratch.
KERNEL(qk_rms_norm_backward, const QkRmsNorm&, const HeadRowsBackward* rows, int count, double* partial, int threads)
KERNEL(gelu_forward, const Gelu&, int threads)
KERNEL(gelu_backward, const GeluBackward&, int threads)
KERNEL(gated_residual_forward, const GatedResidual&, int threads)
// partial: `partial_sums(shape, 1)` floats of scratch where d_gate is not null.
KERNEL(gated_residual_backward, const GatedResidualBackward&, float* partial, int threads)
// wide: [samples, kModulationRows, size], scratch.
KERNEL(layer_norm_modulate_forward, const LayerNormModulate&, float* wide, int threads)
// wide as in the forward; partial: `partial_sums(shape, kinds())` floats of scratch.
KERNEL(layer_norm_modulate_backward, const LayerNormModulateBackward&, float* wide, float* partial, int threads)
