"""In the place of Triton's driver: a kernel is compiled as ever, and its PTX runs on tensors of the CPU."""

import functools
import hashlib
import struct
from collections import Counter

import torch
import triton
from offgpu.ptx.machine import WARP, Machine, min_access
from offgpu.ptx.memory import Memory
from offgpu.ptx.program import parsed
from triton.backends.compiler import GPUTarget

FORMATS = {
    "i1": "<b", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u1": "<B", "u8": "<B", "u16": "<H", "u32": "<I",
    "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip


class Driver:
    """Triton asks it which GPU there is, and hands it what it compiled.

    Attributes:
        executed: how often each kernel was launched. texts: PTX of each, the newest.
        edit: takes a kernel's name and its PTX and returns the text that is run, to plant a fault.
        capability: of the GPU that is compiled for: 80 or 90, or any for kernels without matrix products.
    """

    def __init__(self, capability):
        self.executed, self.texts, self.edit = Counter(), {}, lambda name, text: text
        self.capability = capability
        self.utils, self.launcher_cls = self, functools.partial(_Launcher, self)

    def get_device_properties(self, device):
        return {
            "max_shared_mem": (163 if self.capability < 90 else 227) * 1024,
            "multiprocessor_count": 108,
            "warpSize": 32,
            "max_num_regs": 65536,
        }

    def load_binary(self, name, binary, shared, device):
        return None, binary.decode(), 0, 0, 1024

    def get_current_device(self):
        return self.capability  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)


def install(capability):
    """Makes a `Driver` the one that Triton asks from now on."""
    triton.knobs.runtime.add_stages_inspection_hook = _without_assembler
    triton.runtime.driver.set_active(driver := Driver(capability))
    return driver


def _without_assembler(_backend=None, stages=None, *_options):
    """The binary is the PTX itself. Called without arguments it is asked for its part of the cache's key."""
    if stages is None:
        return "PTX", hashlib.sha256(b"PTX").hexdigest()
    stages["cubin"] = lambda ptx, metadata: ptx.encode()
    return None


class _Launcher:
    """Called by Triton to run one kernel."""

    def __init__(self, driver, source, metadata):
        self.driver, self.metadata = driver, metadata
        self.types = list(source.signature.values())

    def __call__(self, x, y, z, stream, text, packed, launch_metadata, enter, leave, *arguments):
        name = self.metadata.name
        self.driver.executed[name] += 1
        self.driver.texts[name] = text
        program = program_of(self.driver.edit(name, text))
        launch(program, (x, y, z), self.metadata, list(_flat(self.types, arguments)))


program_of = functools.lru_cache(maxsize=256)(parsed)


def _flat(types, arguments):
    """Type and value of each argument that the kernel has at run time, those of tuples one by one."""
    for kind, argument in zip(types, arguments, strict=True):
        if isinstance(kind, tuple):
            yield from _flat(kind, argument)
        elif kind != "constexpr":
            yield kind, argument


def launch(program, grid, metadata, arguments):
    """Runs a program on tensors and numbers, pairs of a type and a value."""
    tensors = DeviceMemory([value for _, value in arguments if isinstance(value, torch.Tensor)], program)
    values = []
    for kind, value in arguments:
        is_pointer = isinstance(value, torch.Tensor)
        values.append(struct.pack(*(("<Q", tensors.address(value)) if is_pointer else (FORMATS[kind], value))))
    parameters = bytearray(program.parameter_bytes)  # with scratch that Triton passes last, and nobody uses
    for (offset, size), value in zip(program.parameters, values, strict=False):
        assert len(value) == size, f"{program.name}: a parameter of {size} bytes gets {len(value)}"
        parameters[offset : offset + size] = value
    Machine(program, grid, metadata.num_warps * WARP, bytes(parameters), tensors.memory, metadata.shared).run()
    tensors.copy_back()


class DeviceMemory:
    """Copies of what the tensors are views of, between gaps. Only the tensors' own elements may be accessed."""

    BASE, GAP = 1 << 20, 4096

    def __init__(self, tensors, program):
        self.storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
        self.starts, end = {}, self.BASE
        for address, storage in self.storages.items():
            self.starts[address] = end + address % 16
            end += -(-storage.nbytes() // 16) * 16 + self.GAP
        self.memory = Memory("global", end, min_access(program, "global"))
        for address, storage in self.storages.items():
            self._bytes(address)[:] = _as_array(storage)
        for tensor in tensors:
            self._open(tensor)

    def address(self, tensor):
        """Of its first element."""
        storage = tensor.untyped_storage().data_ptr()
        return self.starts[storage] + tensor.data_ptr() - storage

    def copy_back(self):
        """What the kernel wrote."""
        for address, storage in self.storages.items():
            _as_array(storage)[:] = self._bytes(address)

    def _bytes(self, address):
        start = self.starts[address]
        return self.memory.data[start : start + self.storages[address].nbytes()]

    def _open(self, tensor):
        size = tensor.itemsize
        marks = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.bool)
        strides = [stride * size for stride in tensor.stride()]
        marks.as_strided((*tensor.shape, size), (*strides, 1), tensor.storage_offset() * size).fill_(True)
        start = self.starts[tensor.untyped_storage().data_ptr()]
        self.memory.inside[start : start + len(marks)] |= marks.numpy()


def _as_array(storage):
    """Its bytes, shared."""
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    return whole.numpy()
