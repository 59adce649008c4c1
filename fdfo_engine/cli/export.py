"""`fdfo export`: trained weights in a form that diffusers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fdfo_engine.runtime.errors import UsageError


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "export",
        help="write a LoRA or a pipeline folder that diffusers loads",
        description="Writes a LoRA for diffusers' load_lora_weights, or after full training a pipeline folder, and "
        "loads it back to compare.",
    )
    parse.add_argument("run_dir", type=Path, help="a run folder")
    parse.add_argument("out", type=Path, help="the folder to write")
    parse.add_argument("--checkpoint", metavar="NAME", help="such as epoch_000010; default: the newest")
    add_weights(parse)
    kind = parse.add_mutually_exclusive_group()
    kind.add_argument(
        "--merge",
        dest="style",
        action="store_const",
        const="merged",
        help="a whole pipeline with the LoRA in its weights",
    )
    kind.add_argument(
        "--style",
        choices=("diffusers", "comfyui"),
        help="names of a LoRA's weights: diffusers' (default), or the original model's, for ComfyUI, Forge, sd-scripts",
    )
    parse.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parse.set_defaults(verb=run, style="diffusers")


def add_weights(parse: argparse.ArgumentParser) -> None:
    """`--ema` or `--raw`; without either the average is taken where the run keeps one."""
    group = parse.add_mutually_exclusive_group()
    group.add_argument("--ema", dest="weights", action="store_const", const="ema", help="the averaged weights")
    group.add_argument("--raw", dest="weights", action="store_const", const="raw", help="the last step's weights")
    parse.set_defaults(weights="auto")


def run(arguments: argparse.Namespace) -> int:
    """Exports."""
    from fdfo_engine.exporting import export_run
    from fdfo_engine.runtime.console import say

    epoch = export_run(
        arguments.run_dir, arguments.out, checkpoint=arguments.checkpoint, weights=arguments.weights,
        style=arguments.style, overwrite=arguments.overwrite,
    )  # fmt: skip
    say(f"epoch {epoch} written to {arguments.out}, loaded back and compared")
    return 0


def refuse_outside(arguments: argparse.Namespace, name: str, least: float, most: float) -> None:
    """An option that was given takes a number in a range."""
    value = getattr(arguments, name)
    if value is not None and not least <= value <= most:
        raise UsageError(f"--{name.replace('_', '-')} {value}: takes a number from {least} to {most}")
