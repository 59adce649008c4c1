"""Lists of many texts: held against a Python list, in memory and on disk."""

import random
import subprocess
import sys

import pytest

from fdfo_engine.rollout import texts as texts_module
from fdfo_engine.rollout.texts import Texts, repeated

LETTERS = "ab \u00e4\u4e2d\U0001f600"


@pytest.fixture(params=[1 << 20, 100, 0], ids=["in memory", "in part on disk", "on disk"])
def written(request, monkeypatch):
    monkeypatch.setattr(texts_module, "_IN_MEMORY", request.param)
    rng = random.Random(3)
    return ["".join(rng.choices(LETTERS, k=rng.randrange(9))) for _ in range(3000)]


def test_they_are_what_was_written(written):
    found = Texts(iter(written))
    assert len(found) == len(written)
    assert [*found] == written
    numbers = random.Random(4).sample(range(-3000, 3000), 400)
    assert [found[number] for number in numbers] == [written[number] for number in numbers]
    for part in (slice(60, 70), slice(-5, None), slice(None, 0), slice(2990, 5000), slice(9, 3, -2)):
        assert found[part] == written[part]
    with pytest.raises(IndexError):
        found[3000]


def test_equal_is_what_says_the_same(written):
    found = Texts(written)
    assert found == written
    assert found == Texts(written)
    assert found != written[:-1]
    assert found != [*written[:-1], "another"]
    assert Texts() == []


def test_repeated_ones_are_those_that_a_set_knows(written, monkeypatch):
    seen, expected = set(), []
    for text in written:
        expected.append(text in seen)
        seen.add(text)
    assert 0 < sum(expected) < len(written)
    assert repeated(Texts(written)).tolist() == expected
    monkeypatch.setattr(texts_module, "hash", lambda text: len(text), raising=False)  # nothing but collisions
    assert repeated(Texts(written)).tolist() == expected


GROWTH = """
import resource, sys
from fdfo_engine.config import PromptsConfig
from fdfo_engine.rollout.prompts import describe_prompts, load_prompts

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

load_prompts(PromptsConfig(source="starter"), 0).of_pairs(range(3))
before = peak()
prompts = load_prompts(PromptsConfig(source=sys.argv[1], dedup=sys.argv[2] == "dedup"), 0)
print(describe_prompts(prompts), prompts.sha256[:8])
prompts.of_pairs([0, len(prompts), 2 * len(prompts) + 5])
print(peak() - before)
"""


def growth(path, count, dedup):
    """Megabytes that a process grows by, which loads `count` prompts, hashes them and takes from three passes."""
    with path.open("w") as file:
        file.writelines(f"a photograph of {number} red circles beside a blue square\n" for number in range(count))
    command = [sys.executable, "-c", GROWTH, str(path), "dedup" if dedup else "all"]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_million_prompts_take_under_300_mb(tmp_path):
    assert growth(tmp_path / "p.txt", 10_000_000, dedup=True) < 300


def test_prompts_take_few_bytes_each(tmp_path):
    """As 300 MB for ten million, beside what stays in memory and what is computed at once; a list took 250 each."""
    assert growth(tmp_path / "p.txt", 400_000, dedup=True) < 8 + 40 + 30 * 0.4
