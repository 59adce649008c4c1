"""Every op is tested on every backend that can run here; on a GPU machine that is all of them."""

import pytest
import torch

from fdfo_engine import ops

CUDA = torch.cuda.is_available()
BACKENDS = [name for name, reasons in ops.backends().items() if not reasons]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device(backend):
    return torch.device("cuda" if CUDA and backend != "cpp" else "cpu")
