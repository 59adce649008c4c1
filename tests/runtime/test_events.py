"""Events, and the file of them."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fdfo_engine.runtime import events
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.event_log import EventLog, read_events, truncate_events
from fdfo_engine.runtime.events import EventStream, events_schema, parse_event

ROOT = Path(__file__).resolve().parents[2]
ONE_OF_EACH = [
    events.State(epoch=0, state="starting", epochs=3),
    events.Phase(epoch=1, name="rollout", done=2, total=8, eta_s=1.5, per_second=4.0),
    events.Pair(epoch=1, pair=7, prompt="two \u2028 dogs\n", images=("a", "b")),
    events.Feedback(epoch=1, pair=7, rater="ann", rewards=(0.5, -0.5)),
    events.Metrics(epoch=1, kind="epoch", values={"loss": float("nan"), "kernel_backend": "cpp", "list": [1, None]}),
    events.Images(epoch=1, name="x", files=("x.png",), captions=("é",), scores={"m": (None, 1.0)}, pixels=object()),
    events.Checkpoint(epoch=1, name="epoch_000001"),
    events.Caution(epoch=1, message="careful"),
    events.Failure(epoch=1, message="gone", exit_code=5),
    events.Done(epoch=1, state="failed", exit_code=5),
]  # fmt: skip


def logged(folder, data):
    log = EventLog(folder)
    stream = EventStream([log], last_seq=log.last_seq)
    for item in data:
        stream.tell(item)
    log.close()


def test_every_type_is_a_line_that_reads_back(tmp_path):
    logged(tmp_path, ONE_OF_EACH)
    lines = (tmp_path / "events.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["seq"] for record in records] == list(range(1, len(ONE_OF_EACH) + 1))
    assert {record["type"] for record in records} == set(events.EventType.__args__)
    assert [set(record) for record in records] == [{"v", "seq", "time", "type", "data"}] * len(records)
    assert records[4]["data"]["values"] == {"loss": None, "kernel_backend": "cpp", "list": [1, None]}
    assert [event.data.model_dump(mode="json") for event in read_events(tmp_path)] == [r["data"] for r in records]
    assert [event.seq for event in read_events(tmp_path, after=7)] == [8, 9, 10]


def test_the_schema_takes_each_type_and_refuses_a_mixture():
    schema = jsonschema_rs.validator_for(events_schema())
    lines = [json.loads(events.Event(seq=1, time=0.0, type=d.type, data=d).line()) for d in ONE_OF_EACH]
    for line in lines:
        schema.validate(line)
    mixed = lines[0] | {"data": lines[1]["data"]}
    assert not schema.is_valid(mixed)
    with pytest.raises(ValueError, match="StateEvent"):
        parse_event(json.dumps(mixed))


def test_listeners_get_events_in_order_also_those_told_meanwhile():
    heard = []
    stream = EventStream()

    def answer(event):
        if event.type == "phase":
            stream.tell(events.Caution(epoch=1, message="x"))

    stream.listeners += [answer, lambda event: heard.append((event.seq, event.type))]
    stream.tell(ONE_OF_EACH[1])
    stream.tell(ONE_OF_EACH[0])
    assert heard == [(1, "phase"), (2, "warning"), (3, "state")]


def test_threads_share_one_numbering(tmp_path):
    log = EventLog(tmp_path)
    stream = EventStream([log])
    threads = [threading.Thread(target=lambda: [stream.tell(d) for d in ONE_OF_EACH]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    assert [event.seq for event in read_events(tmp_path)] == list(range(1, 41))


def test_a_new_process_counts_on_and_drops_a_half_line(tmp_path):
    logged(tmp_path, ONE_OF_EACH[:3])
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"v": 1, "seq": 4, "ti')
    logged(tmp_path, ONE_OF_EACH[3:5])
    assert [event.seq for event in read_events(tmp_path)] == [1, 2, 3, 4, 5]


def epochs_of(folder):
    return [event.data.epoch for event in read_events(folder)]


def test_a_resume_cuts_what_came_after_its_checkpoint(tmp_path):
    logged(tmp_path, [events.Caution(epoch=epoch, message="") for epoch in (0, 1, 2, 2, 3, 4, 2)])
    truncate_events(tmp_path, 2)
    assert epochs_of(tmp_path) == [0, 1, 2, 2]
    logged(tmp_path, [events.Caution(epoch=3, message="")])
    assert [event.seq for event in read_events(tmp_path)] == [1, 2, 3, 4, 5]
    truncate_events(tmp_path, -1)
    assert (tmp_path / "events.jsonl").read_bytes() == b""
    truncate_events(tmp_path / "absent", 3)


@pytest.mark.parametrize(
    "damage", [b"{broken\n", b"3\n", b"[]\n", b'{"seq": 3}\n', b'{"seq": 9, "data": {"epoch": 0}}\n']
)
def test_a_damaged_line_ends_the_history(tmp_path, damage):
    logged(tmp_path, ONE_OF_EACH[:2])
    whole = (tmp_path / "events.jsonl").read_bytes()
    (tmp_path / "events.jsonl").write_bytes(whole + damage + whole)
    truncate_events(tmp_path, 9)
    assert (tmp_path / "events.jsonl").read_bytes() == whole


def test_storage_that_refuses_leaves_no_half_line_and_no_gap(tmp_path, monkeypatch):
    log = EventLog(tmp_path)
    stream = EventStream([log])
    stream.tell(ONE_OF_EACH[0])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CheckpointError, match="no space left on"):
            stream.tell(ONE_OF_EACH[4])
    stream.tell(ONE_OF_EACH[5])
    log.close()
    assert [event.seq for event in read_events(tmp_path)] == [1]
    logged(tmp_path, ONE_OF_EACH[5:6])
    assert [event.seq for event in read_events(tmp_path)] == [1, 2]


WRITER = """
import sys
from pathlib import Path
from fdfo_engine.runtime import events
from fdfo_engine.runtime.event_log import EventLog
log = EventLog(Path(sys.argv[1]))
stream = events.EventStream([log], last_seq=log.last_seq)
print("go", flush=True)
while True:
    stream.tell(events.Phase(epoch=1, name="rollout", done=1))
"""


def test_a_killed_writer_leaves_whole_lines_and_the_next_goes_on(tmp_path):
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert writer.stdout.readline() == "go\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
    logged(tmp_path, ONE_OF_EACH[:1])
    numbers = [event.seq for event in read_events(tmp_path)]
    assert numbers == list(range(1, len(numbers) + 1))


@given(st.text(), st.dictionaries(st.text(), st.floats() | st.text() | st.none()))
def test_any_text_and_number_stay_on_one_line(text, values):
    for data in (events.Caution(epoch=0, message=text), events.Metrics(epoch=0, kind="epoch", values=values)):
        line = events.Event(seq=1, time=0.0, type=data.type, data=data).line()
        assert line.count(b"\n") == 1
        assert parse_event(line).data.epoch == 0


def test_events_need_no_torch():
    code = "import sys, fdfo_engine.runtime.events, fdfo_engine.runtime.event_log; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
