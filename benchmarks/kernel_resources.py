"""Registers, stack and spills of every GPU kernel, compiled ahead of time: no GPU needed.

`python -m benchmarks.kernel_resources` prints a table of the Triton kernels at the tiles in use and of the CUDA kernels
in the built extension.
"""

from __future__ import annotations

import importlib
import importlib.resources
import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 90, 100)
POINTERS = {"float32": "*fp32", "bfloat16": "*bf16", "float64": "*fp64", "int64": "*i64", "int32": "*i32"}


class Resources(NamedTuple):
    """What one kernel takes on one architecture.

    `spills` counts loads from and stores to local memory in its machine code; `approximate` the fast logarithms, roots
    and exponentials in a Triton kernel's PTX, which would cost noise and loss their accuracy.
    """

    kernel: str
    architecture: str
    registers: int
    stack: int
    shared: int
    spills: int
    approximate: int = 0


class Case(NamedTuple):
    """A Triton kernel with the types of its arguments, in order, its compile-time constants and launch options.

    Type "none" is an argument that is left out.
    """

    kernel: Any
    types: list[str]
    constants: dict[str, Any]
    options: dict[str, Any] = {"enable_fp_fusion": False}  # noqa: RUF012
    architectures: tuple[int, ...] = ARCHITECTURES


def triton_cases() -> list[Case]:
    """Every Triton kernel as the ops launch it: bfloat16 tensors, the block sizes of `fdfo_engine.ops`."""
    return [*_pair_cases(), *(case for size in (1536, 3072) for case in _block_cases(size))]


def _pair_cases() -> list[Case]:
    from fdfo_engine.kernels import fdfo_loss, pair_direction, paired_noise, paired_step, philox_normal, replay

    f32, bf16, f64, i64 = (POINTERS[name] for name in ("float32", "bfloat16", "float64", "int64"))
    key, size, stride, real = ["i64", "i64"], ["i32"], ["i32"], ["fp32"]
    loss = importlib.import_module("fdfo_engine.ops.fdfo_loss")
    blocks = {name: importlib.import_module(f"fdfo_engine.ops.{name}").BLOCK for name in _OPS}
    return [
        Case(philox_normal.philox_normal_kernel, [i64, i64, f32, *size, *key], {"BLOCK": blocks["philox_normal"]}),
        Case(paired_noise.paired_noise_kernel, [i64, f32, f32, *size, *key], {"BLOCK": blocks["paired_noise"]}),
        Case(
            paired_step.paired_step_kernel,
            [f32, bf16, bf16, bf16, f32, i64, f32, *size, *10 * stride, *real, "i32", *key],
            {"GUIDED": True, "KEEP_V": True, "BLOCK": blocks["paired_step"]},
        ),
        Case(
            replay.replay_kernel, [bf16, f32, *5 * [i64], f32, *size, "i32", *3 * stride, *key],
            {"BLOCK": blocks["replay"]},
        ),
        Case(
            pair_direction.pair_direction_kernel, [f32, f32, *size, *3 * stride, *real],
            {"BLOCK": blocks["pair_direction"]},
        ),
        *(
            Case(
                fdfo_loss.fdfo_loss_forward_kernel,
                [bf16, bf16, f32, i64, i64, f32, f64, POINTERS["int32"], f64, f32, f32, "i32", *size, "i32",
                 *3 * stride, *2 * real],
                {"ROWS": loss.ROWS, "PARTS": parts, "BLOCK": blocks["fdfo_loss"]},
            )
            for parts in (1, 16, loss.MAX_PARTS)
        ),
        Case(
            fdfo_loss.fdfo_loss_backward_kernel,
            [bf16, bf16, f32, i64, i64, f64, f32, bf16, *size, *3 * stride], {"BLOCK": blocks["fdfo_loss"]},
        ),
        *_qk_rms_norm_cases(),
        *_linear_cases(),
    ]  # fmt: skip


def _qk_rms_norm_cases() -> Iterator[Case]:
    """As SD3.5 has it, heads of 64 without rotary embedding; as FLUX has it, 128 with one, and gradients of weights."""
    from fdfo_engine.kernels import qk_rms_norm as kernels

    op = importlib.import_module("fdfo_engine.ops.qk_rms_norm")
    f32, bf16, sizes = POINTERS["float32"], POINTERS["bfloat16"], [*8 * ["i32"]]
    for head_size, rotary in ((64, False), (128, True)):
        rows, columns = op.tile(head_size)
        known, tile = {"NORMED": 15, "ROTARY": rotary}, {"E": head_size, "ROWS": rows, "BLOCK_E": columns}
        types = [*13 * [bf16], f32, f32, *sizes, "fp32"]
        yield Case(kernels.qk_rms_norm_forward_kernel, types, known | tile)
        types = [*17 * [bf16], f32, f32, f32, *sizes, *3 * ["i32"], "fp32"]
        yield Case(kernels.qk_rms_norm_backward_kernel, types, known | {"WEIGHT_GRADS": rotary} | tile)


_ODD_SIZES = ("B", "TOKENS0", "TOKENS1", "HEADS")


def _linear_cases() -> Iterator[Case]:
    """GELU, and LoRA of rank 32 in bfloat16 and float32, each at the tile that its architecture takes."""
    from fdfo_engine.kernels import gelu, lora_linear

    from fdfo_engine.ops import _gelu, _lora_triton

    bf16, f32, block = POINTERS["bfloat16"], POINTERS["float32"], {"BLOCK": _gelu.BLOCK}
    yield Case(gelu.gelu_forward_kernel, [bf16, bf16, "i32"], block)
    yield Case(gelu.gelu_backward_kernel, [*4 * [bf16], "i32"], block)
    yield Case(lora_linear.lora_linear_sum_kernel, [f32, f32, "i32", "i32"], {"BLOCK": _lora_triton.SUM_BLOCK})
    for x, dtype in ((bf16, torch.bfloat16), (f32, torch.float32)):
        wide, thin, factors = {"WIDE": x == f32}, _lora_triton.THIN, _lora_triton.FACTORS
        for backward in (False, True):
            constants = {"BACKWARD": backward, **wide, "ROWS": thin.rows, "RANK": 32, "INNER": thin.inner}
            yield Case(
                lora_linear.lora_linear_thin_kernel, [x, f32, x, *5 * ["i32"], "fp32"], constants, _options(thin)
            )
        constants = {**wide, "ROWS": factors.rows, "RANK": 32, "COLUMNS": factors.columns}
        types = [*4 * [x], f32, *9 * ["i32"]]
        yield Case(lora_linear.lora_linear_factors_kernel, types, constants, _options(factors))
        for architecture, (backward, use_gelu) in itertools.product(ARCHITECTURES, COMBINATIONS):
            tile = _lora_triton.tile(dtype, architecture // 10, gelu=use_gelu)
            constants = {
                "BACKWARD": backward, "GELU": use_gelu, **wide, "ROWS": tile.rows, "COLUMNS": tile.columns,
                "INNER": tile.inner, "RANK": 32, "GROUP": tile.group,
            }  # fmt: skip
            optional = ["none" if backward else x, x, f32, x if backward else "none", x if use_gelu else "none"]
            types = [x, x, *optional, x, *6 * ["i32"]]
            yield Case(lora_linear.lora_linear_kernel, types, constants, _options(tile), (architecture,))


COMBINATIONS = ((False, False), (False, True), (True, False))  # backward, GELU


def _options(tile: Any) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _block_cases(size: int) -> list[Case]:
    """Of a transformer block of width `size`, with all that a kernel can be asked for: less takes fewer registers."""
    from fdfo_engine.kernels import gated_residual, layer_norm_modulate

    ops = importlib.import_module("fdfo_engine.ops.layer_norm_modulate")
    block, warps = ops.tile(size)
    f32, bf16, stride = POINTERS["float32"], POINTERS["bfloat16"], ["i32"]
    tile = {"TOKENS": ops.TOKENS, "BLOCK": block}
    norm, sums = {"RESIDUAL": True, "SECOND": True}, {"UPSTREAM_X": True, "SUM_MODULATIONS": True, "SUM_GATE": True}

    def launch(warps: int) -> dict[str, Any]:
        return {"enable_fp_fusion": False, "num_warps": warps}

    return [
        Case(
            layer_norm_modulate.layer_norm_modulate_forward_kernel,
            [*7 * [bf16], f32, *3 * [bf16], *2 * ["i32"], *9 * stride, "fp32"],
            norm | {"KEEP": True, "BLOCK": block}, launch(warps),
        ),
        Case(
            layer_norm_modulate.layer_norm_modulate_backward_kernel,
            [*5 * [bf16], f32, *5 * [bf16], f32, *2 * ["i32"], *13 * stride], norm | sums | {"KINDS": 5} | tile,
            launch(2 * warps),
        ),
        Case(
            gated_residual.gated_residual_forward_kernel, [*4 * [bf16], *2 * ["i32"], *5 * stride],
            {"BLOCK": block}, launch(warps),
        ),
        Case(
            gated_residual.gated_residual_backward_kernel, [*4 * [bf16], f32, *2 * ["i32"], *5 * stride],
            {"DY": True, "SUM_GATE": True} | tile, launch(warps),
        ),
    ]  # fmt: skip


_OPS = ("philox_normal", "paired_noise", "paired_step", "replay", "pair_direction", "fdfo_loss")


def triton_resources(case: Case, architecture: int) -> Resources:
    """Compiles one kernel for one architecture and reads its machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = ["constexpr" if kind == "none" else kind for kind in case.types]
    signature = dict(zip(names, [*types, *["constexpr"] * len(case.constants)], strict=True))
    left_out = {name: None for name, kind in zip(names, case.types, strict=False) if kind == "none"}
    multiples = [
        i for i, kind in enumerate(case.types) if kind.startswith("*") or (kind == "i32" and names[i] not in _ODD_SIZES)
    ]
    source = ASTSource(
        case.kernel, signature, constexprs={**left_out, **case.constants},
        attrs={(i,): [["tt.divisibility", 16]] for i in multiples},
    )  # fmt: skip
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        found = list(cubin_resources(Path(file.name), f"sm_{architecture}"))
    name = f"triton {case.kernel.fn.__name__.removesuffix('_kernel')}"
    return found[0]._replace(kernel=name, approximate=len(re.findall(r"\b(?:lg2|sqrt|ex2)\.approx", built.asm["ptx"])))


def cubin_resources(path: Path, architecture: str) -> Iterator[Resources]:
    """Of every kernel in an ELF file, by cuobjdump."""
    usage = _cuobjdump("-res-usage", path)
    spills = _spills(_cuobjdump("-sass", path))
    for name, numbers in re.findall(r"Function (\S+):\n\s*(REG:.*)", usage):
        values = dict(pair.split(":")[:2] for pair in re.findall(r"[A-Z]+:\d+", numbers))
        yield Resources(
            name, architecture, int(values["REG"]), int(values["STACK"]), int(values["SHARED"]), spills[name]
        )


def _spills(sass: str) -> dict[str, int]:
    parts = re.split(r"Function : (\S+)", sass)[1:]
    return {name: len(re.findall(r"\b(?:STL|LDL)\b", code)) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def cuda_resources() -> Iterator[Resources]:
    """Of the CUDA kernels in the built extension."""
    from fdfo_engine import _native

    extension = Path(_native.__file__)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([_tool(), "-xelf", "all", str(extension)], cwd=folder, check=True, capture_output=True)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            architecture = re.search(r"sm_\w+", cubin.name).group().split(".")[0]
            for found in cubin_resources(cubin, architecture):
                yield found._replace(kernel=f"cuda {_readable(found.kernel)}")


def _readable(mangled: str) -> str:
    """Kernel and type arguments of a mangled name: `_ZN4fdfo4cuda18paired_step_kernelINS_8BFloat16EEEv...`."""
    plain = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.search(r"cuda::(\w+?)_kernel(<[^(]*>)?", plain)
    return name.group(1) + (name.group(2) or "").replace("fdfo::", "")


def _cuobjdump(flag: str, path: Path) -> str:
    return subprocess.run([_tool(), flag, str(path)], check=True, capture_output=True, text=True).stdout


def _tool() -> str:
    """The cuobjdump that comes with triton."""
    return str(importlib.resources.files("triton") / "backends/nvidia/bin/cuobjdump")


def main() -> None:
    """Prints the table."""
    assert os.environ.get("TRITON_INTERPRET") != "1", "interpreted kernels are not compiled"
    rows = [triton_resources(case, architecture) for case in triton_cases() for architecture in case.architectures]
    rows += cuda_resources()
    print(f"{'kernel':60} {'arch':8} {'registers':>9} {'stack':>6} {'shared':>7} {'spills':>7}")
    for row in rows:
        print(f"{row.kernel:60} {row.architecture:8} {row.registers:9} {row.stack:6} {row.shared:7} {row.spills:7}")


if __name__ == "__main__":
    main()
