"""Prompt files as bytes: prompts of the promised form, or the words of a `PromptError`, whatever the file holds."""

import contextlib
import csv
import io
import json
import random

import pytest
from fuzz.mutating import HOSTILE, mutated_bytes, mutations_of

from fdfo_engine.config import PromptsConfig
from fdfo_engine.rollout.prompts import MAX_PROMPT_BYTES, describe_prompts, load_prompts
from fdfo_engine.runtime.errors import PromptError

FEW, MANY = range(8), range(8, 700)
TEXTS = [
    "a red circle", "# no comment", "  spaced\u3000", "two\u2028lines", "nel\x85here", 'quo"ted, with commas',
    "tab\there",
    "{} %s {{x}}", "<script>alert(1)</script>", "\x1b[31mred", "../../etc/passwd", "👩‍🚀" * 40, "\ufeffmarked",
    "٣ circles", "",
]  # fmt: skip
NASTY = ["\0", "a\0b", "x" * (MAX_PROMPT_BYTES + 1), "\ud800", "\u200b", "\n"]


def as_csv(texts, **dialect):
    file = io.StringIO()
    csv.writer(file, **dialect).writerows([["id", "prompt"], *enumerate(texts)])
    return file.getvalue().encode()


def as_parquet(texts):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [parquet]")
    from pyarrow import parquet

    file = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "prompt": texts}), file)
    return file.getvalue()


def tsv(texts):
    return "".join(f"{n}\t{text}\n" for n, text in [("id", "prompt"), *enumerate(texts)] if "\t" not in text).encode()


WRITERS = {
    ".txt": lambda texts: "".join(f"{text}\n" for text in texts).encode(),
    ".jsonl": lambda texts: "".join(json.dumps({"prompt": text, "id": 1}) + "\n" for text in texts).encode(),
    ".json": lambda texts: json.dumps([{"prompt": text, "id": 1} for text in texts]).encode(),
    ".csv": as_csv,
    ".tsv": tsv,
    ".parquet": as_parquet,
}
"""A file of these texts, by its ending."""


def loaded(path):
    """The prompts, or the message of the refusal; each prompt has the form that the rest of the engine relies on."""
    try:
        found = load_prompts(PromptsConfig(source=str(path)), 0)
    except PromptError as error:
        return str(error).replace(str(path), "FILE")
    describe_prompts(found, 12)
    assert len(found.sha256) == 64
    for prompt in found.prompts:
        assert prompt
        assert prompt == prompt.strip()
        assert "\0" not in prompt
        assert len(prompt.encode()) <= MAX_PROMPT_BYTES
    return list(found.prompts)


def cased(ending, rng):
    return "".join(rng.choice((letter.upper(), letter)) for letter in ending)


@pytest.mark.parametrize("seeds", [FEW, pytest.param(MANY, marks=pytest.mark.slow)], ids=["few", "many"])
@pytest.mark.parametrize("ending", WRITERS)
def test_a_damaged_prompt_file_is_prompts_or_words(tmp_path, ending, seeds):
    """The same for an ending in capitals: nothing is taken for lines of text that is not."""
    for seed in seeds:
        rng = random.Random(f"{ending} {seed}")
        texts = rng.sample(TEXTS, 5)
        change = mutated_bytes if ending in (".csv", ".txt", ".tsv", ".parquet") else rng.choice(mutations_of(ending))
        data = WRITERS[ending](texts)
        with contextlib.suppress(ValueError, IndexError):  # nothing to change by value in what is no JSON
            data = change(data, rng)
        small, large = tmp_path / f"p{ending}", tmp_path / f"q{cased(ending, rng)}"
        small.write_bytes(data)
        large.write_bytes(data)
        assert loaded(small) == loaded(large), data


@pytest.mark.parametrize("ending", WRITERS)
def test_what_stands_in_a_file_is_what_is_read(tmp_path, ending):
    texts = [text for text in TEXTS if "\t" not in text or ending != ".tsv"]
    (path := tmp_path / f"p{ending.upper()}").write_bytes(WRITERS[ending](texts))
    assert loaded(path) == [
        text.removeprefix("\ufeff" if ending in (".txt",) else "").strip() for text in texts if text.strip()
    ]


@pytest.mark.parametrize("nasty", NASTY)
@pytest.mark.parametrize("ending", WRITERS)
def test_what_is_no_prompt_is_left_out_or_named(tmp_path, ending, nasty):
    with contextlib.suppress(UnicodeEncodeError, PromptError):  # a file of UTF-8 cannot hold half a character
        (path := tmp_path / f"p{ending}").write_bytes(WRITERS[ending](["a circle", nasty]))
        found = loaded(path)
        assert isinstance(found, str) or found == ["a circle"]


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: repr(value)[:20])
def test_another_value_in_the_prompts_place_is_named(tmp_path, value):
    (path := tmp_path / "p.jsonl").write_text(json.dumps({"prompt": value}) + '\n{"prompt": "a"}\n')
    found = loaded(path)
    if isinstance(value, str) and value not in NASTY and value:
        assert found == [value.strip(), "a"]
    elif value is None or value == "":
        assert found == ["a"]
    else:
        assert isinstance(found, str)
        assert found.startswith("FILE:1: ")
