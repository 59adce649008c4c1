"""`fdfo export`: trained weights in a form that diffusers loads."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fdfo_engine.cli.options import (
    add_base,
    add_overwrite,
    add_run_dir,
    add_weights,
    refuse_absent_average,
    refuse_filled_out,
)

_STYLE_OPTIONS = {"merged": "--merge", "comfyui": "--style comfyui"}


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "export",
        help="write a LoRA or a pipeline folder that diffusers loads",
        description="Writes a LoRA for diffusers' load_lora_weights, or after full training a pipeline folder, and "
        "loads it back to compare.",
    )
    add_run_dir(parse)
    parse.add_argument("out", type=Path, help="the folder to write")
    parse.add_argument("--checkpoint", metavar="NAME", help="such as epoch_000010; default: the newest")
    add_base(parse)
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
    add_overwrite(parse)
    parse.set_defaults(verb=run, style="diffusers")


def run(arguments: argparse.Namespace) -> int:
    """Exports; what can be refused is refused before anything is loaded."""
    refuse_filled_out(arguments.out, arguments)
    from fdfo_engine.models.export_styles import refuse_style
    from fdfo_engine.runtime.console import say
    from fdfo_engine.runtime.run_folder import run_config
    from fdfo_engine.runtime.terminal import shown

    config = run_config(arguments.run_dir)
    refuse_absent_average(arguments, config)
    refuse_style(arguments.style, config.model, _STYLE_OPTIONS.get(arguments.style))
    with shown() as terminal, terminal.working("export"):
        from fdfo_engine.exporting import export_run

        epoch = export_run(
            arguments.run_dir, arguments.out, checkpoint=arguments.checkpoint, weights=arguments.weights,
            style=arguments.style, overwrite=arguments.overwrite, base=arguments.base,
        )  # fmt: skip
    say(f"epoch {epoch} written to {arguments.out}, loaded back and compared")
    return 0
