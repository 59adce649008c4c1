import pytest
import torch
from ops.exact import check, draw, noise, prior, step, wide

from fdfo_engine.ops import paired_noise, paired_step, replay

PAIRS, SEED, STEPS = [3, 2**33 + 1, 0, 8], 2**40 + 9, 5
SIGMAS = torch.tensor([1.0, 0.9, 0.7, 0.45, 0.2, 0.0])


def schedules():
    raw = torch.full((STEPS + 1,), 0.0025, dtype=torch.float64)
    prior_ = torch.zeros(4, STEPS + 1, dtype=torch.float64)
    prior_[:, 0] = torch.tensor([0.1, 0.4, 0.02, 1.0])
    interval = torch.rand(4, STEPS + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    interval[1] = interval[:, 2] = 0
    for gammas in (raw, prior_, interval):
        gammas[..., -1] = 0
    return {"raw": raw, "prior": prior_, "interval": interval, "float32": interval.float(), "none": 0.0}


def sampled(gammas, dtype, backend, device, shape=(2, 3, 5), solver="churn"):
    """Latents `[P, 2, T + 1, *shape]` and velocities of a run with a nonlinear model."""
    table = torch.as_tensor(gammas, dtype=torch.float64).expand(4, STEPS + 1)
    of_all = {"seed": SEED, "solver": solver, "backend": backend}
    x = paired_noise(PAIRS, shape, gamma=table[:, 0], device=device, **of_all)
    velocities = torch.empty(4, 2, STEPS, *shape, dtype=dtype, device=device)
    latents = [x.clone()]
    for i in range(STEPS):
        v, v_uncond = torch.tanh(1.3 * x).to(dtype), (0.5 * x).to(dtype)
        x = paired_step(
            x, v, sigma=float(SIGMAS[i]), sigma_next=float(SIGMAS[i + 1]), gamma=table[:, i + 1],
            pair_ids=PAIRS, step=i, v_uncond=v_uncond, guidance_scale=2.0, v_out=velocities[:, :, i], inplace=True,
            **of_all,
        )  # fmt: skip
        latents.append(x.clone())
    return torch.stack(latents, 2), velocities


@pytest.fixture
def run(backend):
    """`replay` of one backend."""

    def run(velocities, gammas, pair, branch, step, **other):
        settings = {"pair_ids": PAIRS, "sigmas": SIGMAS, "seed": SEED, "backend": backend} | other
        return replay(velocities, pair=pair, branch=branch, step=step, gammas=gammas, **settings)

    return run


def every_item():
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(STEPS + 1))
    return grid[torch.randperm(len(grid), generator=torch.Generator().manual_seed(1))].unbind(1)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        *((torch.float32, name) for name in schedules()),
        (torch.bfloat16, "interval"),
        *(pytest.param(torch.bfloat16, name, marks=pytest.mark.slow) for name in schedules() if name != "interval"),
        *(pytest.param(torch.float16, name, marks=pytest.mark.slow) for name in schedules()),
    ],
    ids=str,
)
def test_is_sampling_bit_for_bit(dtype, name, device, run, backend):
    gammas = schedules()[name]
    latents, velocities = sampled(gammas, dtype, backend, device)
    pair, branch, step_ = (index[:16] for index in every_item()) if backend == "triton" else every_item()
    assert torch.equal(run(velocities, gammas, pair, branch, step_), latents[pair, branch, step_])


def test_antithetic_sampling_bit_for_bit(device, run, backend):
    gammas = schedules()["interval"]
    latents, velocities = sampled(gammas, torch.bfloat16, backend, device, solver="antithetic")
    pair, branch, step_ = every_item()
    x = run(velocities, gammas, pair, branch, step_, solver="antithetic")
    assert torch.equal(x, latents[pair, branch, step_])
    assert not torch.equal(x, run(velocities, gammas, pair, branch, step_))


def test_a_churn_whose_coefficients_round_by_a_hair(run, backend, device):
    """Here `s / (1 + g - g*s)` and `s * (1 / (1 + g - g*s))` differ enough to round to other float32 coefficients."""
    k, gamma, grid = 17, 0.004200614217197468, torch.linspace(1, 0, 41, dtype=torch.float64)
    sigmas = (3 * grid / (1 + 2 * grid)).float()
    velocities = torch.zeros(1, 2, 40, 4096, device=device)
    velocities[:, :, k] = draw(1, 2, 4096, device=device)
    before, after = (run(velocities, gamma, [0, 0], [0, 1], [i, i], pair_ids=[5], sigmas=sigmas) for i in (k, k + 1))
    sampled = paired_step(
        before[None], velocities[:, :, k], sigma=float(sigmas[k]), sigma_next=float(sigmas[k + 1]), gamma=gamma, step=k,
        seed=SEED, pair_ids=[5], backend=backend,
    )  # fmt: skip
    assert torch.equal(after, sampled[0])


def test_value(run, device):
    gammas = schedules()["interval"]
    velocities = draw(4, 2, STEPS, 3, 7, device=device)
    for pair, branch in ((0, 1), (2, 0)):
        g = gammas[pair].tolist()
        x = prior((3, 7), seed=SEED, pair=PAIRS[pair], branch=branch, gamma=g[0])
        for i in range(STEPS):
            eps = noise((3, 7), seed=SEED, pair=PAIRS[pair], stream=3 + 2 * i + branch)
            ends = {"t": float(SIGMAS[i]), "s": float(SIGMAS[i + 1])}
            x = step(x, wide(velocities)[pair, branch, i], gamma=g[i + 1], eps=eps, **ends)
        check(run(velocities, gammas, [pair], [branch], [STEPS])[0], x, "final latent")


def test_one_element_and_several_blocks(device, run, backend):
    for shape in ((1,), (4, 24, 24)):
        latents, velocities = sampled(0.0025, torch.bfloat16, backend, device, shape)
        assert torch.equal(run(velocities, 0.0025, [2, 2], [1, 1], [3, 5]), latents[2, 1, [3, 5]])


def test_strided_velocities_and_repeated_items(run, backend, device):
    gammas = schedules()["interval"]
    latents, velocities = sampled(gammas, torch.bfloat16, backend, device)
    strided = velocities.movedim(2, -1).contiguous().movedim(-1, 2)
    items = [1, 3, 1, 1], [0, 1, 0, 1], [4, 2, 4, 1]
    expected = latents[items]
    assert torch.equal(run(strided, gammas, *items), expected)
    assert torch.equal(run(strided, gammas, *items), expected)


def test_sigmas_may_be_a_list(run, backend, device):
    latents, velocities = sampled(0.01, torch.bfloat16, backend, device)
    assert torch.equal(run(velocities, 0.01, [1], [0], [5], sigmas=SIGMAS.tolist()), latents[[1], [0], [5]])


def test_reads_only_what_it_walks(monkeypatch, run, backend, device):
    """Other rows, branches and later steps may be garbage, and the reference draws no noise for them."""
    gammas = torch.tensor([0.1, 0.1, 0.0, 0.1, 0.1, 0.0])
    latents, velocities = sampled(gammas, torch.bfloat16, backend, device)
    kept = velocities[2, 1, :2].clone()
    velocities.fill_(float("nan"))
    velocities[2, 1, :2] = kept
    from fdfo_engine.ops import _trajectory

    draws, original = [], _trajectory.philox_normal
    monkeypatch.setattr(
        _trajectory, "philox_normal", lambda *a, **k: draws.append(len(k["pair_ids"])) or original(*a, **k)
    )
    assert torch.equal(run(velocities, gammas, [2, 2], [1, 1], [2, 1]), latents[2, 1, [2, 1]])
    assert draws == ([1, 1, 1] if backend == "torch" else [])  # shared, prior, step 0; step 1 has no churn


def test_no_items(run, backend, device):
    _, velocities = sampled(0.0, torch.bfloat16, backend, device)
    assert run(velocities, 0.1, [], [], []).shape == (0, 2, 3, 5)
    assert run(velocities[:0], 0.1, [], [], [], pair_ids=[]).shape == (0, 2, 3, 5)


ONE = torch.zeros(4, 2, STEPS, 3)
REFUSALS = [
    ({"velocities": ONE[:, 0]}, "velocities is"),
    ({"velocities": ONE.double()}, "velocities is torch.float64"),
    ({"velocities": ONE[..., :0]}, "velocities is"),
    ({"velocities": ONE[:, :, :, 0]}, "velocities is"),
    ({"pair_ids": PAIRS[:3]}, "pair_ids is of length 3"),
    ({"pair": [4]}, "pair is 4"),
    ({"pair": torch.tensor([-1])}, "pair is -1"),
    ({"pair": torch.tensor([0.0])}, "pair is torch.float32"),
    ({"branch": [2]}, "branch is 2"),
    ({"branch": [0, 1]}, "branch is of length 2"),
    ({"step": [STEPS + 1]}, "step is 6"),
    ({"step": [[1]]}, "step is"),
    ({"sigmas": SIGMAS[1:]}, "sigmas is"),
    ({"sigmas": SIGMAS.flip(0)}, "sigmas is"),
    ({"sigmas": [1.0, 0.5]}, "sigmas is of length 2"),
    ({"sigmas": [1.0, 0.9, 0.7, 0.7, 0.2, 0.0]}, "sigmas is"),
    ({"sigmas": [float("nan")] * 6}, "sigmas is nan"),
    ({"gammas": -0.1}, "gammas is"),
    ({"gammas": torch.zeros(5)}, "gammas is"),
    ({"gammas": torch.zeros(3, 6)}, "gammas is"),
    ({"seed": -1}, "seed is"),
    ({"backend": "fast"}, "backend is"),
]


@pytest.mark.parametrize(("bad", "message"), REFUSALS, ids=[f"{i}-{m}" for i, (_, m) in enumerate(REFUSALS)])
def test_refuses(bad, message):
    items = {"velocities": ONE, "gammas": 0.0, "pair": [0], "branch": [0], "step": [1]}
    with pytest.raises(ValueError, match=f"replay: {message}"):
        replay(**{"pair_ids": PAIRS, "sigmas": SIGMAS, "seed": SEED} | items | bad)
