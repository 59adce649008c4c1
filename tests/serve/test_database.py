"""What is acknowledged is on disk, once: numbers, keys, and the newest opinion."""

import sqlite3

import pytest

from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.serve.database import STORE_NAME, Database
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.queue import Queue
from fdfo_engine.serve.rounds import Rounds, StoredPair


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path)
    yield database
    database.close()


@pytest.fixture
def queue(database):
    return Queue(database)


@pytest.fixture
def rounds(database):
    return Rounds(database)


@pytest.fixture
def open_round(queue, rounds):
    """Round r1 of pairs 4 and 5."""
    queue.enqueue("sample", {})
    pairs = [StoredPair(n, f"prompt {n}", 0.5, (f"{n}a", f"{n}b")) for n in (4, 5)]
    rounds.add_round("r1", 1, first_pair=4, sampled=2, weights_version=0, epoch=0, pairs=pairs)
    return "r1"


def opinion(pair, rewards, rater="ann"):
    return {"pair": pair, "rater": rater, "kind": "choice", "rewards": rewards, "details": {}}


def refused(code, action, *arguments, **named):
    with pytest.raises(Problem) as caught:
        action(*arguments, **named)
    assert caught.value.body.code == code
    return caught.value.body


def test_operations_come_out_in_the_order_in_which_they_went_in(queue):
    numbers = [queue.enqueue("sample", {"count": n}).id for n in (3, 1, 2)]
    taken = []
    while (operation := queue.start_next()) is not None:
        taken.append((operation.id, operation.body["count"], operation.state))
        queue.finish(operation.id, {"n": operation.id})
    assert taken == [(number, count, "running") for number, count in zip(numbers, (3, 1, 2), strict=True)]
    assert [op.result for op in queue.operations("done")] == [{"n": number} for number in numbers]


def test_a_number_is_taken_once_in_order_and_only_by_one_body(queue):
    first = queue.enqueue("forward", {"round": "r1"}, seq=1)
    assert queue.enqueue("forward", {"round": "r1"}, seq=1) == first
    assert refused("seq_reused", queue.enqueue, "forward", {"round": "r2"}, seq=1).status == 422
    assert refused("seq_reused", queue.enqueue, "sample", {"round": "r1"}, seq=1).status == 422
    gap = refused("seq_gap", queue.enqueue, "forward", {}, seq=3)
    assert (gap.status, gap.expected_seq) == (409, 2)
    queue.enqueue("forward", {}, seq=2)
    assert queue.expected_seq == 3
    assert len(queue.operations("queued")) == 2


def test_a_key_gives_the_same_operation_after_a_restart(database, queue, tmp_path):
    first = queue.enqueue("sample", {"prompts": ["ä", "b"]}, key="k")
    database.close()
    reopened = Database(tmp_path)
    again = Queue(reopened)
    assert again.enqueue("sample", {"prompts": ["ä", "b"]}, key="k").id == first.id
    assert refused("key_reused", again.enqueue, "sample", {"prompts": ["b", "ä"]}, key="k").status == 422
    assert len(again.operations("queued")) == 1
    reopened.close()


def test_the_newest_opinion_of_a_pair_and_rater_counts(rounds, open_round):
    rounds.add_feedback(open_round, [opinion(4, (1.0, 0.0)), opinion(5, (0.5, 0.5))])
    rounds.add_feedback(open_round, [opinion(4, (0.0, 1.0))])
    rounds.add_feedback(open_round, [opinion(4, (1.0, 0.0), rater="bob")])
    found = {(o.pair, o.rater): o.rewards for o in rounds.opinions(open_round)}
    assert found == {(4, "ann"): (0.0, 1.0), (5, "ann"): (0.5, 0.5), (4, "bob"): (1.0, 0.0)}


def test_undo_goes_back_as_often_as_wanted(rounds, open_round):
    events = [rounds.add_feedback(open_round, [opinion(4, (float(n), 0.0))])[0] for n in range(3)]
    assert rounds.withdraw(open_round, events[2]) == (4, events[1])
    assert rounds.withdraw(open_round, events[2]) == (4, events[1])  # a repeated request changes nothing
    assert rounds.opinions(open_round)[0].rewards == (1.0, 0.0)
    assert rounds.withdraw(open_round, events[0]) == (4, events[1])  # an older one below the newest
    assert rounds.withdraw(open_round, events[1]) == (4, None)
    assert rounds.opinions(open_round) == []
    assert refused("no_feedback", rounds.withdraw, open_round, 99).status == 404


def test_a_sealed_round_keeps_its_opinions(rounds, open_round):
    (event,) = rounds.add_feedback(open_round, [opinion(4, (1.0, 0.0))], key="k")
    rounds.seal(open_round)
    assert refused("round_sealed", rounds.add_feedback, open_round, [opinion(5, (1.0, 0.0))]).status == 409
    assert refused("round_sealed", rounds.withdraw, open_round, event).status == 409
    assert rounds.add_feedback(open_round, [opinion(4, (1.0, 0.0))], key="k") == [event]  # the stored answer
    assert [o.event for o in rounds.opinions(open_round)] == [event]


def test_a_request_for_feedback_is_recorded_once(rounds, open_round):
    request = [opinion(4, (1.0, 0.0)), opinion(5, (0.0, 1.0))]
    events = rounds.add_feedback(open_round, request, key="k")
    assert rounds.add_feedback(open_round, request, key="k") == events
    assert rounds.last_feedback == events[-1]
    assert refused("key_reused", rounds.add_feedback, open_round, request[:1], key="k").status == 422


def test_of_a_request_all_or_nothing_is_recorded(rounds, open_round):
    with pytest.raises(sqlite3.IntegrityError):
        rounds.add_feedback(open_round, [opinion(4, (1.0, 0.0)), opinion(77, (1.0, 0.0))])
    assert rounds.opinions(open_round) == []


def test_a_round_is_added_once(rounds, open_round):
    pairs = rounds.pairs(open_round)
    rounds.seal(open_round)
    rounds.add_round(open_round, 1, first_pair=4, sampled=2, weights_version=0, epoch=0, pairs=pairs)
    assert rounds.round(open_round)["state"] == "sealed"
    assert rounds.pair_of_image("5b") == (pairs[1], open_round)
    assert rounds.pair_of_image("nothing") is None


def test_a_damaged_or_newer_file_is_told(tmp_path):
    (tmp_path / STORE_NAME).write_bytes(b"no database" * 100)
    with pytest.raises(CheckpointError, match=r"serve\.sqlite: "):
        Database(tmp_path)
    (tmp_path / STORE_NAME).unlink()
    Database(tmp_path).close()
    with sqlite3.connect(tmp_path / STORE_NAME) as db:
        db.execute("PRAGMA user_version = 9")
    with pytest.raises(CheckpointError, match="of version 9, this is 1"):
        Database(tmp_path)
