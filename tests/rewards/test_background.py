"""Scoring in a thread: same order, same scores, bounded, and a failure surfaces once."""

import socket
import threading
import time

import pytest
import torch

from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.rewards import background as background_module
from fdfo_engine.rewards.background import BackgroundScorer
from fdfo_engine.runtime.errors import RewardError, Stopped


def blocks(count):
    return [torch.full((2, 3, 4, 4), float(i)) for i in range(count)]


def score(reward, count=6, overlap=True, between_s=0.0):
    with BackgroundScorer(WeightedRewards({"mine": (2.0, reward)}), overlap=overlap) as scorer:
        for block in blocks(count):
            while not scorer.has_room():
                pass
            scorer.submit(["a", "b"], block)
            time.sleep(between_s)
        return scorer.scores(), scorer


def mean(prompts, images):
    return images.mean((1, 2, 3)) + torch.tensor([0.0, 0.5])


@pytest.mark.parametrize("overlap", [True, False])
def test_scores_come_in_the_order_of_the_blocks(overlap):
    scores, _ = score(mean, overlap=overlap)
    expected = torch.arange(6.0).repeat_interleave(2) + torch.tensor([0.0, 0.5]).repeat(6)
    assert torch.equal(scores["mine"], expected)


def slow(prompts, images):
    time.sleep(0.05)
    return mean(prompts, images)


def test_scoring_hides_behind_sampling():
    _, hidden = score(slow, between_s=0.06)
    assert hidden.busy_s > 0.3
    assert hidden.hidden_s > 0.5 * hidden.busy_s
    _, waited = score(slow, overlap=False)
    assert waited.hidden_s < 0.1 * waited.busy_s


def test_only_so_many_blocks_wait(monkeypatch):
    monkeypatch.setattr(background_module, "MAX_BLOCKS_WAITING", 2)
    gate, scored = threading.Event(), []

    def gated(prompts, images):
        gate.wait(10)
        scored.append(images[0, 0, 0, 0].item())
        return mean(prompts, images)

    submitted = []
    with BackgroundScorer(WeightedRewards({"mine": (1.0, gated)})) as scorer:

        def submit_all():
            for i, block in enumerate(blocks(5)):
                while not scorer.has_room():
                    pass
                scorer.submit(["a", "b"], block)
                submitted.append(i)

        caller = threading.Thread(target=submit_all)
        caller.start()
        time.sleep(0.2)
        assert submitted == [0, 1]
        gate.set()
        caller.join()
        scorer.scores()
    assert scored == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("overlap", [True, False])
def test_after_a_failure_nothing_more_is_scored(overlap):
    calls = []

    def breaks(prompts, images):
        calls.append(1)
        if len(calls) == 2:
            raise RewardError("the server is gone")
        return mean(prompts, images)

    with pytest.raises(RewardError, match="the server is gone"):
        score(breaks, overlap=overlap)
    assert len(calls) == 2


def test_a_run_that_stops_does_not_wait(monkeypatch):
    """A server that is away is waited for until the run is told to stop."""
    monkeypatch.setattr(background_module, "_POLL_S", 0.01)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    rewards = WeightedRewards({"mine": (1.0, build(url, {"give_up_after_s": 600.0}, "x"))})
    started, polls = time.monotonic(), []

    def poll():
        polls.append(1)
        return len(polls) >= 20

    with pytest.raises(Stopped), BackgroundScorer(rewards, poll=poll) as scorer:  # noqa: PT012
        for block in blocks(8):
            scorer.submit(["a", "b"], block)
        scorer.scores()
    assert len(polls) >= 20
    assert time.monotonic() - started < 10


def test_no_gradients_in_the_thread():
    seen = []
    score(lambda prompts, images: seen.append(torch.is_grad_enabled()) or mean(prompts, images), count=1)
    assert seen == [False]


def test_equal_warnings_of_an_epoch_are_one_line_and_a_count(capsys):
    def fails(prompts, images):
        raise ValueError("no logprobs")

    scores, _ = score(fails, count=8)
    assert torch.isnan(scores["mine"]).all()
    place = f"{__file__}:{fails.__code__.co_firstlineno + 1}, in fails"
    first = f"warning: reward 'mine': ValueError: no logprobs ({place}); trying once more"
    second = f"warning: reward 'mine': ValueError: no logprobs ({place}); no opinion on this batch"
    more = [line.replace("warning: ", "warning: 7 more like this: ") for line in (first, second)]
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("warning")] == [first, second, *more]
    assert told[1] == "Traceback (most recent call last):"
    assert told.count("ValueError: no logprobs") == 1
