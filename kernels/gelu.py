"""Triton kernels of GELU by tanh. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl
from fdfo_engine.kernels.philox import rounded


@triton.jit
def gelu_forward_kernel(h_ptr, out_ptr, COUNT, BLOCK: tl.constexpr):
    # grid cdiv(COUNT, BLOCK)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < COUNT
    value, _ = gelu(tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32))
    tl.store(out_ptr + offs, rounded(value, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(h_ptr, grad_ptr, out_ptr, activation_ptr, COUNT, BLOCK: tl.constexpr):
    # grid cdiv(COUNT, BLOCK); out may be grad itself, and activation None
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = offs < COUNT
    h = tl.load(h_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    value, slope = gelu(h)
    tl.store(out_ptr + offs, rounded(grad * slope, out_ptr.dtype.element_ty), mask=mask)
    if activation_ptr is not None:
        tl.store(activation_ptr + offs, rounded(value, activation_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu(h):
    """GELU and its slope. `h * sigmoid(2u)`, `2u = 2 sqrt(2/pi) (h + 0.044715 h^3)`: no difference of numbers near 1.

    Beyond 9.9 GELU is h or 1e-37: held there, nothing overflows. NaN stays NaN.
    """
    above = tl.where(h < -9.9, -9.9, h)
    inside = tl.where(above > 9.9, 9.9, above)
    square = inside * inside
    e = tl.exp(inside * (-1.595769122 - 0.0713548163 * square))  # e^(-2u)
    sigmoid = 1.0 / (1.0 + e)
    slope = sigmoid + inside * (e * sigmoid) * sigmoid * (1.595769122 + 0.2140644489 * square)
    return above * sigmoid, slope
