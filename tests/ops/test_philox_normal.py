import pytest
import torch
from numerics import assert_as_good_as, error
from ops.exact import check, noise

from fdfo_engine.ops import SCALAR_STREAM, pair_scalar_normal, philox_normal

SHAPES = [(1,), (3, 7, 5), (4, 4), (4097,)]  # one element, odd sizes, a multiple of 4, one past a block of counters
PAIRS, SEED = [0, 2**40 + 3, 2**63 - 1], 2**63 + 5


def sample(shape=(3, 7, 5), pairs=PAIRS, **other):
    return philox_normal(shape, **({"seed": SEED, "pair_ids": pairs, "stream": SCALAR_STREAM, "device": "cpu"} | other))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value(shape, backend, device):
    exact = torch.stack([torch.as_tensor(noise(shape, seed=SEED, pair=p, stream=SCALAR_STREAM)) for p in PAIRS])
    plain, fast = (sample(shape, device=device, backend=b).cpu() for b in ("torch", backend))
    check(plain, exact, "torch")
    assert_as_good_as(fast, plain, exact, name=backend)
    assert error(fast, plain) < 4e-6


def test_a_real_latent_agrees_between_backends(backend, device):
    plain, fast = (sample((16, 64, 64), [7], device=device, backend=b) for b in ("torch", backend))
    assert error(fast, plain) < 4e-6


def test_reaches_both_tails():
    """u is exact next to 0 and to 1: no infinity, and nothing snaps to 0."""
    values = sample((2**20,), [1])
    assert torch.isfinite(values).all()
    assert 4.5 < values.abs().max() < 5.8
    assert values.abs().min() > 0


def test_repeats_bit_for_bit(backend, device):
    assert torch.equal(sample(device=device, backend=backend), sample(device=device, backend=backend))


def test_depends_on_its_address_only(backend, device):
    whole = sample(backend=backend, device=device)
    for i, pair in enumerate(PAIRS):
        assert torch.equal(sample(pairs=[pair], backend=backend, device=device)[0], whole[i])
    assert torch.equal(sample(pairs=PAIRS[::-1], backend=backend, device=device), whole.flip(0))
    assert torch.equal(sample((200,), backend=backend, device=device)[:, :105], whole.flatten(1))


def test_takes_strided_and_tensor_ids_and_a_stream_a_row(backend, device):
    where = {"device": device, "backend": backend}
    table = torch.tensor([PAIRS, PAIRS], device=device).t()  # ids at a stride of 2
    assert torch.equal(sample(pairs=table[:, 0], **where), sample(**where))
    streams = torch.tensor([5, 9, 5])
    mixed = sample(stream=streams, **where)
    for i, stream in enumerate(streams.tolist()):
        assert torch.equal(mixed[i], sample(stream=stream, **where)[i])


@pytest.mark.parametrize("change", [{"seed": SEED - 2**63}, {"seed": SEED + 1}, {"stream": 4}, {"pairs": [3, 2, 1]}])
def test_every_part_of_the_address_counts(change):
    """Also the high words of seed and pair: values are as good as independent."""
    a, b = sample((4096,)), sample((4096,), **change)
    assert (a * b).mean(1).abs().max() < 0.07
    high, low = sample((4096,), [2**32 + 1, 1])
    assert (high * low).mean().abs() < 0.07


def test_is_standard_normal():
    values = sample((2**16,), [5]).double()
    assert values.mean().abs() < 0.02
    assert (values.var() - 1).abs() < 0.03
    assert (values.pow(4).mean() - 3).abs() < 0.1
    neighbours = [(values[:, lag:] * values[:, :-lag]).mean().abs() for lag in (1, 2, 3, 4)]
    assert max(neighbours) < 0.02


def test_no_pairs(backend, device):
    assert sample(pairs=[], backend=backend, device=device).shape == (0, 3, 7, 5)


def test_pair_scalar_is_element_0_of_its_stream():
    scalars = pair_scalar_normal(PAIRS, seed=SEED)
    assert scalars.dtype == torch.float64
    check(scalars.float(), [noise((1,), seed=SEED, pair=p, stream=2**31)[0] for p in PAIRS], "scalar")
    assert pair_scalar_normal([], seed=SEED).shape == (0,)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"shape": ()}, "shape is"),
        ({"shape": (3, 0)}, "shape is"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": True}, "seed is"),
        ({"pairs": [-1]}, "pair_ids is -1"),
        ({"pairs": [2**63]}, "pair_ids is"),
        ({"pairs": [0.5]}, "pair_ids is"),
        ({"pairs": torch.tensor([0.5])}, "pair_ids is torch.float32"),
        ({"pairs": torch.zeros(2, 2, dtype=torch.int64)}, "pair_ids is"),
        ({"pairs": torch.zeros(2, dtype=torch.int64, device="meta")}, "pair_ids is"),
        ({"stream": 2**32}, "stream is"),
        ({"stream": -1, "pairs": []}, "stream is"),
        ({"stream": torch.tensor([1, 2])}, "stream is of length 2"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": "meta"}, "no backend can run on meta"),
        ({"backend": "fast"}, "backend is 'fast'"),
    ],
    ids=str,
)
def test_refuses(bad, message):
    with pytest.raises(ValueError, match=f"philox_normal: .*{message}"):
        sample(**bad)
