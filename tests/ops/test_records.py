from typing import Any, NamedTuple

import pytest
import torch
from torch.autograd.function import once_differentiable

from fdfo_engine.ops._records import blank, flat, restore, restore_like, save, saved


class Pair(NamedTuple):
    left: Any
    right: Any


def test_restores_what_it_flattened():
    pairs = [Pair(1, None), Pair(None, 2), Pair(3, 4)]
    assert flat(pairs) == (1, None, None, 2, 3, 4)
    assert restore(Pair, flat(pairs)) == pairs
    assert restore(Pair, ()) == []


def test_refuses_a_part_of_a_record():
    with pytest.raises(ValueError, match="3 fields are no whole number of Pair, which has 2"):
        restore(Pair, (1, 2, 3))


class _Weighted(torch.autograd.Function):
    """`left + 3 * right` of each pair, whose right may be None."""

    @staticmethod
    def forward(ctx, *fields):
        pairs = restore(Pair, fields)
        ctx.save_for_backward(*fields)
        return tuple(p.left.clone() if p.right is None else p.left + 3 * p.right for p in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        pairs, needed = restore(Pair, ctx.saved_tensors), restore(Pair, ctx.needs_input_grad)
        gradients = [
            Pair(grad if need.left else None, 3 * grad if need.right and pair.right is not None else None)
            for grad, pair, need in zip(upstream, pairs, needed, strict=True)
        ]
        return flat(gradients)


def test_carries_records_through_autograd():
    first = Pair(torch.ones(2), torch.ones(2, requires_grad=True))
    second = Pair(torch.ones(2, requires_grad=True), None)
    y, z = _Weighted.apply(*flat([first, second]))
    (y.sum() + 2 * z.sum()).backward()
    assert first.left.grad is None
    assert first.right.grad.tolist() == [3, 3]
    assert second.left.grad.tolist() == [2, 2]


class Kept(NamedTuple):
    streams: Any
    total: Any


def test_restores_records_inside_records():
    kept = Kept([[Pair(1, None)], [Pair(2, 3), Pair(4, 5)]], 6)
    assert flat(kept) == (1, None, 2, 3, 4, 5, 6)
    assert restore_like(kept, "abcdefg") == Kept([[Pair("a", "b")], [Pair("c", "d"), Pair("e", "f")]], "g")
    assert blank(kept) == Kept([[Pair(None, None)], [Pair(None, None), Pair(None, None)]], None)
    for fields in ("abcdef", "abcdefgh"):
        with pytest.raises(ValueError, match=r"restore_like: (more|fewer) fields than the records have"):
            restore_like(kept, fields)


class _Scaled(torch.autograd.Function):
    """Each left times its right; the gradient of right alone."""

    @staticmethod
    def forward(ctx, *fields):
        pairs = restore(Pair, fields)
        save(ctx, Kept(pairs, None))
        return tuple(p.left * p.right for p in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        kept = saved(ctx)
        assert kept.total is None
        return flat(Pair(None, grad * pair.left) for grad, pair in zip(upstream, kept.streams, strict=True))


def test_keeps_a_record_for_the_backward():
    pairs = [Pair(torch.full((2,), float(i)), torch.ones(2, requires_grad=True)) for i in (3, 5)]
    torch.cat(_Scaled.apply(*flat(pairs))).sum().backward()
    assert [p.right.grad.tolist() for p in pairs] == [[3, 3], [5, 5]]
