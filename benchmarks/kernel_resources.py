"""Registers, stack and spills of every GPU kernel, compiled ahead of time: no GPU needed.

`python -m benchmarks.kernel_resources` prints a table of the Triton kernels at the tiles in use and of the CUDA kernels
in the built extension.
"""

from __future__ import annotations

import importlib
import importlib.resources
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
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

    Type "none" is an argument that is left out; a tuple of types one that is a tuple.
    """

    kernel: Any
    types: list[Any]
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
        Case(
            paired_noise.paired_noise_kernel, [i64, f32, f32, *size, *key],
            {"ANTITHETIC": False, "BLOCK": blocks["paired_noise"]},
        ),
        Case(
            paired_step.paired_step_kernel,
            [f32, bf16, bf16, bf16, f32, i64, f32, *size, *10 * stride, *real, "i32", *key],
            {"GUIDED": True, "KEEP_V": True, "ANTITHETIC": False, "BLOCK": blocks["paired_step"]},
        ),
        Case(
            replay.replay_kernel, [bf16, f32, *5 * [i64], f32, *size, "i32", *3 * stride, *key],
            {"ANTITHETIC": False, "BLOCK": blocks["replay"]},
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
    f32, bf16 = POINTERS["float32"], POINTERS["bfloat16"]
    stream, kind = STREAMS * ("i32",), KINDS * (bf16,)
    heads, normed = STREAMS * KINDS * (bf16,), STREAMS * 2 * (bf16,)
    for head_size, rotary in ((64, False), (128, True)):
        rows, columns = op.tile(head_size)
        known = {"STREAMS": STREAMS, "KINDS": KINDS, "NORMED": 15, "ROTARY": rotary}
        tile = {"E": head_size, "ROWS": rows, "BLOCK_E": columns}
        sizes = ["i32", stream, "i32", stream, stream]
        types = [heads, normed, kind, f32, f32, f32, *sizes, "fp32"]
        yield Case(kernels.qk_rms_norm_forward_kernel, types, known | tile)
        for roots, weight_grads in ((f32, False), ("none", True)):
            types = [normed, normed, roots, kind, heads, f32, f32, f32, *sizes, *3 * ["i32"], "fp32"]
            yield Case(kernels.qk_rms_norm_backward_kernel, types, known | {"WEIGHT_GRADS": weight_grads} | tile)


_ODD_SIZES = ("B", "tokens", "HEADS", "kinds")


RANK = 64  # of the adapters; from 32 on the kernels are the same for every rank
STREAMS, LAYERS = 2, 3  # text and image tokens; queries, keys and values
KINDS = 3  # likewise
HEAD = 64


def _linear_cases() -> Iterator[Case]:
    """GELU, and LoRA in bfloat16 and float32, each at the tile that its architecture takes."""
    from fdfo_engine.kernels import gelu, lora_linear

    from fdfo_engine.ops import _gelu, _projection_tiles

    bf16, f32, block = POINTERS["bfloat16"], POINTERS["float32"], {"BLOCK": _gelu.BLOCK}
    yield Case(gelu.gelu_forward_kernel, [bf16, bf16, "i32"], block)
    yield Case(gelu.gelu_backward_kernel, [*4 * [bf16], "i32"], block)
    yield Case(lora_linear.lora_linear_sum_kernel, [f32, f32, "i32", "i32"], {"BLOCK": _projection_tiles.SUM_BLOCK})
    for dtype in (torch.bfloat16, torch.float32):
        yield from _rank_cases(lora_linear, dtype)
        for architecture in ARCHITECTURES:
            yield from _large_cases(lora_linear, dtype, RANK, architecture)
    for architecture in ARCHITECTURES:  # no adapter: the feed-forward's GELU, forward and backward
        yield from _large_cases(lora_linear, torch.bfloat16, 0, architecture)


def _rank_cases(kernels: Any, dtype: torch.dtype) -> Iterator[Case]:
    """Products with a side of the rank, of both streams and all their layers."""
    from fdfo_engine.ops import _projection_tiles

    x, f32, block = POINTERS[str(dtype)[6:]], POINTERS["float32"], _projection_tiles.rank_block(RANK)
    rank, factors = _projection_tiles.rank_tile(dtype), _projection_tiles.FACTORS
    known = {"STREAMS": STREAMS, "LAYERS": LAYERS}
    xs, stream = STREAMS * (x,), STREAMS * ("i32",)
    layers, layer, masters = STREAMS * LAYERS * (x,), STREAMS * LAYERS * ("i32",), STREAMS * LAYERS * (f32,)
    tile = {"WIDE": x == f32, "ROWS": rank.rows, "RANK": block, "INNER": rank.inner}
    types = [xs, masters, layers, "i32", *4 * [stream], layer, STREAMS * LAYERS * ("fp32",), "i32"]
    yield Case(kernels.lora_linear_rank_product_kernel, types, known | tile, _options(rank))
    yield from _rank_gradient_cases(kernels, dtype)
    known["SPLITS"] = _projection_tiles.SPLITS
    tile = {"WIDE": x == f32, "ROWS": factors.rows, "RANK": block, "COLUMNS": factors.columns}
    types = [xs, layers, layers, layers, f32, "i32", *5 * [stream], *4 * [layer], "i32", "i32"]
    yield Case(kernels.lora_linear_factors_kernel, types, known | tile, _options(factors))


def _rank_gradient_cases(kernels: Any, dtype: torch.dtype) -> Iterator[Case]:
    """Of all layers; of one a stream through its gate; of all through the norms of queries and keys."""
    from fdfo_engine.ops import _projection_tiles

    x, f32 = POINTERS[str(dtype)[6:]], POINTERS["float32"]
    for count, gated, normed in ((LAYERS, False, 0), (1, True, 0), (LAYERS, False, 0b011011)):
        stream, layer = STREAMS * ("i32",), STREAMS * count * ("i32",)
        layers, none, masters = STREAMS * count * (x,), STREAMS * count * ("none",), STREAMS * count * (f32,)
        norms = [layers, layers, masters] if normed else 3 * [none]
        types = [layers, masters, layers, layers if gated else none, *norms, layers if gated or normed else none]
        types += ["i32", *2 * [stream], *6 * [layer], STREAMS * count * ("fp32",)]
        tile, head = _projection_tiles.rank_tile(dtype, through_end=gated or normed > 0), HEAD if normed else 1
        known = {"STREAMS": STREAMS, "LAYERS": count, "NORMED": normed, "HEAD": head, "WIDE": x == f32}
        sizes = {"ROWS": tile.rows, "RANK": _projection_tiles.rank_block(RANK), "INNER": max(tile.inner, head)}
        yield Case(kernels.lora_linear_rank_gradient_kernel, types, known | sizes, _options(tile))


def _large_cases(kernels: Any, dtype: torch.dtype, rank: int, architecture: int) -> Iterator[Case]:
    """Forward and gradient of x: of all layers, one with GELU, one a stream with a residual, all with norms."""
    from fdfo_engine.ops import _projection_tiles

    x, wide = POINTERS[str(dtype)[6:]], {"WIDE": dtype == torch.float32}
    shapes = [(STREAMS, LAYERS, False, False, 0), (1, 1, True, False, 0)]
    shapes += [(STREAMS, 1, False, True, 0), (STREAMS, LAYERS, False, False, HEAD)] * (rank > 0)
    for streams, count, gelu, added, head in shapes:
        xs, layers, none = streams * (x,), streams * count * (x,), streams * count * ("none",)
        adapter = [layers, streams * count * (POINTERS["float32"],)] if rank else [none, none]
        stream, layer = streams * ("i32",), streams * count * ("i32",)
        forward = [xs, layers, layers, *adapter, layers if gelu else none, *2 * [layers if added else none]]
        roots = streams * count * (POINTERS["float32"],)
        forward += [
            layers if head else none,
            roots if head else none,
            layers,
            "i32",
            *4 * [stream],
            *6 * [layer],
            "i32",
            "fp32",
        ]
        backward = [layers, layers, *adapter, x if gelu else "none", xs, "i32", *3 * [stream], *5 * [layer], "i32"]
        known = {"STREAMS": streams, "LAYERS": count}
        for kernel, types, more in (
            (kernels.lora_linear_kernel, forward, gelu or added), (kernels.lora_linear_input_kernel, backward, True),
        ):  # fmt: skip
            tile = _projection_tiles.tile(dtype, architecture // 10, more=more)
            constants = known | ({"HEAD": head, "GELU": gelu} if types is forward else {}) | wide
            sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner}
            sizes |= {"RANK": _projection_tiles.rank_block(rank), "GROUP": tile.group}
            yield Case(kernel, types, constants | sizes, _options(tile), (architecture,))


def _options(tile: Any) -> dict[str, Any]:
    return {"num_warps": tile.warps, "num_stages": tile.stages}


def _block_cases(size: int) -> list[Case]:
    """Of a transformer block of width `size`, with all that a kernel can be asked for: less takes fewer registers."""
    from fdfo_engine.kernels import gated_residual, layer_norm_modulate

    ops = importlib.import_module("fdfo_engine.ops._norm_streams")
    block, warps = ops.tile(size)
    f32, bf16, stride = POINTERS["float32"], POINTERS["bfloat16"], ["i32"]
    tile = {"TOKENS": ops.TOKENS, "BLOCK": block}

    def two(kind: str) -> tuple[str, ...]:
        return STREAMS * (kind,)

    def launch(warps: int) -> dict[str, Any]:
        return {"enable_fp_fusion": False, "num_warps": warps}

    return [
        Case(
            layer_norm_modulate.layer_norm_modulate_forward_kernel,
            [*7 * [two(bf16)], two(f32), *3 * [two(bf16)], "i32", two("i32"), "i32", *9 * [two("i32")], "fp32"],
            {"STREAMS": STREAMS, "BLOCK": block}, launch(warps),
        ),
        Case(
            layer_norm_modulate.layer_norm_modulate_backward_kernel,
            [
                *5 * [two(bf16)], two(f32), *5 * [two(bf16)], two(f32), two("i32"), "i32", two("i32"), "i32",
                *13 * [two("i32")],
            ],
            {"STREAMS": STREAMS, "SUM_MODULATIONS": True} | tile, launch(2 * warps),
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
    signature = dict(zip(names, [*map(_signature, case.types), *["constexpr"] * len(case.constants)], strict=True))
    places = dict(_places(case.types))
    left_out = {place: None for place, kind in places.items() if kind == "none"}
    multiples = [
        place for place, kind in places.items()
        if kind.startswith("*") or (kind == "i32" and names[place[0]] not in _ODD_SIZES)
    ]  # fmt: skip
    source = ASTSource(
        case.kernel, signature, constexprs={**left_out, **case.constants},
        attrs={place: [["tt.divisibility", 16]] for place in multiples},
    )  # fmt: skip
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        found = list(cubin_resources(Path(file.name), f"sm_{architecture}"))
    name = f"triton {case.kernel.fn.__name__.removesuffix('_kernel')}"
    return found[0]._replace(kernel=name, approximate=len(re.findall(r"\b(?:lg2|sqrt|ex2)\.approx", built.asm["ptx"])))


def _signature(kind: Any) -> Any:
    """The type of an argument as Triton's compiler takes it."""
    return tuple(map(_signature, kind)) if isinstance(kind, tuple) else "constexpr" if kind == "none" else kind


def _places(types: Sequence[Any], inside: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """Path and type of every argument, those inside tuples too."""
    for i, kind in enumerate(types):
        if isinstance(kind, tuple):
            yield from _places(kind, (*inside, i))
        else:
            yield (*inside, i), kind


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
