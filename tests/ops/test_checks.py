import itertools

import pytest
import torch

from fdfo_engine.ops import _checks


def refuses(tensor):
    try:
        _checks.written("op", "out", tensor)
    except ValueError:
        return True
    return False


@pytest.mark.parametrize("shape", [(3,), (2, 3), (3, 1, 2), (2, 2, 2), (0, 2, 3)], ids=str)
def test_no_output_whose_elements_share_memory_is_written(shape):
    memory = torch.arange(64)
    for strides in itertools.product(range(6), repeat=len(shape)):
        tensor = memory.as_strided(shape, strides)
        if len(tensor.unique()) < tensor.numel():
            assert refuses(tensor), strides


def test_cuts_of_a_buffer_are_written():
    buffer = torch.empty(3, 2, 4, 5, 6)
    views = [
        buffer,
        buffer[:, :, 1],
        buffer[..., ::2],
        buffer[1:, 1:, 1:],
        buffer[0, 0, 0, 0, 0],
        buffer.permute(4, 1, 0, 3, 2),
    ]
    views += [buffer[:0].expand(0, 2, 4, 5, 6), buffer[:1, :1].expand(1, 1, 4, 5, 6), buffer.diagonal(dim1=1, dim2=2)]
    assert not any(refuses(view) for view in views)
