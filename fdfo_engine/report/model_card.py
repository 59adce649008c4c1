"""The model card of an export: what was trained on what, towards what, how it went, and under which licence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from fdfo_engine import __version__
from fdfo_engine.config import Config, dump_config
from fdfo_engine.report.usage import usage
from fdfo_engine.runtime.base_record import BASE_NAME, BaseRecord
from fdfo_engine.runtime.run_folder import EVALUATIONS_NAME, METRICS_NAME, PROMPTS_NAME, read_log

CARD_NAME = "README.md"
MAX_ROWS = 16

LICENCES = {
    "stabilityai/stable-diffusion-3.5-medium": "stabilityai-ai-community",
    "stabilityai/stable-diffusion-3.5-large": "stabilityai-ai-community",
    "black-forest-labs/FLUX.1-dev": "flux-1-dev-non-commercial-license",
    "black-forest-labs/FLUX.1-schnell": "apache-2.0",
    "Qwen/Qwen-Image": "apache-2.0",
    "shapes": "apache-2.0",
}
"""What the models' own cards say."""

UNKNOWN = "not known on the machine that exported this; see the base model's own page"

_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
_OPEN = ("apache-2.0", "mit")


def model_card(
    config: Config, epoch: int, *, whole: bool, base: BaseRecord | None = None, folder: Path | None = None
) -> str:
    """Markdown with the front matter of the Hugging Face hub.

    Args:
        config: settings of the run; its folder's logs are the curve.
        epoch: of the exported weights.
        whole: the export holds all weights, although a LoRA was trained.
        base: what the base model is by content, if that is known.
        folder: the export, to say how it is used.
    """
    run, name = Path(config.run.dir), _base_name(config, base)
    is_lora = config.model.train == "lora" and not whole
    what = f"A LoRA of rank {config.lora.rank}, alpha folded in, for" if is_lora else "All weights of"
    sections = [
        f"# {run.name}, epoch {epoch}\n\n{what} `{name}`{_trained_how(config)}, trained for {epoch} epochs with "
        f"Finite Difference Flow Optimization (arXiv 2603.12893) by fdfo-engine {__version__}.",
        *([] if folder is None else [f"## Use\n\n{usage(config, name, folder)}"]),
        f"## Base model\n\n{_base_by_content(name, base)}",
        "## Rewards\n\n" + "\n".join(_rewards(config)),
        f"## Curve\n\n{_curve(run, epoch)}",
        f"## Prompts\n\n`{config.prompts.source}`; SHA-256 of the list: {_prompts_hash(run)}",
        f"## Licence\n\nThe base model's: {_licence(config, name)}. What was trained from it is bound by it.",
        f"## Settings\n\n```yaml\n{dump_config(config).strip()}\n```",
    ]
    front = yaml.safe_dump(_front_matter(config, name, is_lora), sort_keys=False).strip()
    return f"---\n{front}\n---\n\n" + "\n\n".join(sections) + "\n"


def _base_name(config: Config, base: BaseRecord | None) -> str:
    """The hub's id where it came from there, although a folder may be all that `model.id` says."""
    return config.model.id if base is None or base.commit is None else base.name


def _base_by_content(name: str, base: BaseRecord | None) -> str:
    if base is None:
        return f"`{name}`; what it is made of was not recorded."
    at = "" if base.commit is None else f" at commit `{base.commit}`"
    return (
        f"`{name}`{at}. SHA-256 of what it is made of: `{base.sha256}`; `{BASE_NAME}` lists the files. "
        "On any other base these weights are another model."
    )


def _licence(config: Config, name: str) -> str:
    """By the card in the base's folder, or by the name that it has on the hub."""
    of_folder = base_licence(config.model.id)
    return base_licence(name) if of_folder == UNKNOWN else of_folder


def base_licence(model_id: str) -> str:
    """The licence that the base model's own card names, in its folder or in the hub's cache, or that is known here."""
    local = Path(model_id) / CARD_NAME
    cached = None if Path(model_id).is_dir() or model_id.count("/") != 1 else _cached(model_id)
    for card in (local, cached):
        if card is not None and card.is_file() and (found := _licence_in(card.read_text(errors="replace"))):
            return found
    return LICENCES.get(model_id, UNKNOWN)


def _cached(model_id: str) -> Path | None:
    found = try_to_load_from_cache(model_id, CARD_NAME)
    return Path(found) if isinstance(found, str) else None


def _licence_in(card: str) -> str | None:
    found = _FRONT_MATTER.match(card)
    try:
        fields = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # somebody else's card: not ours to complain of
        return None
    if not isinstance(fields, dict):
        return None
    name = fields.get("license_name") or fields.get("license")
    return name if isinstance(name, str) else None


def _front_matter(config: Config, name: str, is_lora: bool) -> dict[str, Any]:
    licence = _licence(config, name)
    named = {"license": licence} if licence in _OPEN else {"license": "other", "license_name": licence}
    tags = ["text-to-image", "fdfo", *(["lora"] if is_lora else [])]
    return {"base_model": name, "library_name": "diffusers", "tags": tags, **named}


def _trained_how(config: Config) -> str:
    return f", whose blocks were in {config.model.quantize} as it was trained" if config.model.quantize else ""


def _rewards(config: Config) -> Iterator[str]:
    yield "| reward | weight | options |"
    yield "|---|---|---|"
    for reward in config.rewards:
        options = {**(reward.model_extra or {})}
        if reward.normalize != "none":
            options["normalize"] = reward.normalize
        shown = ", ".join(f"{key}: {value}" for key, value in options.items())
        yield f"| {reward.name} | {reward.weight:g} | {shown} |"


def _curve(run: Path, epoch: int) -> str:
    """Held-out rewards where the run evaluated, else the training rewards."""
    held_out = [r for r in read_log(run / EVALUATIONS_NAME) if r.get("epoch", epoch + 1) <= epoch and "reward" in r]
    if held_out:
        rows = [f"| {r['epoch']} | {_number(r['reward'])} | {_number(r.get('reward_stderr'))} |" for r in held_out]
        return "\n".join(["| epoch | held-out reward | standard error |", "|---|---|---|", *_thinned(rows)])
    trained = [r for r in read_log(run / METRICS_NAME) if r.get("epoch", epoch + 1) <= epoch]
    if not trained:
        return "Not recorded: the weights were trained through the Python interface."
    rows = [f"| {r['epoch']} | {_number(r.get('reward_mean'))} |" for r in trained]
    return "\n".join(["| epoch | training reward |", "|---|---|", *_thinned(rows)])


def _number(value: float | None) -> str:
    return "no opinion" if value is None else f"{value:.4g}"


def _thinned(rows: Sequence[str]) -> list[str]:
    """At most `MAX_ROWS`, evenly spread, with the first and the last."""
    if len(rows) <= MAX_ROWS:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (MAX_ROWS - 1))] for i in range(MAX_ROWS)]


def _prompts_hash(run: Path) -> str:
    file = run / PROMPTS_NAME
    return f"`{file.read_text().strip()}`" if file.is_file() else "not recorded"
