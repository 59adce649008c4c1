"""Sequences of requests that a client may come upon: none deadlocks, and the queue's promises hold after each."""

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from serve.serving import served, shapes_config

from fdfo_engine.client import ServerError


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with served(
        shapes_config(tmp_path_factory.mktemp("sequences"), "sampling.steps=2", "update.train_steps=2")
    ) as client:
        yield client


def refusal(request, *arguments, **named):
    """The server's error, or None where it did as asked."""
    try:
        request(*arguments, **named)
    except ServerError as error:
        return error
    return None


class Requests(RuleBasedStateMachine):
    """A client without a plan. Its own limit of time is the test of deadlocks: every request is answered within it."""

    client = None

    def __init__(self):
        super().__init__()
        self.rounds, self.closed = [], False
        self.opinions = {}
        self.discard_gradient()

    def discard_gradient(self):
        """An earlier sequence may have left one: `snapshot` drops it."""
        self.client.snapshot()

    @rule(copies=st.integers(1, 2))
    def sample(self, copies):
        sampled = self.client.sample(["a red circle"], copies=copies)
        assert len(sampled["pairs"]) == copies
        self.rounds.append((sampled["round"], sampled["pairs"]))

    @precondition(lambda self: self.rounds)
    @rule(data=st.data(), part=st.integers(0, 2), more=st.booleans())
    def forward_backward(self, data, part, more):
        name, pairs = data.draw(st.sampled_from(self.rounds))
        rewards = {pair["pair_id"]: [1.0, 0.0] for pair in pairs}
        error = refusal(
            self.client.forward_backward, name, rewards=rewards, part=part, more=more, allow_stale=True
        )  # fmt: skip
        if error is None:
            assert not self.closed
            self.closed = not more
        else:
            assert error.status in (409, 410)
            assert part == 2 or self.closed or error.status == 410, error

    @rule()
    def optim_step(self):
        error = refusal(self.client.optim_step)
        assert (error is None) == self.closed, error
        assert error is None or error.status == 409
        self.closed = False if error is None else self.closed

    @rule()
    def snapshot(self):
        before = self.client.run()["epoch"]
        assert self.client.snapshot()["epoch"] == before + 1
        self.closed = False

    @precondition(lambda self: self.rounds)
    @rule(data=st.data(), choice=st.sampled_from(["left", "right", "tie", "skip"]))
    def judge(self, data, choice):
        name, pairs = data.draw(st.sampled_from(self.rounds))
        pair = data.draw(st.sampled_from(pairs))["pair_id"]
        error = refusal(self.client.feedback, name, [{"pair_id": pair, "choice": choice}], rater="ann")
        if error is None:
            self.opinions.setdefault(name, {})[pair] = choice
        else:
            assert error.code == "round_sealed", error

    @precondition(lambda self: self.rounds)
    @rule(data=st.data())
    def train(self, data):
        name, _ = data.draw(st.sampled_from(self.rounds))
        error = refusal(self.client.train, name)
        if error is None:
            assert self.client.round(name)["state"] == "trained"
            self.closed = False
        else:
            assert error.status in (409, 410), error

    @rule()
    def save(self):
        error = refusal(self.client.save_state)
        assert error is None or error.status == 409, error

    @invariant()
    def the_queue_is_empty_and_opinions_are_kept(self):
        assert self.client.run()["queued"] == 0
        for name, opinions in self.opinions.items():
            counted = sum(choice != "skip" for choice in opinions.values())
            assert self.client.round(name)["labelled"] == counted


def test_no_sequence_of_requests_deadlocks_or_loses_an_opinion(client, request):
    Requests.client = client
    examples = 40 if request.config.getoption("-m") == "slow or not slow" else 2
    run_state_machine_as_test(
        Requests,
        settings=settings(
            max_examples=examples, stateful_step_count=12, deadline=None, derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip
