"""How an export is used, in lines to copy: for its model card."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fdfo_engine.config import Config

_INDEX = "model_index.json"
_ABSENT = (
    "The pipeline has none of the parts that are given as `None`, and its index says so; diffusers drops such entries "
    "as it reads the index, and then asks for every part that the pipeline's class does not list among its "
    "`_optional_components`."
)


def usage(config: Config, base: str, folder: Path) -> str:
    """Markdown on how the export in `folder`, of a model made from `base`, is loaded.

    A pipeline that has no third text encoder, as SD3 may, is loaded with that said: diffusers asks for it.
    """
    if (folder / _INDEX).is_file():
        return _python(config, _loading(folder.name, absent_parts(folder)), lora=None)
    lora = next((file.name for file in sorted(folder.glob("*comfyui.safetensors"))), None)
    if lora is not None:
        return (
            f"In ComfyUI: `{lora}` belongs into `models/loras`; *LoraLoaderModelOnly*, strength 1, between the model "
            f"`{base}` and the sampler. {_guidance_words(config)}"
        )
    return _python(config, _loading(base, absent_parts(Path(config.model.id))), lora=folder.name)


def absent_parts(folder: Path) -> list[str]:
    """Parts that a pipeline's index names as absent and that diffusers wants all the same."""
    index = folder / _INDEX
    if not index.is_file():
        return []
    parts = json.loads(index.read_bytes())
    absent = [name for name, part in parts.items() if isinstance(part, list) and part[0] is None]
    return sorted(name for name in absent if name.startswith(("text_encoder", "tokenizer")))


def _loading(source: str, absent: Sequence[str]) -> str:
    return ", ".join([json.dumps(source), *(f"{part}=None" for part in absent)])


def _python(config: Config, arguments: str, lora: str | None) -> str:
    model, sampling = config.model, config.sampling
    call = f"num_inference_steps={sampling.steps}, height={model.height}, width={model.width}, "
    call += f"max_sequence_length={model.max_sequence_length}"
    lines = [
        "import torch",
        "from diffusers import DiffusionPipeline",
        "",
        f"pipe = DiffusionPipeline.from_pretrained({arguments}, dtype=torch.{model.dtype})",
        *([f"pipe.load_lora_weights({json.dumps(lora)})"] if lora else []),
        f'image = pipe("a prompt", {call}, guidance_scale={_guidance(config):g}).images[0]',
    ]
    words = [_guidance_words(config), *([_ABSENT] if "=None" in arguments else [])]
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{' '.join(words)}"


def _guidance(config: Config) -> float:
    """As the pipeline of diffusers takes it: FLUX has it as an input of the model, 3.5 unless set."""
    embedded = config.sampling.embedded_guidance
    if embedded is None and "flux" in config.model.id.lower():
        return 3.5
    return config.sampling.guidance_scale if embedded is None else embedded


def _guidance_words(config: Config) -> str:
    return f"It was trained with guidance {_guidance(config):g}: begin there."
