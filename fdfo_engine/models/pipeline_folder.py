"""What a path that is no whole pipeline folder is instead, and how to make one of it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.runtime.json_text import json_object

GGUF = ".gguf"
_WEIGHT_SUFFIXES = (".safetensors", ".sft", GGUF, ".ckpt", ".pt", ".pth", ".bin")
_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|pytorch_model|model)(?P<middle>[^/]*)\.(?:safetensors|bin)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
INDEX = "model_index.json"
_TAKES = "takes the folder of a diffusers pipeline"


@dataclass(frozen=True)
class _Maker:
    """What a snippet needs of a family: its classes, a base with the other parts, and how its files are known."""

    pipeline: str
    transformer: str
    base: str
    words: tuple[str, ...]
    """In the names of its files."""
    tensors: str
    """In the names of tensors of its original code."""

    def snippet(self, source: str, *, is_folder: bool) -> str:
        """Three lines of Python that make a pipeline folder of a file of weights, or of a transformer's folder."""
        dtype = "dtype=torch.bfloat16"
        made = f'{"from_pretrained" if is_folder else "from_single_file"}("{source}", {dtype})'
        if source.lower().endswith(GGUF):
            packing = "quantization_config=diffusers.GGUFQuantizationConfig(torch.bfloat16)"
            made = f'from_single_file("{source}", {packing}, {dtype}).dequantize()'
        return "\n".join(
            [
                "import torch, diffusers",
                f"transformer = diffusers.{self.transformer}.{made}",
                f'diffusers.{self.pipeline}.from_pretrained("{self.base}", transformer=transformer, {dtype})'
                '.save_pretrained("FOLDER")',
            ]
        )


_MAKERS = (
    _Maker(
        "FluxPipeline", "FluxTransformer2DModel", "black-forest-labs/FLUX.1-dev", ("flux",), "double_blocks."
    ),
    _Maker(
        "StableDiffusion3Pipeline", "SD3Transformer2DModel", "stabilityai/stable-diffusion-3.5-medium",
        ("sd3", "stable-diffusion-3", "stable_diffusion_3"), "joint_blocks.",
    ),
    _Maker("QwenImagePipeline", "QwenImageTransformer2DModel", "Qwen/Qwen-Image", ("qwen",), ".img_mod."),
)  # fmt: skip


def names_a_file(model_id: str) -> bool:
    """Whether `model_id` is a file of weights, here or elsewhere, by its name."""
    return model_id.lower().endswith(_WEIGHT_SUFFIXES) and not Path(model_id).is_dir()


def why_no_pipeline(model_id: str) -> str:
    """Why `model_id`, a file of weights or a folder without model_index.json, is no pipeline, and what to do."""
    return _why_no_file(model_id) if names_a_file(model_id) else _why_no_folder(model_id)


def _why_no_file(model_id: str) -> str:
    path = Path(model_id)
    if path.is_absolute() and not path.is_file():
        return f"no such file; {_TAKES}"
    kind = "a GGUF file" if model_id.lower().endswith(GGUF) else "one file of weights"
    return f"{kind}; {_TAKES}, which is made so:\n{_maker(path).snippet(_reachable(model_id), is_folder=False)}"


def _why_no_folder(model_id: str) -> str:
    path = Path(model_id)
    nested = sorted(p.parent for pattern in ("*/", "snapshots/*/") for p in path.glob(f"{pattern}{INDEX}"))
    if nested:
        return f"a folder without {INDEX}; there is one in {nested[-1]}"
    if (path / "adapter_config.json").is_file() or (path / "pytorch_lora_weights.safetensors").is_file():
        return "a folder with a LoRA; takes the pipeline that it belongs to"
    for maker in _MAKERS:
        if _class_name(path / "config.json") == maker.transformer:
            return f"a transformer alone; {_TAKES}, which is made so:\n{maker.snippet(model_id, is_folder=True)}"
    files = sorted(file for file in path.iterdir() if file.name.lower().endswith(_WEIGHT_SUFFIXES))
    if files:
        made = _maker(files[0]).snippet(str(files[0]), is_folder=False)
        return f"a folder without {INDEX}; {_TAKES}, which is made so of a file of weights:\n{made}"
    return f"a folder without {INDEX} is no diffusers pipeline"


def require_parts(model_id: str, index: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Holds the parts that model_index.json names against those that are needed and, in a folder, that are there.

    Raises:
        EnvironmentProblem: one is missing.
    """
    for part in needed:
        if index.get(part, [None])[0] is None:
            raise EnvironmentProblem(f"model.id = {model_id!r}: model_index.json names no {part}, which is needed")
    named = [part for part, entry in index.items() if isinstance(entry, list | tuple) and entry[0] is not None]
    for part in named if Path(model_id).is_dir() else []:
        if not (Path(model_id) / part).is_dir():
            raise EnvironmentProblem(
                f"model.id = {model_id!r}: its part {part} is missing: no folder of that name in it"
            )


def variants(part: Path) -> set[str | None]:
    """Variants of the weight files of a part's folder; None is the plain one."""
    found: set[str | None] = set()
    for file in part.iterdir():
        if match := _WEIGHTS.fullmatch(file.name):
            found.add(_SHARD.sub("", match["middle"]).removeprefix(".") or None)
    return found


def require_variant(model_id: str, variant: str | None) -> None:
    """Holds `model.variant` against the files of a local folder; a part without such files may have plain ones.

    Raises:
        EnvironmentProblem: a part's weights are of other variants only, or no part has this one; says which there are.
    """
    parts = sorted(path for path in Path(model_id).glob("*/") if path.is_dir())
    known = {part.name: variants(part) for part in parts}
    usable = {None, variant}
    for name, present in known.items():
        if present and present.isdisjoint(usable):
            others = ", ".join(sorted(filter(None, present)))
            raise EnvironmentProblem(
                f"model.variant = {variant}: the weights of {name} in {model_id} are of variant {others} only; "
                f"set model.variant: {others}"
            )
    if variant and known and variant not in set().union(*known.values()):
        raise EnvironmentProblem(f"model.variant = {variant}: {model_id} has no weights of it; set model.variant: null")


def _class_name(file: Path) -> str:
    try:
        return str(json_object(file.read_bytes()).get("_class_name", ""))
    except (OSError, ValueError):
        return ""


def _maker(file: Path) -> _Maker:
    """Of the family that `file` is of by its name or its tensors; the first where neither tells."""
    for maker in _MAKERS:
        if any(word in file.name.lower() for word in maker.words):
            return maker
    names = _tensor_names(file)
    return next((maker for maker in _MAKERS if any(maker.tensors in name for name in names)), _MAKERS[0])


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (OSError, SafetensorError):
        return []


def _reachable(model_id: str) -> str:
    """A file of a hub's repository, OWNER/NAME/FILE, as diffusers takes it; a path as it stands."""
    match = re.fullmatch(r"([\w-][\w.-]*/[\w.-]+)/(.+)", model_id)
    if match is None or Path(model_id).is_file():
        return model_id
    return f"https://huggingface.co/{match[1]}/blob/main/{match[2]}"
