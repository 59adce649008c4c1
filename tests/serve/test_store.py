"""What is acknowledged is on disk, once: numbers, keys, and the newest opinion."""

import sqlite3

import pytest

from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.store import STORE_NAME, Store, StoredPair


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


@pytest.fixture
def open_round(store):
    """Round r1 of pairs 4 and 5."""
    store.enqueue("sample", {})
    pairs = [StoredPair(n, f"prompt {n}", 0.5, (f"{n}a", f"{n}b")) for n in (4, 5)]
    store.add_round("r1", 1, first_pair=4, sampled=2, weights_version=0, epoch=0, pairs=pairs)
    return "r1"


def opinion(pair, rewards, rater="ann"):
    return {"pair": pair, "rater": rater, "kind": "choice", "rewards": rewards, "details": {}}


def refused(code, action, *arguments, **named):
    with pytest.raises(Problem) as caught:
        action(*arguments, **named)
    assert caught.value.body.code == code
    return caught.value.body


def test_operations_come_out_in_the_order_in_which_they_went_in(store):
    numbers = [store.enqueue("sample", {"count": n}).id for n in (3, 1, 2)]
    taken = []
    while (operation := store.start_next()) is not None:
        taken.append((operation.id, operation.body["count"], operation.state))
        store.finish(operation.id, {"n": operation.id})
    assert taken == [(number, count, "running") for number, count in zip(numbers, (3, 1, 2), strict=True)]
    assert [op.result for op in store.operations("done")] == [{"n": number} for number in numbers]


def test_a_number_is_taken_once_in_order_and_only_by_one_body(store):
    first = store.enqueue("forward", {"round": "r1"}, seq=1)
    assert store.enqueue("forward", {"round": "r1"}, seq=1) == first
    assert refused("seq_reused", store.enqueue, "forward", {"round": "r2"}, seq=1).status == 422
    assert refused("seq_reused", store.enqueue, "sample", {"round": "r1"}, seq=1).status == 422
    gap = refused("seq_gap", store.enqueue, "forward", {}, seq=3)
    assert (gap.status, gap.expected_seq) == (409, 2)
    store.enqueue("forward", {}, seq=2)
    assert store.expected_seq == 3
    assert len(store.operations("queued")) == 2


def test_a_key_gives_the_same_operation_after_a_restart(store, tmp_path):
    first = store.enqueue("sample", {"prompts": ["ä", "b"]}, key="k")
    store.close()
    again = Store(tmp_path)
    assert again.enqueue("sample", {"prompts": ["ä", "b"]}, key="k").id == first.id
    assert refused("key_reused", again.enqueue, "sample", {"prompts": ["b", "ä"]}, key="k").status == 422
    assert len(again.operations("queued")) == 1
    again.close()


def test_the_newest_opinion_of_a_pair_and_rater_counts(store, open_round):
    store.add_feedback(open_round, [opinion(4, (1.0, 0.0)), opinion(5, (0.5, 0.5))])
    store.add_feedback(open_round, [opinion(4, (0.0, 1.0))])
    store.add_feedback(open_round, [opinion(4, (1.0, 0.0), rater="bob")])
    found = {(o.pair, o.rater): o.rewards for o in store.opinions(open_round)}
    assert found == {(4, "ann"): (0.0, 1.0), (5, "ann"): (0.5, 0.5), (4, "bob"): (1.0, 0.0)}


def test_undo_goes_back_as_often_as_wanted(store, open_round):
    events = [store.add_feedback(open_round, [opinion(4, (float(n), 0.0))])[0] for n in range(3)]
    assert store.withdraw(open_round, events[2]) == (4, events[1])
    assert store.withdraw(open_round, events[2]) == (4, events[1])  # a repeated request changes nothing
    assert store.opinions(open_round)[0].rewards == (1.0, 0.0)
    assert store.withdraw(open_round, events[0]) == (4, events[1])  # an older one below the newest
    assert store.withdraw(open_round, events[1]) == (4, None)
    assert store.opinions(open_round) == []
    assert refused("no_feedback", store.withdraw, open_round, 99).status == 404


def test_a_sealed_round_keeps_its_opinions(store, open_round):
    (event,) = store.add_feedback(open_round, [opinion(4, (1.0, 0.0))], key="k")
    store.seal(open_round)
    assert refused("round_sealed", store.add_feedback, open_round, [opinion(5, (1.0, 0.0))]).status == 409
    assert refused("round_sealed", store.withdraw, open_round, event).status == 409
    assert store.add_feedback(open_round, [opinion(4, (1.0, 0.0))], key="k") == [event]  # the stored answer
    assert [o.event for o in store.opinions(open_round)] == [event]


def test_a_request_for_feedback_is_recorded_once(store, open_round):
    request = [opinion(4, (1.0, 0.0)), opinion(5, (0.0, 1.0))]
    events = store.add_feedback(open_round, request, key="k")
    assert store.add_feedback(open_round, request, key="k") == events
    assert store.last_feedback == events[-1]
    assert refused("key_reused", store.add_feedback, open_round, request[:1], key="k").status == 422


def test_of_a_request_all_or_nothing_is_recorded(store, open_round):
    with pytest.raises(sqlite3.IntegrityError):
        store.add_feedback(open_round, [opinion(4, (1.0, 0.0)), opinion(77, (1.0, 0.0))])
    assert store.opinions(open_round) == []


def test_a_round_is_added_once(store, open_round):
    pairs = store.pairs(open_round)
    store.seal(open_round)
    store.add_round(open_round, 1, first_pair=4, sampled=2, weights_version=0, epoch=0, pairs=pairs)
    assert store.round(open_round)["state"] == "sealed"
    assert store.pair_of_image("5b") == (pairs[1], open_round)
    assert store.pair_of_image("nothing") is None


def test_a_damaged_or_newer_file_is_told(tmp_path):
    (tmp_path / STORE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match=r"serve\.sqlite: "):
        Store(tmp_path)
    (tmp_path / STORE_NAME).unlink()
    Store(tmp_path).close()
    with sqlite3.connect(tmp_path / STORE_NAME) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(CheckpointError, match="of version 9, this is 1"):
        Store(tmp_path)
