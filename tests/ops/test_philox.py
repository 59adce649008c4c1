import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.exact import words

from fdfo_engine import ops
from fdfo_engine.ops.philox import philox4x32

WORD = st.integers(0, 2**32 - 1)
KNOWN = {
    ((0, 0, 0, 0), (0, 0)): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)
    ),
}


def run(counter, key, device="cpu"):
    tensors = tuple(torch.tensor([word], device=device) for word in counter)
    return tuple(int(word) for word in philox4x32(tensors, key))


@pytest.mark.parametrize(("given_", "expected"), KNOWN.items(), ids=["zeros", "pi"])
def test_known_answers(given_, expected, device):
    assert run(*given_, device) == expected
    assert words(*given_) == expected


@settings(max_examples=30, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_agrees_with_python_integers(counter, key):
    assert run(counter, key) == words(counter, key)


def test_extreme_words():
    top = 2**32 - 1
    assert run((top,) * 4, (top, top)) == words((top,) * 4, (top, top))


def test_words_are_word_0_at_their_counters_and_broadcast():
    pair, seed = 2**40 + 7, 2**63 + 11
    stream = torch.tensor([[ops.deal_stream(0)], [ops.deal_stream(1)]])
    got = ops.philox_words(np.arange(5), stream, pair, seed=seed)
    key = (seed % 2**32, seed >> 32)
    expected = [[words((i, 2**31 + 1 + b, pair % 2**32, pair >> 32), key)[0] for i in range(5)] for b in (0, 1)]
    assert got.tolist() == expected


def test_words_of_nothing():
    assert ops.philox_words([], 0, 0, seed=0).shape == (0,)


def test_streams_never_meet():
    churn = {ops.churn_stream(k, branch) for k in range(1000) for branch in (0, 1)}
    named = [ops.SHARED_STREAM, ops.GENERATION_STREAM, ops.SCALAR_STREAM, ops.PROMPT_ORDER_STREAM]
    deals = [ops.deal_stream(0), ops.deal_stream(1)]
    assert len(churn | {*named, *deals}) == 2000 + 6
    assert [ops.churn_stream(k, b) for k in (0, 1, 8) for b in (0, 1)] == [1, 2, 3, 4, 17, 18]
    assert (named[1:3], deals) == ([2**30, 2**31], [2**31 + 1, 2**31 + 2])
    assert ops.churn_stream(3, torch.tensor([0, 1])).tolist() == [7, 8]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"index": [-1]}, "index"),
        ({"index": [0.5]}, "index"),
        ({"index": "x"}, "index"),
        ({"stream": 2**32}, "stream"),
        ({"pair": 2**63}, "pair"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
    ],
    ids=str,
)
def test_refuses(bad, message):
    arguments = {"index": [0], "stream": 0, "pair": 0, "seed": 0} | bad
    with pytest.raises(ValueError, match=f"philox_words: {message} is"):
        ops.philox_words(**arguments)
