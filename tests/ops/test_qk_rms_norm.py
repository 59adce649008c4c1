import importlib

import numpy as np
import pytest
import torch
from numerics import assert_as_good_as
from ops.exact import draw, wide
from torch.autograd.graph import saved_tensors_hooks

from fdfo_engine import ops
from fdfo_engine.ops import _compiled

qk = importlib.import_module("fdfo_engine.ops.qk_rms_norm")  # the op of that name hides its module
EPS = 1e-6
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "q_weight", "k_weight")


def make(tokens=(5, 3), heads=3, size=64, batch=2, *, dtype=torch.float32, weights=None, device="cpu", lay=lambda t: t):
    """Leaf tensors of each stream, every one wanting its gradient."""
    streams = []
    for i, count in enumerate(tokens):
        x = [lay(draw(batch, count, heads * size, seed=5 * i + n, dtype=dtype, device=device)) for n in range(3)]
        scales = [1 + 0.3 * draw(size, seed=5 * i + n, device=device) for n in (3, 4)]
        streams.append(ops.QKV(*x, *(w.to(weights or dtype) for w in scales)))
    return [ops.QKV(*(t.detach().requires_grad_() for t in stream)) for stream in streams]


def angles(tokens, size, device="cpu"):
    """Cosine and sine that differ within a pair, as nothing promises that they do not."""
    return tuple(draw(tokens, size, seed=seed, device=device) for seed in (90, 91))


def upstream(outputs):
    return [draw(*out.shape, seed=70 + i, dtype=out.dtype, device=out.device) for i, out in enumerate(outputs)]


def exact(streams, size, rotary, gradients):
    """Outputs, and gradients of every leaf, in float64 numpy by the closed form."""
    tokens = [s.q.shape[1] for s in streams]
    first, outputs, grads = 0, [[], [], []], []
    for stream, count in zip(streams, tokens, strict=True):
        rows = slice(first, first + count)
        first += count
        dx, dw = [], []
        for kind in range(3):
            x = wide(stream[kind]).reshape(len(stream.q), count, -1, size)
            g = wide(gradients[kind])[:, rows]
            weight = wide(stream[3 + kind]) if kind < 2 and stream[3 + kind] is not None else None
            y, r = x, 1.0
            if weight is not None:
                r = 1 / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
                y = x * r * weight
            if rotary is not None and kind < 2:
                cos, sin = (wide(table)[rows, None] for table in rotary)
                turned, back = np.empty_like(y), np.empty_like(g)
                turned[..., ::2], turned[..., 1::2] = -y[..., 1::2], y[..., ::2]
                back[..., ::2], back[..., 1::2] = (g * sin)[..., 1::2], -(g * sin)[..., ::2]
                y, g = y * cos + turned * sin, g * cos + back
            outputs[kind].append(y)
            if weight is not None:
                dw.append((g * x * r).sum((0, 1, 2)))
                g = r * (g * weight - x * r * (g * weight * x * r).mean(-1, keepdims=True))
            elif kind < 2:
                dw.append(None)
            dx.append(g.reshape(len(stream.q), count, -1))
        grads += dx + dw
    return [np.concatenate(parts, 1) for parts in outputs], grads


def run(streams, backend, *, size=64, rotary=None, gradients=upstream):
    """Outputs and gradients of every leaf; None where there is no leaf."""
    outputs = ops.qk_rms_norm(streams, head_size=size, rotary=rotary, eps=EPS, backend=backend)
    leaves = [t for stream in streams for t in stream]
    found = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], gradients(outputs)))
    return outputs, [None if t is None else next(found) for t in leaves]


def assert_right(streams, backend, *, size=64, rotary=None):
    outputs, grads = run(streams, backend, size=size, rotary=rotary)
    plain, plain_grads = run(streams, "torch", size=size, rotary=rotary)
    values, slopes = exact(streams, size, rotary, upstream(plain))
    names = ["q", "k", "v"] + [f"d{name}{i}" for i in range(len(streams)) for name in NAMES]
    for name, got, usual, true in zip(
        names, [*outputs, *grads], [*plain, *plain_grads], [*values, *slopes], strict=True
    ):
        if true is None:
            assert got is None
            continue
        assert (got.shape, got.dtype) == (true.shape, usual.dtype)
        assert backend == "torch" or got.is_contiguous(), name
        assert_as_good_as(got.cpu(), usual.cpu(), torch.from_numpy(true), name=name)


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "size"), [((1,), 1, 2), ((5, 3), 3, 64), ((19, 2), 9, 32), ((4,), 2, 128), ((3, 2), 2, 24)]
)
def test_values_and_gradients(tokens, heads, size, dtype, rotary, backend, device):
    streams = make(tokens, heads, size, dtype=dtype, device=device)
    assert_right(streams, backend, size=size, rotary=angles(sum(tokens), size, device) if rotary else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights(dtype, backend, device):
    streams = make(dtype=dtype, weights=torch.float32, device=device)
    assert_right(streams, backend, rotary=angles(8, 64, device))


@pytest.mark.parametrize("missing", [("q_weight",), ("k_weight",), ("q_weight", "k_weight")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streams_that_are_not_normed(missing, dtype, backend, device):
    first, second = make(dtype=dtype, device=device)
    bare = second._replace(**dict.fromkeys(missing))
    for streams in ([first, bare], [bare, first], [bare]):
        tokens = sum(s.q.shape[1] for s in streams)
        for rotary in (None, angles(tokens, 64, device)):
            assert_right(streams, backend, rotary=rotary)


def test_an_odd_head_size(backend, device):
    assert_right(make(size=7, device=device), backend, size=7)
    assert_right(make(size=256, tokens=(2,), device=device), backend, size=256)


def test_reference_is_within_a_millionth(device):
    streams, rotary = make(device=device), angles(8, 64, device)
    outputs, grads = run(streams, "torch", rotary=rotary)
    values, slopes = exact(streams, 64, rotary, upstream(outputs))
    for i, (got, true) in enumerate(zip([*outputs, *grads], [*values, *slopes], strict=True)):
        assert np.abs(wide(got) - true).max() <= 1e-6 * np.abs(true).max(), i


def test_it_is_what_diffusers_computes(backend, device):
    """To the bit in bfloat16: the norm by its module, the rotary embedding by its function."""
    from diffusers.models.embeddings import apply_rotary_emb
    from diffusers.models.normalization import RMSNorm

    streams, rotary = make(dtype=torch.bfloat16, device=device), angles(8, 64, device)
    q, k, v = ops.qk_rms_norm(streams, head_size=64, rotary=rotary, eps=EPS, backend=backend)
    norm = RMSNorm(64, EPS)
    for got, kind in ((q, 0), (k, 1)):
        parts = []
        for stream in streams:
            norm.weight = torch.nn.Parameter(stream[3 + kind].detach())
            parts.append(norm(stream[kind].unflatten(2, (-1, 64)).transpose(1, 2)))
        expected = apply_rotary_emb(torch.cat(parts, 2), rotary).transpose(1, 2)
        off = (got.float() - expected.float()).abs()
        assert (off > 0).float().mean() < 1e-3  # the order of a sum may move a rounding
        assert (off <= 2**-7 * expected.float().abs()).all()
    assert torch.equal(v, torch.cat([s.v for s in streams], 1).unflatten(2, (-1, 64)))


def test_views_of_a_joint_buffer(backend, device):
    """As one projection to 3 * D leaves them, with gradients as attention hands them back: heads before tokens."""
    buffers = [draw(2, count, 3 * 192, seed=count, dtype=torch.bfloat16, device=device) for count in (5, 3)]
    joint = [b.requires_grad_() for b in buffers]
    weights = make(dtype=torch.bfloat16, device=device)

    def grads(streams, gradients):
        leaves = [*joint, *(t for s in streams for t in s[3:])]
        outputs = ops.qk_rms_norm(streams, head_size=64, backend=backend)
        return [*outputs, *torch.autograd.grad(outputs, leaves, gradients(outputs))]

    def turned(outputs):
        return [g.transpose(1, 2).contiguous().transpose(1, 2) for g in upstream(outputs)]

    views = [ops.QKV(*b.split(192, 2), *w[3:]) for b, w in zip(joint, weights, strict=True)]
    packed = [ops.QKV(*(x.contiguous() for x in v[:3]), *v[3:]) for v in views]
    assert all(map(torch.equal, grads(views, turned), grads(packed, upstream)))
    mixed = [v._replace(v=p.v) for v, p in zip(views, packed, strict=True)]
    assert all(map(torch.equal, grads(mixed, turned), grads(packed, upstream)))


def test_a_stream_alone_keeps_its_v(backend, device):
    (stream,) = make((4,), device=device)
    v = ops.qk_rms_norm([stream], head_size=64, backend=backend)[2]
    assert v.data_ptr() == stream.v.data_ptr()
    assert v.shape == (2, 4, 3, 64)
    strided = stream._replace(v=stream.v.detach().transpose(0, 1).contiguous().transpose(0, 1))
    v = ops.qk_rms_norm([strided], head_size=64, backend=backend)[2]
    assert v.data_ptr() == strided.v.data_ptr()
    assert torch.equal(v, stream.v.unflatten(2, (3, 64)))


def test_values_that_are_packed_already(backend, device):
    streams = make(device=device)
    (q, k, _), grads = run(streams, backend)
    bare = [s._replace(v=None) for s in streams]
    found_q, found_k, v = ops.qk_rms_norm(bare, head_size=64, backend=backend)
    assert v is None
    assert torch.equal(found_q, q)
    assert torch.equal(found_k, k)
    leaves = [t for s in bare for t in (s.q, s.k, s.q_weight, s.k_weight)]
    found = torch.autograd.grad((found_q, found_k), leaves, upstream((q, k)))
    assert all(map(torch.equal, found, [g for i, g in enumerate(grads) if i % 5 != 2]))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_result_that_is_not_used(lost, backend, device):
    streams = make(device=device)
    outputs, _ = run(streams, backend)
    used = [out for i, out in enumerate(ops.qk_rms_norm(streams, head_size=64, backend=backend)) if i != lost]
    leaves = [s[kind] for s in streams for kind in range(3)]
    grads = torch.autograd.grad(
        used, leaves, [g for i, g in enumerate(upstream(outputs)) if i != lost], allow_unused=True
    )
    _, whole = run(streams, backend)
    for i, grad in enumerate(grads):
        if i % 3 == lost:
            assert grad is None or not grad.any()
        else:
            assert torch.equal(grad, whole[i // 3 * 5 + i % 3])


def frozen(streams):
    return [s._replace(q_weight=s.q_weight.detach(), k_weight=s.k_weight.detach()) for s in streams]


def kept_bytes(streams, **options):
    """Of the storages that a call keeps for its backward, less those of its outputs; and the outputs."""
    kept = {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.untyped_storage()) and t, lambda t: t):
        outputs = ops.qk_rms_norm(streams, head_size=64, **options)
    own = {out.data_ptr() for out in outputs}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in own), outputs


@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_from_what_was_packed(dtype, rotary, backend, device):
    """A weight is spread as far as `is_invertible` allows; gradients as exact as from q and k."""
    streams = frozen(make((19, 6), dtype=dtype, device=device))
    spread = qk.ROTARY_SPREAD if rotary else qk.SPREAD
    sizes = torch.logspace(0, -np.log2(spread), 64, base=2, device=device).to(dtype)
    streams[0] = streams[0]._replace(q_weight=sizes)
    turn = draw(25, 32, seed=8, device=device).repeat_interleave(2, 1)
    given = {"rotary": (turn.cos(), turn.sin()) if rotary else None, "backend": backend, "eps": EPS}
    assert ops.is_invertible([s[i] for s in streams for i in (3, 4)], rotary=rotary)
    leaves = [s[kind] for s in streams for kind in range(3)]
    outputs = ops.qk_rms_norm(streams, head_size=64, invertible=True, **given)
    found = torch.autograd.grad(outputs, leaves, upstream(outputs))
    plain = ops.qk_rms_norm(streams, head_size=64, **given | {"backend": "torch"})
    usual = torch.autograd.grad(plain, leaves, upstream(plain))
    _, slopes = exact(streams, 64, given["rotary"], upstream(plain))
    true = [slope for i, slope in enumerate(slopes) if i % 5 < 3]
    for i, (got, own, slope) in enumerate(zip(found, usual, true, strict=True)):
        assert_as_good_as(got.cpu(), own.cpu(), torch.from_numpy(slope), name=f"{NAMES[i % 3]}{i // 3}")


def test_what_is_kept(backend, device):
    """A number a head in the place of q and k, if weights are frozen and invertible; on backend triton."""
    streams, of_q = make((19, 6), dtype=torch.bfloat16, device=device), 2 * 25 * 3 * 64 * 2
    weights = 4 * 64 * 2
    assert kept_bytes(frozen(streams), backend=backend, invertible=False)[0] >= 2 * of_q
    assert kept_bytes(streams, backend=backend, invertible=True)[0] >= 2 * of_q
    kept, _ = kept_bytes(frozen(streams), backend=backend, invertible=True)
    assert kept == 2 * 25 * 3 * 2 * 4 + weights if backend == "triton" else kept >= 2 * of_q


@pytest.mark.parametrize(
    ("entries", "plain", "rotary"),
    [((1.0, -0.5), True, True), ((1.0, 0.0), False, False), ((1.0, 0.05), True, False), ((1.0, 1e-4), False, False),
     ((1.0, float("nan")), False, False), ((), False, False)],
)  # fmt: skip
def test_which_weights_are_invertible(entries, plain, rotary):
    weight = torch.tensor(entries)
    assert ops.is_invertible([None, torch.ones(2), weight], rotary=False) == plain
    assert ops.is_invertible([None, torch.ones(2), weight], rotary=True) == rotary
    assert not ops.is_invertible([torch.ones(2, device="meta")], rotary=False)


def test_frozen_weights_get_no_gradient(backend, device):
    streams = [s._replace(q_weight=s.q_weight.detach()) for s in make(device=device)]
    outputs = ops.qk_rms_norm(streams, head_size=64, backend=backend)
    sum((out * g).sum() for out, g in zip(outputs, upstream(outputs), strict=True)).backward()
    _, expected = run(make(device=device), backend)
    for i, stream in enumerate(streams):
        assert stream.q_weight.grad is None
        for kind in (0, 1, 2, 4):
            assert torch.equal(stream[kind].grad, expected[5 * i + kind])


def test_repeats_bit_for_bit_and_writes_into_no_input(backend, device):
    streams = make((21, 4), dtype=torch.bfloat16, device=device)
    rotary = angles(25, 64, device)
    before = [t.detach().clone() for s in streams for t in s]
    (one, one_grads), (other, other_grads) = (run(streams, backend, rotary=rotary) for _ in range(2))
    assert all(map(torch.equal, [*one, *one_grads], [*other, *other_grads]))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for s in streams for t in s), strict=True))


def test_a_head_keeps_its_direction_and_a_turn_its_length(backend, device):
    """The norm only scales: rms 1 without weight; a true rotation keeps products of q and k of equal angles."""
    (stream,) = make((6,), device=device)
    ones = stream._replace(q_weight=torch.ones(64, device=device), k_weight=torch.ones(64, device=device))
    turn = draw(6, 32, seed=8, device=device).repeat_interleave(2, 1)
    q, k, _ = ops.qk_rms_norm([ones], head_size=64, backend=backend)
    q_turned, k_turned, _ = ops.qk_rms_norm([ones], head_size=64, rotary=(turn.cos(), turn.sin()), backend=backend)
    torch.testing.assert_close(q.square().mean(-1), torch.ones_like(q[..., 0]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((q_turned * k_turned).sum(-1), (q * k).sum(-1), rtol=1e-4, atol=1e-4)


def test_large_and_tiny_values(backend, device):
    (stream,) = make((2,), device=device)
    for size in (1e-30, 1e15):
        scaled = ops.QKV(*((t.detach() * size).requires_grad_() for t in stream[:3]), *stream[3:])
        assert_right([scaled], backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_nan(dtype, backend, device):
    streams = make((2, 2), dtype=dtype, device=device)
    cos, sin = angles(4, 64, device)
    with torch.no_grad():
        streams[0].q[0, 1, 64] = float("nan")
        streams[1].v[1, 0, 3] = float("nan")
        cos.view(torch.int32)[3, 5] = -1  # the NaN whose bits are all set
    for rotary in (None, (cos, sin)):
        q, k, v = (out.isnan() for out in ops.qk_rms_norm(streams, head_size=64, rotary=rotary, backend=backend))
        assert q[0, 1, 1].all()
        assert q.sum() == 64 + (0 if rotary is None else 6)
        assert k.sum() == (0 if rotary is None else 6)
        assert v.nonzero().tolist() == [[1, 2, 0, 3]]


def test_nothing_to_do(backend, device):
    for tokens, batch in (((3, 2), 0), ((0, 2), 2), ((3, 0), 2), ((0,), 2)):
        streams = make(tokens, batch=batch, device=device)
        outputs, grads = run(streams, backend)
        assert outputs[0].shape == (batch, sum(tokens), 3, 64)
        assert all(g.shape == t.shape for g, t in zip(grads, (t for s in streams for t in s), strict=True))
        for grad, stream in ((grads[5 * i + 3], s) for i, s in enumerate(streams)):
            assert batch * stream.q.shape[1] or not grad.any()
    if backend != "torch":
        alone = make((3,), device=device)[0]
        packed = run([alone, make((0,), device=device)[0]], backend)
        assert torch.equal(packed[0][0], run([alone], backend)[0][0])


CPU = _compiled.extension().cpu


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CPU.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_same_on_every_instruction_set(dtype, name, threads):
    streams, rotary = make((37, 18), 9, 40, dtype=dtype), angles(55, 40)
    CPU.use_instruction_set("generic")
    (plain, plain_grads), before = run(streams, "cpp", size=40, rotary=rotary), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        CPU.use_instruction_set(name)
        found, found_grads = run(streams, "cpp", size=40, rotary=rotary)
    finally:
        torch.set_num_threads(before)
        CPU.use_instruction_set(CPU.instruction_sets()[-1])
    assert all(map(torch.equal, [*plain, *plain_grads], [*found, *found_grads]))


X, W = torch.zeros(2, 3, 8), torch.ones(4)
GOOD = ops.QKV(X, X, X, W, W)
REFUSALS = [
    ({"streams": []}, "streams is of length 0"),
    ({"streams": [GOOD] * 3}, "streams is of length 3; it takes one to 2"),
    ({"streams": [GOOD._replace(q=X.double())]}, r"streams\[0\].q is torch.float64"),
    ({"streams": [GOOD._replace(q=X[0])]}, r"streams\[0\].q is"),
    ({"streams": [GOOD._replace(k=X[:, :2])]}, r"streams\[0\].k is"),
    ({"streams": [GOOD._replace(v=X.bfloat16())]}, r"streams\[0\].v is torch.bfloat16"),
    ({"streams": [GOOD, GOOD._replace(q=X[:1])]}, r"streams\[1\].q is"),
    ({"streams": [GOOD, GOOD._replace(v=X.to("meta"))]}, r"streams\[1\].v is on meta"),
    ({"streams": [GOOD, GOOD._replace(v=None)]}, r"streams\[1\].v is NoneType"),
    ({"streams": [GOOD, GOOD._replace(q=None)]}, r"streams\[1\].q is NoneType"),
    ({"streams": [GOOD._replace(q_weight=W[:3])]}, r"streams\[0\].q_weight is"),
    ({"streams": [GOOD, GOOD._replace(k_weight=W.bfloat16())]}, r"streams\[1\].k_weight is torch.bfloat16"),
    ({"head_size": 3}, r"streams\[0\].q is \[2, 3, 8\]; it takes \[B, S, H \* 3\]"),
    ({"head_size": 0}, "head_size is 0"),
    ({"head_size": 257}, "head_size is 257"),
    ({"head_size": 4.0}, "head_size is 4.0"),
    ({"eps": -1.0}, "eps is -1.0"),
    ({"eps": float("nan")}, "eps is nan"),
    ({"rotary": (X[0, :, :4],)}, "rotary is tuple; it takes a pair"),
    ({"rotary": (X[0, :, :4], X[0, :2, :4])}, "rotary sin is"),
    ({"rotary": (X[0, :, :4].double(), X[0, :, :4])}, "rotary cos is torch.float64"),
    ({"rotary": (X[0, :, :4].clone().requires_grad_(), X[0, :, :4])}, "rotary cos is one that requires a gradient"),
    ({"rotary": (X[0, :, :1], X[0, :, :1]), "head_size": 1, "streams": [ops.QKV(X, X, X)]}, "head_size is 1"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"backend": "fast"}, "backend is 'fast'"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"qk_rms_norm: {message}"):
        ops.qk_rms_norm(**{"streams": [GOOD], "head_size": 4} | bad)
