"""Named records of tensors on their way through `autograd.Function`, which takes, saves and returns tensors one by one.

A record is a NamedTuple; its fields are tensors, None, or lists and records of these.

    found = _Op.apply(settings, *flat(streams))             # streams: a list of records
    streams = restore(Stream, tensors)                      # in `forward`
    save(ctx, Kept(streams, statistics))                    # for `backward`, where
    kept = saved(ctx)                                       # is that record again
    needed = restore_like(streams, ctx.needs_input_grad)    # the same names, with a flag in the place of each tensor
    return None, *flat(gradients)                           # one record of gradients a stream
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple, TypeVar

Record = TypeVar("Record", bound=NamedTuple)
Nested = TypeVar("Nested", bound="list[Any] | tuple[Any, ...]")
_NESTED = (tuple, list)


def flat(records: Iterable[Any]) -> tuple[Any, ...]:
    """The fields of all records, one record after the other; of records inside records likewise."""
    fields: list[Any] = []
    _collect(records, fields)
    return tuple(fields)


def restore(kind: type[Record], fields: Sequence[Any]) -> list[Record]:
    """The records of one `kind` whose fields `flat` laid side by side.

    Raises:
        ValueError: `fields` are not those of whole records.
    """
    size = len(kind._fields)
    if len(fields) % size:
        raise ValueError(f"restore: {len(fields)} fields are no whole number of {kind.__name__}, which has {size}")
    return [kind(*fields[first : first + size]) for first in range(0, len(fields), size)]


def restore_like(records: Nested, fields: Iterable[Any]) -> Nested:
    """`records` with other fields, as `flat` would lay them side by side.

    Raises:
        ValueError: there are more fields than `records` have, or fewer.
    """
    rest = iter(fields)
    try:
        found: Nested = _filled(records, rest)
    except StopIteration:
        raise ValueError("restore_like: fewer fields than the records have") from None
    if next(rest, rest) is not rest:
        raise ValueError("restore_like: more fields than the records have")
    return found


def by_field(records: Sequence[Any]) -> Any:
    """One record out of several of a kind: each field holds a tuple, its values in all of them."""
    return type(records[0])(*zip(*records, strict=True))


def blank(records: Nested) -> Nested:
    """`records` with None in the place of each field."""
    found: Nested = _filled(records, repeat(None))
    return found


def save(ctx: Any, record: tuple[Any, ...]) -> None:
    """Keeps the tensors of `record` for the backward, where `saved` returns it."""
    tensors: list[Any] = []
    ctx.saved_record = _emptied(record, tensors)
    ctx.save_for_backward(*tensors)


def saved(ctx: Any) -> Any:
    """What `save` was given."""
    return restore_like(ctx.saved_record, ctx.saved_tensors)


def _collect(records: Iterable[Any], into: list[Any]) -> None:
    for item in records:
        if isinstance(item, _NESTED):
            _collect(item, into)
        else:
            into.append(item)


def _emptied(records: Any, into: list[Any]) -> Any:
    """`records` with None in the place of each field, which goes `into`."""
    items = []
    for item in records:
        if isinstance(item, _NESTED):
            items.append(_emptied(item, into))
        else:
            into.append(item)
            items.append(None)
    return records._make(items) if hasattr(records, "_make") else type(records)(items)


def _filled(records: Any, fields: Iterator[Any]) -> Any:
    """Leaves are taken here, not by a call each: this runs for every layer of every step."""
    items = [_filled(item, fields) if isinstance(item, _NESTED) else next(fields) for item in records]
    return records._make(items) if hasattr(records, "_make") else type(records)(items)
