"""What `benchmarks.guided_fuzz` feeds: each parser of ours with a few inputs that it takes."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from starlette.datastructures import Headers

from fdfo_engine.config import ConfigError, PromptsConfig, dump_config, load_config
from fdfo_engine.config.load import bundled_configs
from fdfo_engine.label.access import Passes, Session
from fdfo_engine.rollout.prompts import MAX_PROMPT_BYTES, load_prompts
from fdfo_engine.runtime.best_checkpoint import BEST_NAME, read_best
from fdfo_engine.runtime.console import visible
from fdfo_engine.runtime.durable import sealed_json
from fdfo_engine.runtime.errors import FdfoError
from fdfo_engine.runtime.event_log import EVENTS_NAME, read_events, truncate_events
from fdfo_engine.runtime.run_folder import read_log, truncate_log
from fdfo_engine.runtime.run_status import STATUS_NAME, read_status
from fdfo_engine.serve.access import cookie_of

FOLDER = Path(tempfile.mkdtemp(prefix="guided-input-"))
OWN_WORDS = (FdfoError, ConfigError)
PROMPTS = ["a red circle", "two\u2028lines", "tab\there", 'quo"ted, with commas', "# no comment"]


class Target(NamedTuple):
    """A parser, fed with bytes; it raises where something is wrong."""

    feed: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


def settings(data: bytes) -> None:
    """A config file; what loads is written out and read again as the same."""
    file = FOLDER / "c.yaml"
    file.write_bytes(data)
    with contextlib.suppress(ConfigError):
        config = load_config(file)
        file.write_text(dump_config(config))
        assert load_config(file) == config


def override(data: bytes) -> None:
    """A word of the command line."""
    with contextlib.suppress(ConfigError):
        load_config("shapes", [data.decode("utf-8", "replace")])


def prompts(ending: str) -> Callable[[bytes], None]:
    """A file of prompts; each that it gives is one line or more of visible text, not too long."""

    def feed(data: bytes) -> None:
        file = FOLDER / f"p{ending}"
        file.write_bytes(data)
        with contextlib.suppress(*OWN_WORDS):
            for prompt in load_prompts(PromptsConfig(source=str(file)), 0).prompts:
                assert prompt == prompt.strip()
                assert 0 < len(prompt.encode()) <= MAX_PROMPT_BYTES
                assert "\0" not in prompt

    return feed


def prompt_files(ending: str) -> Callable[[], Iterable[bytes]]:
    """A file as people write it."""
    rows = {
        ".txt": "\n".join(PROMPTS),
        ".jsonl": "\n".join(json.dumps({"prompt": text}) for text in PROMPTS),
        ".json": json.dumps([{"prompt": text} for text in PROMPTS]),
        ".csv": 'id,prompt\n1,"a red, circle"\n2,"a ""quoted"" one"\n',
        ".tsv": "id\tprompt\n1\ta red circle\n",
    }
    return lambda: [rows[ending].encode(), rows[ending].replace("\n", "\r\n").encode()]


def event_log(data: bytes) -> None:
    """A run's events: cut to whole lines of its epochs, they are read as events or not at all."""
    (FOLDER / EVENTS_NAME).write_bytes(data)
    with contextlib.suppress(*OWN_WORDS, ValueError):  # pydantic's refusal is a ValueError
        truncate_events(FOLDER, 2)
        list(read_events(FOLDER))


def log(data: bytes) -> None:
    """metrics.jsonl: after a cut no line of a later epoch is left."""
    file = FOLDER / "metrics.jsonl"
    file.write_bytes(data)
    with contextlib.suppress(*OWN_WORDS):
        truncate_log(file, 2)
        read_log(file)


def status(data: bytes) -> None:
    """status.json, as `fdfo status` reads it."""
    (FOLDER / STATUS_NAME).write_bytes(data)
    with contextlib.suppress(ValueError):
        read_status(FOLDER)


def sealed(data: bytes) -> None:
    """best.json: another text than the one that was written is no record."""
    (FOLDER / BEST_NAME).write_bytes(data)
    assert (read_best(FOLDER) is not None) == (data == BEST)


def visitor(data: bytes) -> None:
    """A cookie of the label page: only the words that were given out let somebody in."""
    passes = Passes("a secret")
    headers = Headers(raw=[(b"cookie", data)])
    word = cookie_of(headers, passes.cookie)
    session = passes.session(word)
    assert session is None or passes.word(session) == word


def shown(data: bytes) -> None:
    """What others sent, on the terminal: nothing that moves the cursor."""
    assert not any(ord(letter) < 32 and letter not in "\t\n" for letter in visible(data.decode("utf-8", "replace")))


def planted(data: bytes) -> None:
    """A parser that takes the first byte after a colon to be a digit."""
    head, colon, rest = data.partition(b":")
    if head == b"n" and colon:
        int(rest[:1])


BEST = sealed_json({"name": "epoch_000002", "reward": 0.5, "stderr": 0.1}, "sha256")
_LOG = b'{"epoch": 1, "loss": 0.5}\n{"epoch": 3, "loss": NaN}\n'
_EVENT = (
    b'{"seq": 1, "time": "2026-01-01T00:00:00Z", "data": {"type": "checkpoint", "epoch": 1, "name": "epoch_000001"}}\n'
)
_STATUS = b'{"state": "running", "epoch": 3, "pid": 7, "heartbeat": 1.5, "phase": "rollout", "done": 1, "total": 2}'
_COOKIE = f"{Passes('a secret').cookie}={Passes('a secret').word(Session('ann', 'rater'))}".encode()
TARGETS: dict[str, Target] = {
    "planted": Target(planted, lambda: [b"m:1"]),
    "settings": Target(settings, lambda: [file.read_bytes()[:2000] for file in bundled_configs().values()]),
    "override": Target(override, lambda: [b"run.epochs=3", b"rewards.0.weight=1e-3", b"model={id: x}"]),
    **{f"prompts{ending}": Target(prompts(ending), prompt_files(ending))
       for ending in (".txt", ".jsonl", ".json", ".csv", ".tsv")},
    "events": Target(event_log, lambda: [_EVENT]),
    "log": Target(log, lambda: [_LOG]),
    "status": Target(status, lambda: [_STATUS]),
    "sealed": Target(sealed, lambda: [BEST]),
    "visitor": Target(visitor, lambda: [_COOKIE]),
    "shown": Target(shown, lambda: ["a \x1b[31mred\x07 line\u202e".encode()]),
}  # fmt: skip
