"""The executor of `offgpu/ptx/` against formulas, and what it says of wrong programs, on a few lines of PTX each."""

import numpy as np
import pytest
from offgpu.ptx.machine import WARP, Machine, min_access
from offgpu.ptx.memory import Memory
from offgpu.ptx.program import PtxError, parsed

THREADS = 2 * WARP
FRAME = """
.extern .shared .align 16 .b8 smem[];
.visible .entry tested( .param .u64 .ptr .global .align 1 given, .param .u64 .ptr .global .align 1 found )
.reqntid 64
{{
    .reg .pred %p<9>;
    .reg .b16 %rs<9>;
    .reg .b32 %r<99>;
    .reg .b64 %rd<9>;
    ld.param.b64 %rd1, [given];
    ld.param.b64 %rd2, [found];
    mov.u32 %r90, %tid.x;
    mul.wide.u32 %rd3, %r90, {size};
    add.s64 %rd4, %rd1, %rd3;
    add.s64 %rd5, %rd2, %rd3;
    shl.b32 %r91, %r90, 2;
    mov.b32 %r92, smem;
    add.s32 %r93, %r92, %r91;
    {body}
    ret;
}}
"""
"""Thread t reads at %rd4, writes at %rd5, and has shared memory of its own at %r93."""


def run(body, given, found, *, blocks=1):
    """Runs `body` in blocks of two warps on rows of a thread each, and returns what `found` became."""
    size = given[0].nbytes
    assert found[0].nbytes == size
    program = parsed(FRAME.format(body=body, size=size))
    memory = Memory("global", 4096 + given.nbytes + found.nbytes, min_access(program, "global"))
    starts = (1024, 2048 + given.nbytes)
    for start, array in zip(starts, (given, found), strict=True):
        memory.data[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
        memory.inside[start : start + array.nbytes] = True
    Machine(program, (blocks, 1, 1), THREADS, np.array(starts, np.uint64).tobytes(), memory, 4 * THREADS).run()
    return memory.data[starts[1] : starts[1] + found.nbytes].view(found.dtype).reshape(found.shape)


def numbers(dtype, seed=0):
    """One of each size and sign, and not a few at the ends of the type."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        values = random.standard_normal(THREADS) * 10.0 ** random.integers(-3, 4, THREADS)
    else:
        bits = 8 * np.dtype(dtype).itemsize
        values = random.integers(0, 1 << bits, THREADS, dtype=np.uint64).astype(f"u{bits // 8}").view(dtype)
    return values.astype(dtype)


UNARY = {
    "abs.f32": (np.float32, abs),
    "neg.s32": (np.int32, lambda a: -a),
    "not.b32": (np.uint32, lambda a: ~a & 0xFFFFFFFF),
    "cvt.rn.bf16.f32": (np.float32, lambda a: np.uint32(_nearest_bfloat16(a))),
    "bfe.u32 5 7": (np.uint32, lambda a: a >> 5 & 127),
    "bfe.s32 5 7": (np.int32, lambda a: (a >> 5 & 127) - (128 if a >> 11 & 1 else 0)),
    "shr.s32 3": (np.int32, lambda a: a >> 3),
    "shr.s32 40": (np.int32, lambda a: a >> 40),
    "shl.b32 3": (np.uint32, lambda a: a << 3 & 0xFFFFFFFF),
    "shl.b32 32": (np.uint32, lambda a: 0),
    "div.s32 7": (np.int32, lambda a: int(a / 7)),
    "rem.s32 7": (np.int32, lambda a: a - 7 * int(a / 7)),
    "mul.hi.u32 3528531795": (np.uint32, lambda a: a * 3528531795 >> 32),
    "mul.hi.s32 -77777777": (np.int32, lambda a: a * -77777777 >> 32),
    "mul.lo.s32 77777777": (np.uint32, lambda a: a * 77777777 & 0xFFFFFFFF),
}
"""An instruction of one number, then its constants; by Python's own numbers, which are exact."""


def _nearest_bfloat16(a):
    candidates = int(np.float32(a).view(np.uint32)) >> 16
    values = [np.array(c << 16, np.uint32).view(np.float32).item() for c in (candidates, candidates + 1)]
    away = [abs(value - float(a)) for value in values]
    if away[0] == away[1]:
        return candidates + candidates % 2
    return candidates + int(away[1] < away[0])


@pytest.mark.parametrize("name", UNARY)
def test_an_instruction_of_one_number(name):
    dtype, formula = UNARY[name]
    opcode, *constants = name.split()
    operands = ", ".join(["%r2", "%r1", *constants])
    if "bf16" in opcode:
        body = f"ld.global.b32 %r1, [%rd4]; {opcode} %rs1, %r1; cvt.u32.u16 %r2, %rs1; st.global.b32 [%rd5], %r2;"
    else:
        body = f"ld.global.b32 %r1, [%rd4]; {opcode} {operands}; st.global.b32 [%rd5], %r2;"
    given = numbers(dtype)
    want = [formula(value.item()) for value in given]
    assert run(body, given, np.zeros(THREADS, np.uint32 if "bf16" in opcode else dtype)).tolist() == want


def test_a_fused_product_is_rounded_once():
    a, b = np.float32(1 + 2**-13), np.float32(1 - 2**-13)
    body = "ld.global.b32 %r1, [%rd4]; fma.rn.f32 %r2, %r1, 0f3F7FF800, 0fBF800000; st.global.b32 [%rd5], %r2;"
    found = run(body, np.full(THREADS, a), np.zeros(THREADS, np.float32))
    assert (found == np.float32(-(2**-26))).all()
    assert a * b - np.float32(1) == 0
    a, b = 1 + 2**-30, 1 - 2**-30
    factors = "%rd6, 0d3FEFFFFFFF800000, 0dBFF0000000000000"
    body = f"ld.global.b64 %rd6, [%rd4]; fma.rn.f64 %rd7, {factors}; st.global.b64 [%rd5], %rd7;"
    assert (run(body, np.full(THREADS, a), np.zeros(THREADS)) == -(2.0**-60)).all()
    assert a * b - 1 == 0


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
def test_a_shuffle(mode):
    by, limits = 5, 0 if mode == "up" else 31
    body = f"ld.global.b32 %r1, [%rd4]; shfl.sync.{mode}.b32 %r2, %r1, {by}, {limits}, -1; st.global.b32 [%rd5], %r2;"
    given = numbers(np.uint32)
    lane = np.arange(WARP)
    source = {"bfly": lane ^ by, "up": lane - by, "down": lane + by, "idx": 0 * lane + by}[mode]
    source = np.where((source < 0) | (source >= WARP), lane, source)
    want = given.reshape(2, WARP)[:, source].reshape(-1)
    assert np.array_equal(run(body, given, np.zeros(THREADS, np.uint32)), want)


def test_a_product_of_matrices():
    """Each lane keeps what the manual of PTX says: loaded here from the matrices by another formula."""
    random = np.random.default_rng(0)
    a, b, c = (random.integers(-8, 8, shape).astype(np.float16) for shape in ((16, 16), (16, 8), (16, 8)))
    group, inner = np.divmod(np.arange(WARP), 4)
    given = np.zeros((THREADS, 16), np.float16)
    for lane in range(WARP):
        g, t = group[lane], 2 * inner[lane]
        given[lane, :8] = [*a[g, t : t + 2], *a[g + 8, t : t + 2], *a[g, t + 8 : t + 10], *a[g + 8, t + 8 : t + 10]]
        given[lane, 8:12] = [*b[t : t + 2, g], *b[t + 8 : t + 10, g]]
        given[lane, 12:] = [*c[g, t : t + 2], *c[g + 8, t : t + 2]]
    given[WARP:] = given[:WARP]
    halves = [f"mov.b32 {{%rs{i}, %rs{i + 1}}}, %r{i // 2 + 7}; cvt.f32.f16 %r{20 + i}, %rs{i}; "
              f"cvt.f32.f16 %r{21 + i}, %rs{i + 1};" for i in (0, 2)]  # fmt: skip
    body = (
        "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd4]; ld.global.v4.b32 {%r5, %r6, %r7, %r8}, [%rd4+16];"
        + "".join(halves)
        + "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%r30, %r31, %r32, %r33}, {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r20, %r21, %r22, %r23};"
        "st.global.v4.b32 [%rd5], {%r30, %r31, %r32, %r33};"
    )
    found = run(body, given, np.zeros((THREADS, 8), np.float32))
    exact = a.astype(float) @ b.astype(float) + c
    for lane in range(WARP):
        g, t = group[lane], 2 * inner[lane]
        assert found[lane, :4].tolist() == [*exact[g, t : t + 2], *exact[g + 8, t : t + 2]]


SWAP = """
    ld.global.b32 %r1, [%rd4];
    st.shared.b32 [%r93], %r1;
    bar.sync 0;
    xor.b32 %r2, %r91, 128;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd5], %r3;
"""
"""Thread t of a warp writes what that of the other warp was given."""


def swapped(body):
    return run(body, np.arange(THREADS, dtype=np.uint32), np.zeros(THREADS, np.uint32))


def test_warps_meet_at_a_barrier():
    assert swapped(SWAP).tolist() == [(t + WARP) % THREADS for t in range(THREADS)]


WRONG = {
    "a barrier is missing": (SWAP.replace("bar.sync 0;", ""), "race in shared memory: read while another warp writes"),
    "a barrier before the next write is missing": (
        SWAP + "st.shared.b32 [%r93], %r3;", "race in shared memory: written while another warp reads",
    ),
    "warps write different values to one place": (
        "st.shared.b32 [smem], %r90;", "race in shared memory: threads write different values",
    ),
    "warps write to one place of a tensor": ("st.global.b32 [%rd2], %r90;", "race in global memory"),
    "nothing was written": (SWAP.replace("st.shared.b32 [%r93], %r1;", ""), "shared memory is read that nobody wrote"),
    "an element past the end": ("ld.global.b32 %r1, [%rd4+4];", "global memory: 1 threads access 4 bytes out"),
    "an element past the end of shared memory": ("st.shared.b32 [%r93+4], %r90;", "out of bounds of its 256 bytes"),
    "an odd address": ("ld.global.b32 %r1, [%rd4+2];", "no multiple of 4"),
    "some threads miss a barrier": (
        "setp.lt.u32 %p1, %r90, 40; @%p1 bra $L; bar.sync 0; $L: bar.sync 0;", "others never come",
    ),
    "a part of a warp shuffles": (
        "setp.lt.u32 %p1, %r90, 40; @%p1 shfl.sync.bfly.b32 %r2, %r90, 1, 31, -1;", "only some threads of a warp",
    ),
    "a register that nobody wrote": ("add.s32 %r1, %r2, %r90;", "%r2 is read before it is written"),
    "an instruction that is not known": ("dp4a.s32.s32 %r1, %r90, %r90, %r90;", "dp4a is not known"),
    "a modifier that is not known": ("add.rz.f32 %r1, %r90, %r90;", r"\['rz'\] of add is not known"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_the_instruction(name):
    body, message = WRONG[name]
    with pytest.raises(PtxError, match=f"tested: .*{message}"):
        swapped(body)


COPY = """
    cp.async.ca.shared.global [%r93], [%rd4], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r2, %r91, 128;
    ld.shared.b32 %r3, [%r2];
    st.global.b32 [%rd5], %r3;
"""


def test_a_copy_arrives_when_it_is_waited_for():
    assert swapped(COPY).tolist() == [(t + WARP) % THREADS for t in range(THREADS)]
    assert (swapped(COPY.replace("wait_group 0", "wait_group 1")) == 0xFFFFFFFF).all()
    with pytest.raises(PtxError, match="race in shared memory"):
        swapped(COPY.replace("bar.sync 0;", ""))


def test_blocks_have_shared_memory_of_their_own():
    body = SWAP.replace("st.global.b32 [%rd5], %r3;", "mov.u32 %r4, %ctaid.x; setp.eq.b32 %p1, %r4, 1;"
                        "@%p1 st.global.b32 [%rd5], %r3;")  # fmt: skip
    found = run(body, np.arange(THREADS, dtype=np.uint32), np.zeros(THREADS, np.uint32), blocks=3)
    assert found.tolist() == [(t + WARP) % THREADS for t in range(THREADS)]
