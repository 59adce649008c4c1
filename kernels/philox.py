"""Device functions shared by the kernels that draw noise. Device code: imports triton only, never the engine."""

import triton
import triton.language as tl


@triton.jit
def normals(counter, stream, pair, key_lo, key_hi):
    """4 * BLOCK normals of one pair and stream, in order, from BLOCK consecutive Philox counters."""
    zero = (counter * 0).to(tl.uint32)  # words as blocks: they wrap, where the interpreter's scalars warn
    c0, c1 = counter.to(tl.uint32), zero + stream.to(tl.uint32)
    c2, c3 = zero + (pair & 0xFFFFFFFF).to(tl.uint32), zero + (pair >> 32).to(tl.uint32)
    k0, k1 = zero + key_lo.to(tl.uint32), zero + key_hi.to(tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, zero + 0xD2511F53), c0 * (zero + 0xD2511F53)
        high1, low1 = tl.umulhi(c2, zero + 0xCD9E8D57), c2 * (zero + 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    n0, n1 = box_muller(c0, c1)
    n2, n3 = box_muller(c2, c3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))  # n0 n1 n2 n3 of each counter


@triton.jit
def branch_noise(branch, noise, ANTITHETIC: tl.constexpr):
    """The branch whose stream `branch` draws from, and its factor `noise`.

    Antithetic branches share the stream of branch 0; branch 1 takes its noise with the other sign.
    """
    if ANTITHETIC:
        return branch * 0, noise * (1 - 2 * branch)
    return branch, noise


@triton.jit
def box_muller(word_a, word_b):
    """`sqrt(-2 ln ua) * (cos, sin)(2 pi ub)`, u = (word >> 9 + 0.5) * 2^-23."""
    ua = ((word_a >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    radius = tl.sqrt_rn(-2.0 * tl.log(ua))
    cosine, sine = cos_sin_turns((word_b >> 9).to(tl.int32))
    return radius * cosine, radius * sine


@triton.jit
def cos_sin_turns(m):
    """cos and sin of `2 pi (m + 0.5) / 2^23`, m in 0..2^23-1.

    Taylor series around the nearest quarter turn, exact to 1e-9 there; tl.cos would cost stack for a slow path.
    """
    quarter = (m + (1 << 20)) >> 21  # 0..4
    turn = ((m - (quarter << 21)).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # exact, in -1/8..1/8
    x = turn * 6.283185307179586
    z = x * x
    s = x * (1.0 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    c = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 - z * (1 / 3628800)))))
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, s, c), tl.where(odd, c, s)
    cosine = tl.where(((quarter + 1) & 2) == 2, -cosine, cosine)
    sine = tl.where((quarter & 2) == 2, -sine, sine)
    return cosine, sine


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 `x` rounded to nearest even in `dtype`, still float32. In integers: the interpreter's cast truncates."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        kept = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, kept.to(tl.float32, bitcast=True), x)
    if dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    return x
