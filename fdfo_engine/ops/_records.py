"""Named records of tensors on their way through `autograd.Function`, which takes, saves and returns tensors one by one.

found = _Op.apply(settings, *flat(streams))             # streams: a list of NamedTuples, each field a tensor or None
streams = restore(Stream, tensors)                      # in `forward`, or of `ctx.saved_tensors` in `backward`
needed = restore(Stream, ctx.needs_input_grad[1:])      # the same names, with a flag in the place of each tensor
return None, *flat(gradients)                           # one record of gradients a stream
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

Record = TypeVar("Record", bound=NamedTuple)


def flat(records: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    """The fields of all records, one record after the other."""
    return tuple(chain.from_iterable(records))


def restore(kind: type[Record], fields: Sequence[Any]) -> list[Record]:
    """The records of one `kind` whose fields `flat` laid side by side.

    Raises:
        ValueError: `fields` are not those of whole records.
    """
    size = len(kind._fields)
    if len(fields) % size:
        raise ValueError(f"restore: {len(fields)} fields are no whole number of {kind.__name__}, which has {size}")
    return [kind(*fields[first : first + size]) for first in range(0, len(fields), size)]
