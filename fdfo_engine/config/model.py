"""The settings of the model, of its adapters, and of the code that computes."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from fdfo_engine.config.section import Auto, Name, NameList, Section, no_number


def _number_or_false(value: object) -> object:
    """True would pass as the number 1, and 0 as false."""
    passes_for_another = value is True or (type(value) is int and value == 0)
    return str(value) if passes_for_another else value


class ModelConfig(Section):
    """The model that is trained."""

    id: str = Field(min_length=1)
    """Hub id, folder of a diffusers pipeline, or `shapes`, the bundled miniature."""

    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the newest."""

    variant: Name | None = None
    """Variant of the weight files, such as `fp16` for *.fp16.safetensors; null takes those without one."""

    family: str = Field(default="auto", min_length=1)
    """Which code runs the model: `sd3`, `flux`, `qwen_image` or `module:attribute`; auto reads it from the pipeline."""

    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    """Type the model computes in, and of its frozen weights."""

    height: int = Field(default=512, ge=8, multiple_of=8)
    """Image height, pixels."""

    width: int = Field(default=512, ge=8, multiple_of=8)
    """Image width, pixels."""

    train: Literal["lora", "full"] = "lora"
    """What is trained: low-rank adapters, or every weight of the transformer."""

    quantize: Literal["nf4"] | None = None
    """Keeps the frozen weights of the blocks in four bits (bitsandbytes): a quarter of the memory, slower, and the LoRA
    is then trained on the quantised model; null keeps them in `dtype`."""

    few_steps: Annotated[Auto | Literal[False] | Annotated[int, Field(ge=1)], BeforeValidator(_number_or_false)] = (
        "auto"
    )
    """The most solver steps that the model was distilled to, beyond which sampling.steps is refused; auto reads it from
    the pipeline's configs and names, false says that it follows a flow along any number."""

    fused: Annotated[Literal["auto", True, False], BeforeValidator(no_number)] = "auto"
    """Fused transformer blocks: auto where the model fits them, true always or an error, false never."""

    attention: Literal["auto", "sdpa", "cudnn", "flash", "flash3", "xformers"] = "auto"
    """Attention kernel; sdpa is PyTorch's own choice, auto that choice without kernels known to be wrong."""

    gradient_checkpointing: Annotated[Literal[False, True, "fc1"], BeforeValidator(no_number)] = False
    """Recomputes activations in the backward pass: less memory, more time in the update. fc1: the widest ones only."""

    compile: bool = False
    """Runs diffusers' own blocks through torch.compile instead of the fused ones; compiles for minutes first."""

    cuda_graphs: bool = False
    """Replays the network, in a rollout and in whole micro-batches, as CUDA graphs; on a GPU, below zero.stage 3. Not
    measured yet."""

    max_sequence_length: int = Field(default=256, ge=0, le=512)
    """Tokens of the T5 encoder, or of Qwen-Image's prompt; 0 leaves T5 out of SD3, as `shapes` needs it."""

    negative_prompt: str = ""
    """Prompt of the negative branch, used where sampling.guidance_scale is not 1."""

    prompt_cache: Annotated[Auto | Literal[False] | Name, BeforeValidator(no_number)] = "auto"
    """Folder of encoded prompts on disk, which runs may share; auto is one in the user's cache, false keeps none."""

    prompt_cache_gib: float = Field(default=20.0, gt=0)
    """Size of that folder, GiB; the least recently used are dropped first."""


class LoraConfig(Section):
    """The adapters, with `model.train: lora`."""

    rank: int = Field(default=32, ge=1)
    """Inner width of an adapter."""

    alpha: float = Field(default=64.0, gt=0)
    """Scale of an adapter: its product is multiplied by alpha / rank."""

    targets: Literal["family"] | NameList = "family"
    """Names of the layers to adapt, or their ends after a dot, with `*` for any characters but a dot; each must name a
    linear layer. family takes all attention projections."""


class KernelsConfig(Section):
    """Which code runs the engine's own operations."""

    backend: Literal["auto", "torch", "cpp", "triton", "cuda"] = "auto"
    """What runs the paired sampling and the loss; auto takes the fastest that can run on the model's device."""

    tune: bool = True
    """Times the backends of each op at the run's shapes and takes the fastest; false goes by a fixed order."""

    require: bool = False
    """Stops where only plain torch could run them, instead of warning and going on."""
