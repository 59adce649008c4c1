"""Which files of a pipeline folder its outputs depend on, and what they hold.

They are those that diffusers and transformers read: what `model_index.json` says of the parts, the config of each part
and the weight files that loading chooses. Of configs the meaning counts, not the order of keys or the version that
wrote them. READMEs, weights in formats or variants that are not read, and shards that no index names don't count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.base_record import BaseFile
from fdfo_engine.runtime.content_hash import content_hashes

INDEX_NAME = "model_index.json"

_NEVER_READ = ("image_encoder", "feature_extractor", "safety_checker")
"""Parts of a pipeline that only work with pictures as input, or look at finished ones."""

_WITHOUT_TEXT = ("transformer", "vae", "scheduler")
"""Parts that no embedding of a prompt depends on."""

_ABOUT_THE_FILE = (
    "_name_or_path", "name_or_path", "_diffusers_version", "transformers_version", "_commit_hash",
)  # fmt: skip
"""Keys of configs that say where and when the file was written."""

_CONFIGS = (
    INDEX_NAME, "config.json", "scheduler_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "adapter_config.json",
)  # fmt: skip
_OF_MODELS = ("config.json", "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_NO_DATA = (".md", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".lock", ".metadata")
_STEMS = {
    "diffusers": (("diffusion_pytorch_model", "safetensors"), ("diffusion_pytorch_model", "bin")),
    "transformers": (("model", "safetensors"), ("pytorch_model", "bin")),
}


def base_files(folder: Path, variant: str | None = None) -> dict[str, BaseFile]:
    """What the outputs of the pipeline in `folder` depend on, by path in it.

    Raises:
        OSError: a file that would be read is missing or unreadable.
        ValueError: `model_index.json` is no list of parts.
    """
    return _hashed(folder, _read_index(folder), variant)


def text_files(folder: Path, variant: str | None = None) -> dict[str, BaseFile]:
    """As `base_files`, but only what an embedding of a prompt depends on: not transformer, VAE and scheduler.

    Raises:
        OSError, ValueError: as `base_files`.
    """
    index = {part: value for part, value in _read_index(folder).items() if part not in _WITHOUT_TEXT}
    return _hashed(folder, index, variant)


def _read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` as far as it counts: parts that are there, as [library, class], and further settings."""
    index = json.loads((folder / INDEX_NAME).read_bytes())
    if not isinstance(index, dict):
        raise ValueError(f"{folder / INDEX_NAME}: no mapping of parts")
    return {
        key: value
        for key, value in index.items()
        if key not in (*_ABOUT_THE_FILE, *_NEVER_READ) and not (_is_part(value) and value[0] is None)
    }


def _is_part(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2


def _hashed(folder: Path, index: Mapping[str, Any], variant: str | None) -> dict[str, BaseFile]:
    paths: list[Path] = []
    for part, value in sorted(index.items()):
        if _is_part(value):
            paths += _part_files(folder / part, str(value[0]), variant)
    texts = {path: _config_text(path) for path in paths}
    plain = [path for path, text in texts.items() if text is None]
    hashes = dict(zip(plain, content_hashes(plain), strict=True))
    found = {INDEX_NAME: _of_text(_canonical(index))}
    for path, text in texts.items():
        name = path.relative_to(folder).as_posix()
        found[name] = BaseFile(path.stat().st_size, hashes[path]) if text is None else _of_text(text)
    return found


def _part_files(folder: Path, library: str, variant: str | None) -> list[Path]:
    """The files of one part that loading reads: of a model its configs and chosen weights, else all that hold data."""
    weights = _chosen_weights(folder, library, variant)
    if weights:
        configs = [folder / name for name in _OF_MODELS]
        return [*filter(Path.is_file, configs), *weights]
    if (scheduler := folder / "scheduler_config.json").is_file():
        return [scheduler]
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and _holds_data(path.relative_to(folder))]


def _holds_data(path: Path) -> bool:
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not (is_hidden or path.suffix.lower() in _NO_DATA or path.stem.upper() in ("README", "LICENSE", "NOTICE"))


def _chosen_weights(folder: Path, library: str, variant: str | None) -> list[Path]:
    """The weight file, or the index and its shards, that `library` takes of those in `folder`; empty for none."""
    for chosen in dict.fromkeys((variant, None)):
        for stem, suffix in _STEMS.get(library, ()):
            for name in _weight_names(library, stem, suffix, chosen):
                path = folder / name
                if path.is_file():
                    return [path, *_shards(path)]
    return []


def _weight_names(library: str, stem: str, suffix: str, variant: str | None) -> Sequence[str]:
    """Names of weights in the order in which they are looked for: diffusers takes an index before a single file."""
    if variant is None:
        single, indices = f"{stem}.{suffix}", [f"{stem}.{suffix}.index.json"]
    else:
        single = f"{stem}.{variant}.{suffix}"
        indices = [f"{stem}.{suffix}.index.{variant}.json", f"{stem}.{suffix}.{variant}.index.json"]
    return [*indices, single] if library == "diffusers" else [single, *indices]


def _shards(path: Path) -> Iterator[Path]:
    if path.suffix == ".json":
        for name in sorted(set(json.loads(path.read_bytes())["weight_map"].values())):
            yield path.parent / name


def _config_text(path: Path) -> bytes | None:
    """What a config says, in one form; None for any other file, and for one that is no JSON."""
    is_index = path.suffix == ".json" and ".index." in path.name
    if path.name not in _CONFIGS and not is_index:
        return None
    try:
        value = json.loads(path.read_bytes())
    except ValueError:
        return None
    return _canonical(value["weight_map"] if is_index else value)


def _canonical(value: Any) -> bytes:
    return json.dumps(_meaning(value), sort_keys=True).encode()


def _meaning(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _meaning(item) for key, item in value.items() if key not in _ABOUT_THE_FILE}
    return [_meaning(item) for item in value] if isinstance(value, list) else value


def _of_text(text: bytes) -> BaseFile:
    return BaseFile(len(text), hashlib.sha256(text).hexdigest())
