"""The settings of a run. Every default, bound and meaning lives here and nowhere else.

Rules between two keys are in `cross_checks.py`; `batch.py` has the arithmetic with the number of ranks.
"""

import difflib
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema

from fdfo_engine.config.algorithm import AlgorithmConfig, FdfoAlgorithm
from fdfo_engine.config.churn import ChurnConfig, RawChurn
from fdfo_engine.config.cross_checks import broken_rules
from fdfo_engine.config.deepspeed_keys import deepspeed_problems
from fdfo_engine.config.labels import LabelsConfig
from fdfo_engine.config.model import KernelsConfig, LoraConfig, ModelConfig
from fdfo_engine.config.secret_keys import SECRET_ADVICE, is_secret_value, secret_keys
from fdfo_engine.config.section import Auto, Name, Section, frozen_list, no_number, refuse

AUTO_MICRO_BATCH = 24
"""Items that `update.micro_batch: auto` stands for on a CPU, and the most on a GPU."""

MAX_SEED = 2**64 - 1

HealthName = Literal["saturation", "clipped", "sharpness", "edge_density", "checkerboard", "grid_energy"]
HEALTH_MEASURES: tuple[HealthName, ...] = get_args(HealthName)
"""Names of the image-health measures; `fdfo_engine.metrics.health` says what each is."""


class RunConfig(Section):
    """The run as a whole."""

    dir: str = Field(min_length=1)
    """Folder of the run: checkpoints, logs, images, status. The same settings and folder resume the run."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Key of all noise, prompt order and initial adapter weights; 64 bits, unsigned."""

    epochs: int = Field(default=100, ge=1)
    """Rollouts, each followed by one update, until the run is finished; may be raised later to extend it."""

    deterministic: bool = False
    """Picks deterministic attention and reductions on a GPU, so that runs repeat bit for bit; slower."""


class PromptsConfig(Section):
    """The prompts the run samples from."""

    source: str = Field(min_length=1)
    """Text file (one prompt a line), .jsonl, .json, .csv, .tsv or .parquet file, the name of a prompt set (`starter`,
    which comes with the engine; `drawbench`, `parti`, `hpdv2`, `pickscore`), `hub:OWNER/NAME/FILE`, or `shapes`, which
    generates them."""

    column: str = Field(default="prompt", min_length=1)
    """Key or column of the prompt in a file that has several; the prompt sets know their own."""

    allow_download: bool = False
    """Lets a prompt set be fetched from the hub; otherwise only what is on this machine is taken."""

    comments: bool = False
    """Leaves out the lines of a text file that begin with #; otherwise they are prompts as others are."""

    dedup: bool = False
    """Drops repeated prompts; otherwise they count as weights."""

    count: int = Field(default=2048, ge=1)
    """Number of prompts, where the source generates them."""


class SamplingConfig(Section):
    """How pairs of images are sampled."""

    pairs_per_epoch: int = Field(default=432, ge=1)
    """Pairs of images an epoch, over all ranks."""

    pairs_per_prompt: int = Field(default=1, ge=1)
    """Neighbouring pairs that take the same prompt; other algorithms than fdfo reward their images as one group."""

    steps: int = Field(default=40, ge=1, le=10_000)
    """Solver steps from t = 1 (noise) to t = 0 (image)."""

    guidance_scale: float = Field(default=1.0, ge=0)
    """Classifier-free guidance by the pipeline's own rule; 1 runs the model once a step, anything else twice."""

    embedded_guidance: Annotated[float, Field(ge=0)] | None = None
    """Guidance as an input of the model, for FLUX.1-dev and its like: null takes the pipeline's 3.5; null elsewhere."""

    block_pairs: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Pairs that are sampled together; auto is the largest divisor of pairs_per_epoch up to 12."""

    overlap_scoring: bool = True
    """Scores a block of images in a thread while the next block is sampled; the scores are the same either way."""

    churn: ChurnConfig = RawChurn()
    """Fresh noise that makes the two images of a pair differ."""


def _is_slip(given: str, meant: str) -> bool:
    """One letter left out or too many, or two in the wrong order; `height` is none of `weight`."""
    return sorted(given) == sorted(meant) or bool(difflib.get_close_matches(given, [meant], cutoff=0.85))


class RewardConfig(Section):
    """One reward; the run's reward is the weighted sum. Further keys are the reward's own options (its docstring)."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1)
    """Registered name, `module:attribute` or `./file.py:attribute` of your own, or URL."""

    weight: float = 1.0
    """Factor in the sum; negative to push away from what the reward likes, never 0."""

    normalize: Literal["none", "std", "pair"] = "none"
    """Divides its scores, each epoch, by their standard deviation (std) or by the root mean square of the half
    differences within pairs (pair), so that rewards of different scales can be weighed against each other."""

    kill_after_s: Annotated[float, Field(gt=0)] | None = None
    """Runs the reward in a process of its own, which is killed when it takes longer than this for a batch, seconds; the
    batch is tried once more, then its pairs have no opinion. Null lets a reward take as long as it takes."""

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        refuse([("", "is 0: such a reward has no effect; remove it from the list")] if weight == 0 else [])
        return weight

    @model_validator(mode="before")
    @classmethod
    def _holds_no_secret(cls, value: Any) -> Any:
        options = {k: v for k, v in value.items() if k not in ("name", "weight")} if isinstance(value, dict) else {}
        refuse((key, SECRET_ADVICE) for key in secret_keys(options))
        return value

    @model_validator(mode="after")
    def _holds_no_slip(self) -> Self:
        """A key that is not ours is the reward's own option, but for one that is nearly ours."""
        absent = RewardConfig.model_fields.keys() - self.model_fields_set
        options = self.model_extra or {}
        refuse(
            (key, f"missing; is {option!r} a slip for it? if it is an option of the reward, give {key} too")
            for key in sorted(absent)
            for option in options
            if _is_slip(option, key)
        )
        return self


class MetricConfig(RewardConfig):
    """A reward that an evaluation scores besides the run's own; its name alone, or with its options."""

    weight: float = 1.0
    """Not used: a metric is no part of the run's reward."""

    @model_validator(mode="before")
    @classmethod
    def _is_a_name_at_least(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "minLength": 1}, handler(core)]}

    @model_serializer
    def _without_what_is_not_used(self) -> dict[str, Any]:
        limit = {} if self.kill_after_s is None else {"kill_after_s": self.kill_after_s}
        return {"name": self.name, **limit, **(self.model_extra or {})}


class UpdateConfig(Section):
    """How a rollout becomes optimizer steps."""

    optimizer_steps: int = Field(default=4, ge=1)
    """Optimizer steps an epoch; each sees every sample, at its share of the trained steps."""

    train_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Solver steps of each sample that are trained, drawn at random; null takes all of sampling.steps."""

    micro_batch: Auto | Annotated[int, Field(ge=1)] = "auto"
    """(sample, step) items in one forward and backward on a rank; auto takes what fits the GPU, up to 24."""

    clip_range: float = Field(default=0.03, gt=0)
    """How far a probability ratio may move from 1 before its gradient is held back."""

    kl_weight: float = Field(default=0.0, ge=0)
    """Weight of the squared distance to the velocity of the untrained model; 0 leaves it out."""

    velocity_hinge: float = Field(default=0.0, ge=0)
    """Weight of the squared growth of a velocity's root mean square over the untrained model's; a velocity that is not
    larger costs nothing. 0 leaves it out."""

    kl_reference: Literal["frozen_copy"] | None = None
    """Where the untrained model comes from: a frozen copy of the network with model.train = full, whole on every rank;
    null with a LoRA, which is switched off for it."""

    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay an epoch of an average of the trained weights, saved beside them; null keeps none."""

    subset: Literal["random", "stratified"] = "random"
    """How train_steps of sampling.steps are drawn: any of them, or one of each stretch of as many neighbours."""

    max_bad_pairs: float = Field(default=0.05, ge=0, le=1)
    """Share of an epoch's pairs that may lose their reward to failures before the run stops."""

    @property
    def needs_base(self) -> bool:
        """Whether a term of the loss looks at the untrained model's velocities."""
        return self.kl_weight > 0 or self.velocity_hinge > 0

    @property
    def micro_batch_items(self) -> int:
        """`micro_batch`, with auto at its most; the engine may lower that on a GPU."""
        return AUTO_MICRO_BATCH if self.micro_batch == "auto" else self.micro_batch


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    """AdamW."""

    lr: float = Field(default=3.0e-5, gt=0)
    """Learning rate, constant over the run."""

    betas: Annotated[tuple[Beta, Beta], BeforeValidator(frozen_list)] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""

    eps: float = Field(default=1.0e-8, gt=0)
    """Added to the root of the averaged square."""

    weight_decay: float = Field(default=1.0e-4, ge=0)
    """Decoupled weight decay, a step, in units of the learning rate."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Norm of the whole gradient above which it is scaled down."""


class ZeroConfig(Section):
    """How training state is split over ranks (DeepSpeed ZeRO)."""

    stage: int = Field(default=1, ge=0, le=3)
    """0 splits nothing, 1 the optimizer's state, 2 also gradients, 3 also weights."""

    gather_rollout: Annotated[Literal["auto", True, False], BeforeValidator(no_number)] = "auto"
    """At stage 3, keeps whole weights on every rank during a rollout instead of gathering them in each step; auto where
    the GPU has room for them, false never."""

    offload_optimizer: bool = False
    """Keeps the optimizer's state and float32 weights in host memory, where AdamW then runs; from stage 1 on."""

    offload_parameters: bool = False
    """Keeps the network's weights in host memory, from where stage 3 gathers them."""

    deepspeed: dict[str, Any] = Field(default={})
    """Further DeepSpeed keys on speed, memory and profiling; checked."""

    @field_validator("deepspeed")
    @classmethod
    def _known_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        refuse(deepspeed_problems(value))
        return value


class GuardConfig(Section):
    """What to do when the training reward climbs while the evaluation says that the images get worse."""

    action: Literal["off", "warn", "stop", "rollback"] = "off"
    """rollback stops too, with the checkpoint of the last evaluation that was in order as the newest."""

    max_drift: float = Field(default=1.0, gt=0)
    """How far a health measure may move from the first evaluation, in standard deviations over its images."""

    bands: dict[HealthName, Annotated[tuple[float, float], BeforeValidator(frozen_list)]] = Field(default={})
    """Least and largest mean of a health measure, by name, instead of `max_drift`."""

    reward_drop: float = Field(default=2.0, gt=0)
    """How far the held-out reward, or one of evaluation.metrics, may fall below its best, in standard errors."""

    patience: int = Field(default=2, ge=1)
    """Evaluations in a row that must be out of order before the run stops."""


class EvaluationConfig(Section):
    """Images of fixed prompts and noise, scored while training."""

    every: int = Field(default=10, ge=0)
    """Epochs between evaluations; 0 = never."""

    prompts: Name | None = None
    """Source of the prompts, as prompts.source; null takes that one (of `shapes` and `starter` the held-out part)."""

    count: int = Field(default=64, ge=1)
    """Images an evaluation, one a prompt."""

    batch: int = Field(default=32, ge=1)
    """Images generated together on a rank."""

    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    """Key of the evaluation's noise; 64 bits, unsigned."""

    metrics: Annotated[tuple[MetricConfig, ...], BeforeValidator(frozen_list)] = ()
    """Rewards to score besides the run's own: names, or {name, options}."""

    health: Annotated[tuple[HealthName, ...], BeforeValidator(frozen_list)] = HEALTH_MEASURES
    """Image-health measures to log: they move when a run pleases its reward by an artefact."""

    guard: GuardConfig = GuardConfig()
    """Stops a run that pleases its training reward at the expense of its images."""


class CheckpointConfig(Section):
    """What is kept to resume from."""

    every: int = Field(default=10, ge=1)
    """Epochs between checkpoints; the last epoch always makes one."""

    keep: int = Field(default=2, ge=2)
    """Newest checkpoints to keep, and beside them the best by held-out reward; two, so that a damaged one has a
    predecessor."""


class CommConfig(Section):
    """What the ranks of a run expect of each other."""

    timeout_s: float = Field(default=600.0, ge=5)
    """How long a rank may give no sign, or a part of its work may take, before it is named with its stacks and the run
    ends: a solver step, a micro-batch, a reward's scores of a batch. What has a limit of its own is held to that."""


class LogConfig(Section):
    """Where numbers and images go, besides the run folder's own files."""

    tensorboard: bool = True
    """Writes TensorBoard events under the run folder."""

    wandb: bool = False
    """Sends metrics to Weights & Biases, as its own environment variables configure it."""

    images_every: int = Field(default=10, ge=0)
    """Epochs between grids of sampled images; 0 = never."""

    webhook: Name | None = None
    """URL that events are posted to, each as its line of events.jsonl; a failure costs that event alone."""

    @field_validator("webhook", mode="before")
    @classmethod
    def _has_a_key_of_its_own(cls, value: object) -> object:
        advice = "would be copied into the run folder; put it in env FDFO_WEBHOOK_KEY, which is sent as a bearer token"
        refuse([("", advice)] if is_secret_value(value) else [])
        return value

    @field_validator("webhook")
    @classmethod
    def _is_an_address(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("http://", "https://")):
            refuse([("", f"{value}: takes an address that begins with http:// or https://")])
        return value


class Config(Section):
    """The resolved settings of a run."""

    run: RunConfig
    model: ModelConfig
    lora: LoraConfig = LoraConfig()
    prompts: PromptsConfig
    sampling: SamplingConfig = SamplingConfig()
    algorithm: AlgorithmConfig = FdfoAlgorithm()
    """The method of training: FDFO, or an earlier one on the same engine to compare with."""
    rewards: Annotated[tuple[RewardConfig, ...], Field(min_length=1), BeforeValidator(frozen_list)]
    """What is maximised: a list of {name, weight, options}, whose weighted scores are added."""
    update: UpdateConfig = UpdateConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    zero: ZeroConfig = ZeroConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    comm: CommConfig = CommConfig()
    log: LogConfig = LogConfig()
    kernels: KernelsConfig = KernelsConfig()
    labels: LabelsConfig = LabelsConfig()

    def with_base(self, place: object) -> "Config":
        """The same settings, with the base model at another place: a folder or a hub id."""
        return self.model_copy(update={"model": self.model.model_copy(update={"id": str(place), "revision": None})})

    @model_validator(mode="after")
    def _keys_agree(self) -> "Config":
        refuse(broken_rules(self))
        return self
