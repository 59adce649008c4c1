"""Settings that are legal alone and impossible together, each with the keys and the one to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fdfo_engine.config.churn import RawChurn

if TYPE_CHECKING:
    from fdfo_engine.config.schema import Config


@dataclass(frozen=True)
class Rule:
    """A condition between keys. `keys[0]` is the one a message points at."""

    keys: tuple[str, ...]
    is_broken: Callable[[Config], bool]
    explain: Callable[[Config], str]

    @property
    def sections(self) -> set[str]:
        """Sections that must be valid before the rule can be asked."""
        return {key.split(".")[0] for key in self.keys}


def trained_steps(config: Config) -> int:
    """Solver steps of each sample that are trained."""
    return config.update.train_steps or config.sampling.steps


def _explain_shares(config: Config) -> str:
    trained, shares = trained_steps(config), config.update.optimizer_steps
    divisors = [d for d in range(1, trained + 1) if trained % d == 0]
    source = "update.train_steps" if config.update.train_steps else "sampling.steps"
    below, above = [d for d in divisors if d < shares][-1:], [d for d in divisors if d > shares][:1]
    nearest = ", ".join(map(str, below + above))
    rule = f"{trained} trained steps ({source}) must be a multiple of update.optimizer_steps = {shares}"
    return f"{rule}; nearest: {nearest}"


def _needs_copy(weight: str) -> str:
    return (
        "needs a frozen copy of the model with model.train = full; set update.kl_reference: frozen_copy "
        f"(fdfo plan shows its memory), or {weight} to 0"
    )


RULES: tuple[Rule, ...] = (
    Rule(
        ("update.optimizer_steps", "update.train_steps", "sampling.steps"),
        lambda c: trained_steps(c) % c.update.optimizer_steps != 0,
        _explain_shares,
    ),
    Rule(
        ("update.train_steps", "sampling.steps"),
        lambda c: trained_steps(c) > c.sampling.steps,
        lambda c: (
            f"{c.update.train_steps} trained steps are more than sampling.steps = {c.sampling.steps}; "
            "lower update.train_steps, or set it to null to train all"
        ),
    ),
    Rule(
        ("update.subset", "update.train_steps", "sampling.steps"),
        lambda c: c.update.subset == "stratified" and c.sampling.steps % trained_steps(c) != 0,
        lambda c: (
            f"is stratified, and {c.sampling.steps} steps don't fall into {trained_steps(c)} equal stretches; "
            "set update.train_steps to a divisor of sampling.steps"
        ),
    ),
    Rule(
        ("sampling.pairs_per_prompt", "sampling.pairs_per_epoch"),
        lambda c: c.sampling.pairs_per_epoch % c.sampling.pairs_per_prompt != 0,
        lambda c: (
            f"is {c.sampling.pairs_per_prompt}, and must divide sampling.pairs_per_epoch = {c.sampling.pairs_per_epoch}"
        ),
    ),
    Rule(
        ("sampling.churn", "algorithm.name"),
        lambda c: not c.algorithm.takes_churn and c.sampling.churn != RawChurn(),
        lambda c: f"is FDFO's, and algorithm.name = {c.algorithm.name} has noise of its own; remove it",
    ),
    Rule(
        ("model.fused", "model.compile"),
        lambda c: c.model.compile and c.model.fused is True,
        lambda c: "true asks for fused blocks, model.compile compiles diffusers' own; set one of them to false",
    ),
    Rule(
        ("model.compile", "zero.stage"),
        lambda c: c.model.compile and c.zero.stage == 3,
        lambda c: "does not work with zero.stage = 3, which gathers weights inside the call; lower zero.stage",
    ),
    Rule(
        ("lora", "model.train"),
        lambda c: c.model.train == "full" and bool(c.lora.model_fields_set),
        lambda c: "has no effect with model.train = full; remove the lora section, or set model.train: lora",
    ),
    Rule(
        ("zero.stage", "model.train", "model.dtype"),
        lambda c: c.model.train == "full" and c.zero.stage == 0 and c.model.dtype != "float32",
        lambda c: (
            f"0 keeps no float32 master of weights, and model.train = full with model.dtype = {c.model.dtype} "
            "needs one; set zero.stage to 1, 2 or 3"
        ),
    ),
    Rule(
        ("model.quantize", "model.train", "zero.stage"),
        lambda c: c.model.quantize is not None and (c.model.train == "full" or c.zero.stage == 3),
        lambda c: (
            f"is {c.model.quantize}, and four-bit weights can be neither trained (model.train = {c.model.train}) nor "
            f"split over ranks (zero.stage = {c.zero.stage}); take model.train: lora with a stage below 3, or null"
        ),
    ),
    Rule(
        ("zero.offload_optimizer", "zero.stage"),
        lambda c: c.zero.offload_optimizer and c.zero.stage == 0,
        lambda c: "needs zero.stage 1, 2 or 3: stage 0 leaves the optimizer's state where the weights are",
    ),
    Rule(
        ("zero.offload_parameters", "zero.stage"),
        lambda c: c.zero.offload_parameters and c.zero.stage != 3,
        lambda c: f"needs zero.stage = 3, which gathers weights as they are used; it is {c.zero.stage}",
    ),
    Rule(
        ("model.train", "zero.offload_optimizer", "zero.stage", "model.dtype"),
        lambda c: (
            c.zero.offload_optimizer
            and c.zero.stage in (1, 2)
            and c.model.train == "full"
            and c.model.dtype != "float32"
        ),
        lambda c: (
            f"is full, and with zero.offload_optimizer at zero.stage = {c.zero.stage} its gradients would be summed in "
            f"{c.model.dtype}; set zero.stage to 3, which sums them in float32"
        ),
    ),
    Rule(
        ("update.kl_weight", "update.kl_reference", "model.train"),
        lambda c: c.model.train == "full" and c.update.kl_weight > 0 and c.update.kl_reference is None,
        lambda c: _needs_copy("update.kl_weight"),
    ),
    Rule(
        ("update.velocity_hinge", "update.kl_reference", "model.train"),
        lambda c: c.model.train == "full" and c.update.velocity_hinge > 0 and c.update.kl_reference is None,
        lambda c: _needs_copy("update.velocity_hinge"),
    ),
    Rule(
        ("update.kl_reference", "update.kl_weight", "update.velocity_hinge", "model.train"),
        lambda c: c.update.kl_reference is not None and (c.model.train == "lora" or not c.update.needs_base),
        lambda c: (
            "is frozen_copy, which only update.kl_weight or update.velocity_hinge above 0 with model.train = full "
            "uses; set it to null"
        ),
    ),
    Rule(
        ("model.max_sequence_length", "model.id"),
        lambda c: c.model.id == "shapes" and c.model.max_sequence_length != 0,
        lambda c: (
            f"is {c.model.max_sequence_length}, and model.id = shapes was trained without T5 tokens; "
            "set model.max_sequence_length to 0"
        ),
    ),
    Rule(
        ("evaluation.guard.action", "evaluation.every"),
        lambda c: c.evaluation.guard.action != "off" and c.evaluation.every == 0,
        lambda c: (
            f"is {c.evaluation.guard.action}, and with evaluation.every = 0 there is nothing it could look at; "
            "set evaluation.every, or evaluation.guard.action: off"
        ),
    ),
    Rule(
        ("evaluation.guard.bands", "evaluation.health"),
        lambda c: bool(set(c.evaluation.guard.bands) - set(c.evaluation.health)),
        lambda c: (
            f"{', '.join(sorted(set(c.evaluation.guard.bands) - set(c.evaluation.health)))} is not among the measures "
            "of evaluation.health; add it there"
        ),
    ),
)


def broken_rules(config: Config, valid_sections: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """First key and explanation of every broken rule; only rules whose sections are all valid, if those are given."""
    for rule in RULES:
        if (valid_sections is None or rule.sections <= valid_sections) and rule.is_broken(config):
            yield rule.keys[0], rule.explain(config)
