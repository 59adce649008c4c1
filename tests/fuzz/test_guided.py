"""What `python -m benchmarks.guided_fuzz` feeds: its parsers take what they should, and the planted one is wrong."""

import pytest

from benchmarks.guided_fuzz import PLANTED, failures
from benchmarks.guided_targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_own_seeds_and_what_is_empty_or_no_text(name):
    target, seeds = TARGETS[name]
    for data in [*seeds(), b"", b"\xff\xfe\x00"]:
        target(data)


def test_the_planted_one_is_wrong():
    with pytest.raises(ValueError, match="invalid literal"):
        TARGETS[PLANTED].feed(b"n:x")


def test_a_finding_is_a_failure_and_so_is_none_of_the_planted_one():
    nothing, something = {"found_by": [], "finding": []}, {"found_by": ["b'x'"], "finding": ["KeyError: 1"]}
    assert failures({PLANTED: something, "log": nothing}) == []
    assert failures({PLANTED: nothing, "log": something}) == ["planted: nothing was found", "log: ['KeyError: 1']"]
