"""JSON of files that may be damaged and of servers that may be anything: a value, or one kind of error."""

import math

import pytest

from fdfo_engine.runtime.json_text import json_object, json_value


def test_what_python_writes_is_read_nan_too_unless_it_must_be_json():
    assert json_value('{"a": [1, 2.5, null, true, "é"]}') == {"a": [1, 2.5, None, True, "é"]}
    assert json_value(b"3") == 3
    assert math.isnan(json_value("[NaN]")[0])
    assert json_value("[Infinity, -Infinity]") == [math.inf, -math.inf]
    for text in ("NaN", "[Infinity]", '{"a": -Infinity}'):
        with pytest.raises(ValueError, match="is no JSON"):
            json_value(text, takes_nan=False)
    assert json_value("[1e999]", takes_nan=False) == [math.inf], "a number, if a large one"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"), ("{", "Expecting"), (b"\xff", "codec"), ("9" * 5000, "digits"),
        ("[" * 200_000, "nested too deeply"), ('{"a": ' * 200_000, "nested too deeply"),
        ('{"a": 1, "a": 1}', "a key stands twice"), ('[{"b": {"a": 1, "c": 2, "a": 3}}]', "a key stands twice"),
    ],
)  # fmt: skip
def test_all_else_is_one_kind_of_error(text, reason):
    with pytest.raises(ValueError, match=reason):
        json_value(text)


def test_an_object_is_asked_for_by_its_type():
    assert json_object('{"a": 1}') == {"a": 1}
    for text, kind in (("[1]", "list"), ("3", "int"), ('"x"', "str"), ("null", "NoneType")):
        with pytest.raises(ValueError, match=f"is of type {kind}, no object"):
            json_object(text)
