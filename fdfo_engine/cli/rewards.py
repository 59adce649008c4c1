"""`fdfo rewards`: which there are, what one takes, whether one works here, what one says of a picture."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fdfo_engine.runtime.console import say, visible
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from fdfo_engine.config import MetricConfig

_FORMS = """\
  fdfo rewards [list]               every registered reward, a line each
  fdfo rewards [show] NAME          what it scores, its options and defaults, its weights
  fdfo rewards verify [NAME ...]    scores drawn pictures, compares with recorded scores; all rewards without a NAME
  fdfo rewards try NAME --image FILE [--prompt TEXT] [option=value ...]
                                    scores pictures with one reward, without a model; NAME as in a config

Nothing is fetched without --allow-download. Exit codes: 3 where a reward that was named has no weights, package or
server here, 5 where one scores wrongly or not at all."""


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "rewards",
        help="list rewards, show one's options, verify it here, try it on a picture",
        description=_FORMS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="fdfo rewards [list | [show] NAME | verify [NAME ...] | try NAME --image FILE ...]",
    )
    parse.add_argument("overrides", nargs="*", metavar="WORD", help="as above")
    parse.add_argument(
        "--image", action="append", type=Path, default=[], metavar="FILE", help="of try; may be repeated"
    )
    parse.add_argument("--prompt", help="of try: what the pictures should show; default: empty")
    parse.add_argument("--allow-download", action="store_true", help="of verify and try: let weights be fetched")
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Does what the first word says; a name alone is shown."""
    first, *rest = arguments.overrides or ["list"]
    if first != "try" and (arguments.image or arguments.prompt is not None):
        raise UsageError("--image and --prompt belong to `fdfo rewards try NAME`")
    from fdfo_engine.runtime.terminal import importing

    with importing():
        import fdfo_engine.rewards  # noqa: F401 - torch with it, which takes seconds
    if first == "try":
        return _try(rest, arguments)
    if first == "verify":
        return _verify(rest, allow_download=arguments.allow_download)
    if first == "list" and not rest:
        return _list()
    shown = rest if first == "show" else [first, *rest]
    if len(shown) != 1:
        raise UsageError(f"{' '.join(arguments.overrides)}: takes list, show NAME, verify [NAME ...] or try NAME")
    return _show(shown[0])


def _list() -> int:
    from fdfo_engine.rewards import names
    from fdfo_engine.rewards.describe import summary

    for name in names():
        say(f"{name:17} {summary(name)}")
    say("\nyour own: module:attribute, ./file.py:attribute, http(s)://server; `fdfo rewards NAME` shows one's options")
    return 0


def _show(name: str) -> int:
    from fdfo_engine.rewards.describe import description

    say("\n\n".join(description(name)))
    return 0


def _verify(given: list[str], *, allow_download: bool) -> int:
    from fdfo_engine.rewards import names
    from fdfo_engine.rewards.drawings import pictures
    from fdfo_engine.rewards.registry import find
    from fdfo_engine.rewards.verification import shown, verify

    for name in given:
        find(name, "reward")  # a misspelt name is told before anything is scored
    say("pictures, drawn by formula:")
    for number, picture in enumerate(pictures(), 1):
        say(f"  {number} {picture.prompt}, {picture.image.shape[1]} x {picture.image.shape[2]}")
    states = {}
    for name in given or names():
        verdict = verify(name, allow_download=allow_download)
        states[name] = verdict.state
        scores = f"{shown(verdict.scores)}\n{'':26}" if verdict.scores else ""
        say(f"{verdict.state:8}{name:17} {scores}" + verdict.detail.replace("\n", f"\n{'':26}"))
    wrong, absent = (_in_state(states, state) for state in ("WRONG", "absent"))
    if wrong:
        raise RewardError(f"{wrong}: see above")
    if given and absent:
        raise EnvironmentProblem(f"{absent}: not here, see above")
    return 0


def _in_state(states: Mapping[str, str], wanted: str) -> str:
    return ", ".join(name for name, state in states.items() if state == wanted)


def _try(words: list[str], arguments: argparse.Namespace) -> int:
    import math

    from fdfo_engine.rewards import WeightedRewards

    if not words or "=" in words[0] or not arguments.image:
        raise UsageError("takes `fdfo rewards try NAME --image FILE`")
    name, *settings = words
    prompt = arguments.prompt or ""
    rewards = WeightedRewards.from_labelled({name: _settings(name, settings)}, keys=["reward"])
    if not arguments.allow_download:
        rewards.forbid_downloads()
    images = [_read(file) for file in arguments.image]
    rewards.require_ready()
    rewards.require_prompts([prompt])
    lost = []
    for file, image in zip(arguments.image, images, strict=True):
        (scores,) = rewards([prompt], image).values()
        say(f"{float(scores[0]):.6g}  {visible(str(file))}")
        lost += [str(file)] if math.isnan(scores[0]) else []
    rewards.cancel()
    if lost:
        raise RewardError(f"{name}: no opinion on {', '.join(lost)}")
    return 0


def _settings(name: str, settings: list[str]) -> MetricConfig:
    """The reward as an entry of a config."""
    from pydantic import ValidationError

    from fdfo_engine.config import MetricConfig
    from fdfo_engine.config.overrides import apply_overrides

    overridden = apply_overrides({"rewards": [{"name": name}]}, [f"rewards.0.{setting}" for setting in settings])
    problems = [problem.replace("override rewards.0.", "") for problem in overridden.problems]
    try:
        if not problems:
            return MetricConfig.model_validate(overridden.tree["rewards"][0])
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors(include_input=False)
        ]
    raise UsageError("\n".join(problems))


def _read(file: Path) -> Tensor:
    """A picture as `[1, 3, H, W]` in 0..1, without its transparency."""
    import numpy as np
    import torch
    from PIL import Image

    try:
        with Image.open(file) as picture:
            pixels = np.array(picture.convert("RGB"))
    except OSError as error:
        raise UsageError(f"--image {file}: {error.strerror or 'no picture that Pillow can read'}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
