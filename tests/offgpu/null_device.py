"""A GPU that is not there, for what the host does beside one: whatever makes it wait is written down.

Tensors on it have shapes and no values. Torch's own functions only work out the shape of what they return, Triton's
kernels are launched into nothing, and what is read from the device is 1 or true. Tensors on the CPU are real.

What this can't tell: waits inside torch's own CUDA code and DeepSpeed's, what a graph's capture refuses, and memory
that the allocator asks the driver for.
"""

import gc
import inspect
import sys
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fdfo_engine.models.fused import refusals
from fdfo_engine.ops import _dispatch

aten = torch.ops.aten
GPU = torch.device("cuda:0")
SIZED_BY_VALUES = {
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.unique_dim.default, aten.repeat_interleave.Tensor, aten.bincount.default,
}  # fmt: skip
"""Their result has as many elements as the values say: the host has to be told before it can go on."""

INDEXING = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip


class NullTensor(Tensor):
    """A tensor on the device: `shape_only` is one on meta. To C++ it is on meta too, so that autograd needs no GPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @staticmethod
    def __new__(cls, shape_only):
        made = Tensor._make_wrapper_subclass(
            cls, shape_only.size(), strides=shape_only.stride(), storage_offset=shape_only.storage_offset(),
            dtype=shape_only.dtype, device="meta",
        )  # fmt: skip
        made.shape_only = shape_only
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is called outside of the device's context")


class NullDevice(TorchDispatchMode):
    """What a GPU would have been asked, `present`. `under` is the folder whose code is named as the place of a wait.

    Attributes:
        waits: what made the host wait, with its place. copies: to the device, which nobody waited for.
        launches: Triton's, by the kernel's name. keys: of each kernel, what tells one compilation of it from another.
    """

    def __init__(self, under):
        super().__init__()
        self.under = str(under)
        self._pinned = {}  # storages by address: alive, so that no other gets the address
        self.reset()

    def reset(self):
        """Forgets what happened so far."""
        self.waits, self.copies, self.launches = Counter(), Counter(), Counter()
        self.keys = defaultdict(set)

    def moved(self, module):
        """Puts the parameters and buffers of `module` on the device, in place."""
        for part in module.modules():
            for name, value in part._parameters.items():
                if value is not None:
                    part._parameters[name] = nn.Parameter(self._made(value.detach()), value.requires_grad)
            for name, value in part._buffers.items():
                part._buffers[name] = None if value is None else self._made(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if not any(isinstance(leaf, NullTensor) or leaf == GPU for leaf in leaves if not _is_real(leaf)):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self._wait("a value is read")
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is aten.equal.default:
            self._wait("tensors are compared")
            return True
        if func in SIZED_BY_VALUES:
            return self._sized(func, *args)
        if func in (aten._to_copy.default, aten.copy_.default) and (found := self._copied(func, args, kwargs)):
            return found[0]
        return self._computed(func, self._indexed(args) if func in INDEXING else args, kwargs)

    def _computed(self, func, args, kwargs):
        """What `func` returns, as far as shapes go."""
        strangers = [t for t in tree_leaves((args, kwargs)) if _is_real(t) and t.ndim > 0]
        assert not strangers or func in (*INDEXING, aten._to_copy.default, aten.copy_.default), (
            f"{func}: a tensor on the CPU among those on the GPU"
        )
        shapes = func(*tree_map(_shape_only, args), **tree_map(_shape_only, kwargs))
        if func._schema.is_mutable:
            return kwargs.get("out", args[0])
        return tree_map(lambda t: self._made(t) if isinstance(t, Tensor) else t, shapes)

    def _sized(self, func, values, *_rest):
        self._wait(f"{func.overloadpacket.__name__} counts values")
        assert func is aten.nonzero.default, f"{func}: no answer is made up for it"
        return self._made(torch.empty(0, values.ndim, dtype=torch.int64, device="meta"))

    def _copied(self, func, args, kwargs):
        """A copy from one side to the other, noted: the result in a tuple if it is on the CPU, else nothing."""
        if func is aten.copy_.default:
            into, source = args[:2]
            non_blocking = len(args) > 2 and args[2]
            leaves, arrives = _is_real(into), _is_real(source)
        else:
            source, target, non_blocking = args[0], kwargs.get("device"), kwargs.get("non_blocking", False)
            leaves, arrives = target is not None and target.type == "cpu", _is_real(source)
        if leaves:
            self._wait("a copy to the CPU")
            ones = torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return (into.copy_(ones) if func is aten.copy_.default else ones,)
        if arrives and not (non_blocking and source.untyped_storage().data_ptr() in self._pinned):
            self._wait("a copy of pageable memory" if non_blocking else "a copy that is waited for")
        elif arrives:
            self.copies[self._place()] += 1
        return ()

    def _indexed(self, args):
        """The arguments of an indexing, with indices that choose nothing in the place of a mask."""
        indices = []
        for index in args[1]:
            if isinstance(index, Tensor) and index.dtype == torch.bool:
                self._wait("an index counts values")
                nothing = self._made(torch.empty(0, dtype=torch.int64))
                indices += [nothing] * index.ndim
                continue
            if _is_real(index):
                self._wait("an index on the CPU")
            indices.append(index)
        return (args[0], indices, *args[2:])

    def _made(self, values):
        return NullTensor(values.detach().to("meta"))

    def _wait(self, what):
        self.waits[f"{what}: {self._place()}"] += 1

    def _place(self):
        """File and function of the innermost call of the code that is looked at."""
        frame = sys._getframe(1)
        while frame is not None:
            name = frame.f_code.co_filename
            if name.startswith(self.under) and not name.endswith("ops/_checks.py"):
                return f"{name.removeprefix(self.under).lstrip('/')} {frame.f_code.co_name}"
            frame = frame.f_back
        return "elsewhere"

    def pin(self, tensor):
        """In the place of `Tensor.pin_memory`."""
        copy = tensor.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy
        return copy

    def launch(self, kernel, args, settings):
        """In the place of a launch by Triton."""
        name = kernel.fn.__name__
        self.launches[name] += 1
        self.keys[name].add(_compile_key(kernel, args, settings))


@contextmanager
def present(device):
    """Within this context torch and the ops take `device`, a `NullDevice`, for a GPU of capability 9.0."""
    from triton.runtime.interpreter import InterpretedFunction

    stream = SimpleNamespace(cuda_stream=0)
    cuda = {
        "is_available": lambda: True, "_lazy_init": lambda: None, "device_of": lambda tensor: nullcontext(),
        "get_device_capability": lambda device=None: (9, 0), "current_stream": lambda device=None: stream,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor: device.pin(tensor)))
        stack.enter_context(mock.patch.object(_dispatch, "interpreted", return_value=False))
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", _launching(device)))
        stack.enter_context(mock.patch.object(refusals, "_weight_refusals", return_value=()))  # of a class of weights
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) then shows its copy
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(device)
        yield device


def _launching(device):
    return lambda kernel, *args, grid, warmup, **settings: device.launch(kernel, args, settings)


def _compile_key(kernel, args, settings):
    """What Triton compiles a kernel for: constants, types, and whether an integer is 1 or a multiple of 16.

    Of `do_not_specialize` it knows nothing inside a tuple.
    """
    parameters = inspect.signature(kernel.fn).parameters
    launch_options = {name: settings[name] for name in settings.keys() - parameters.keys()}
    given = dict(zip(parameters, args, strict=False)) | settings
    varies = set(kernel.kwargs.get("do_not_specialize") or ())
    kinds = [
        given[name] if parameter.annotation is tl.constexpr else _kind(given[name], name not in varies)
        for name, parameter in parameters.items()
    ]
    return (*kinds, *sorted(launch_options.items()))


def _kind(value, specialised):
    if isinstance(value, tuple | list):
        return tuple(_kind(each, True) for each in value)
    if isinstance(value, Tensor):
        return value.dtype
    if isinstance(value, int) and specialised:
        return (int, value == 1, value % 16 == 0)
    return type(value)


def tensors_alive():
    """How many tensors on the device somebody holds."""
    gc.collect()
    return sum(type(each) is NullTensor for each in gc.get_objects())


def _is_real(value):
    return isinstance(value, Tensor) and not isinstance(value, NullTensor)


def _shape_only(value):
    if isinstance(value, NullTensor):
        return value.shape_only
    if isinstance(value, Tensor):
        return value.to("meta")
    return torch.device("meta") if isinstance(value, torch.device) and value == GPU else value
