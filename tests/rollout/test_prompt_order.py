"""Prompts: which pair takes which, what files are read, and what is said about those that cannot be."""

import hashlib
import json

import numpy as np
import pytest
from ops import exact

from fdfo_engine.config import PromptsConfig
from fdfo_engine.rollout.prompts import MAX_PROMPT_BYTES, PromptList, describe_prompts, load_prompts
from fdfo_engine.runtime.errors import PromptError
from fdfo_engine.shapes.scene import captions

TEN = [f"prompt {i}" for i in range(10)]


def read(tmp_path, text, name="prompts.txt", **options):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_prompts(PromptsConfig(source=str(path), **options), seed=0).prompts


def test_each_pass_is_a_permutation():
    order = PromptList(TEN, seed=3)
    passes = [order.of_pairs(range(10 * n, 10 * n + 10)) for n in range(20)]
    assert all(sorted(prompts) == TEN for prompts in passes)
    assert len({tuple(prompts) for prompts in passes}) == 20
    assert passes != [PromptList(TEN, seed=4).of_pairs(range(10 * n, 10 * n + 10)) for n in range(20)]


def test_the_permutation_sorts_philox_words():
    order = PromptList(TEN, seed=2**63 + 1)
    for number in (0, 1, 77):
        key = ((2**63 + 1) % 2**32, (2**63 + 1) // 2**32)
        words = [exact.words((i, 2**31 + 3, number, 0), key)[0] for i in range(10)]
        expected = [TEN[i] for i in np.argsort(words, kind="stable")]
        assert order.of_pairs(range(10 * number, 10 * number + 10)) == expected


def test_a_pair_does_not_know_where_an_epoch_began():
    order = PromptList(TEN, seed=3)
    whole = order.of_pairs(range(50))
    assert [order.of_pairs([pair])[0] for pair in reversed(range(50))] == whole[::-1]
    assert PromptList(TEN, seed=3).of_pairs(range(17, 31)) == whole[17:31]


def test_text_files(tmp_path):
    text = "# notes\n a cat \n\n   \r\nein Hündchen\r\n  # more\na cat"
    assert read(tmp_path, text) == ["# notes", "a cat", "ein Hündchen", "# more", "a cat"]
    assert read(tmp_path, text, comments=True) == ["a cat", "ein Hündchen", "a cat"]
    assert read(tmp_path, "b\na\nb\n", dedup=True) == ["b", "a"]


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path):
    assert read(tmp_path, b"\xef\xbb\xbfa cat\na dog\n") == ["a cat", "a dog"]


def test_only_line_ends_end_a_line(tmp_path):
    """str.splitlines would also cut at form feeds and at U+2028, which captions scraped from the web hold."""
    assert read(tmp_path, "a cat\u2028and a dog\na\x0cfox\n") == ["a cat\u2028and a dog", "a\x0cfox"]


def test_jsonl_files(tmp_path):
    rows = [{"prompt": "a cat", "id": 1}, {"prompt": "  a dog "}, {"prompt": " "}]
    text = "\n".join(map(json.dumps, rows)) + "\n\n"
    assert read(tmp_path, text, "p.jsonl") == ["a cat", "a dog"]
    assert read(tmp_path, '{"caption": "x"}', "p.jsonl", column="caption") == ["x"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", "", "0 usable prompts in 0 lines"),
        ("p.txt", "short\n" + "x" * (MAX_PROMPT_BYTES + 1), r"p.txt:2: a line of 16385 bytes"),
        ("p.txt", b"fine\n\xff\xfe broken", "p.txt.*UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', r"p.jsonl:2: not JSON"),
        ("p.jsonl", '{"text": "a"}', r"p.jsonl:1: no text under prompts.column = 'prompt'; it has \['text'\]"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: no text"),
        ("p.jsonl", "[1, 2]", "p.jsonl:1.*list"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        read(tmp_path, text, name)


def test_a_file_of_comments_holds_no_prompt(tmp_path):
    with pytest.raises(PromptError, match=r"0 usable prompts in 3 lines \(left out: 1 blank, 2 comments\)"):
        read(tmp_path, "# only\n\n# comments\n", comments=True)


def test_a_missing_file_is_named_with_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PromptError, match=r"prompts.source = 'nowhere.txt': no such file \(.*nowhere.txt; working"):
        load_prompts(PromptsConfig(source="nowhere.txt"), seed=0)


def test_shapes_captions_repeat_and_hold_out():
    source = PromptsConfig(source="shapes", count=40)
    train = load_prompts(source, seed=1).prompts
    assert train == load_prompts(source, seed=1).prompts
    assert not set(train) & set(load_prompts(source, seed=1, split="heldout").prompts)


def test_shapes_captions_are_keyed_by_the_runs_seed_and_as_many_as_asked_for():
    source = PromptsConfig(source="shapes", count=40)
    assert len(load_prompts(source, seed=1)) == 40
    assert load_prompts(source, seed=1).prompts == captions("train", 40, 1)
    assert load_prompts(source, seed=2).prompts == captions("train", 40, 2) != captions("train", 40, 1)
    assert load_prompts(source, seed=2, split="heldout").prompts == captions("heldout", 40, 2)


@pytest.mark.parametrize("letter", ["x", "\u00e9"])
def test_a_prompt_may_have_16384_bytes(tmp_path, letter):
    size = 16384 // len(letter.encode())
    assert read(tmp_path, letter * size) == [letter * size]
    with pytest.raises(PromptError, match=r"a line of 1638[56] bytes; a prompt takes at most 16384"):
        read(tmp_path, letter * (size + 1))


def test_what_was_left_out_is_counted_by_its_reason(tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("b\n a\nb\n\nb \n# x\n#y\n\u200b\n")
    found = load_prompts(PromptsConfig(source=str(file), dedup=True), seed=0, pairs_per_prompt=2)
    assert found.prompts == ["b", "a", "# x", "#y"]
    assert found.reading.notes() == [
        "left out: 2 blank, 2 repeated", "white space around 2 of them dropped",
        "2 begin with #; prompts.comments=true leaves such lines out",
    ]  # fmt: skip
    assert found.reading.entries == 8
    assert len(set(found.of_pairs([0, 1]))) == 1, "two neighbours take one prompt"
    assert describe_prompts(found, 8).endswith("each used about 2.0 times an epoch")
    assert "each used" not in describe_prompts(found, 4)


def test_the_description_counts(tmp_path):
    assert describe_prompts(PromptList(["a", "b", "a"], 0), 6) == (
        "3 prompts (1 duplicates kept as weights; prompts.dedup=true drops them), each used about 2.0 times an epoch"
    )


def test_the_hash_knows_order_and_text():
    for prompts in (["a"], ["a", 'b"\n', "٣\u2028"], []):
        assert PromptList(prompts, 0).sha256 == hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    hashes = {PromptList(p, 0).sha256 for p in (["a", "b"], ["b", "a"], ["a", "b", ""], ["a\nb"])}
    assert len(hashes) == 4
