"""`fdfo new`: a folder with a config, prompts and a reward, to edit."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

from fdfo_engine.cli.options import add_overwrite, refuse_filled_out
from fdfo_engine.runtime.console import say

REWARD = '''"""A reward of your own. `fdfo rewards try {folder}/my_reward.py:redness --image A.png` scores a picture."""


def redness(prompts, images):
    """Scores images [N, 3, H, W] of values 0 to 1, N numbers; more is better, NaN is no opinion."""
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    return (red - 0.5 * green - 0.5 * blue).mean((1, 2))
'''
_OWN_REWARD = "  # - {name: ./my_reward.py:redness}    # your own, beside this file"


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "new",
        help="make a folder with a config, prompts and a reward to edit",
        description="Makes FOLDER with config.yaml, a copy of a config that comes with the package; prompts.txt and "
        "heldout.txt, if that config takes the prompts that come with the package; and my_reward.py.",
    )
    parse.add_argument("folder", type=Path, metavar="FOLDER", help="to make; also the name of the run: runs/FOLDER")
    parse.add_argument("--from", dest="source", default="shapes", metavar="NAME", help="config; default: shapes")
    add_overwrite(parse)
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Writes the folder and says what to do with it."""
    from fdfo_engine.config.load import load_config
    from fdfo_engine.config.shipped import shipped_file
    from fdfo_engine.rollout.prompt_sets import STARTER, starter_file

    folder: Path = arguments.folder
    text = shipped_file(arguments.source).read_text(encoding="utf-8")
    refuse_filled_out(folder, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    text = _line(text, "  dir: .*", f"  dir: {_quoted(f'runs/{folder.resolve().name}')}")
    text = _line(text, "rewards:", f"rewards:\n{_OWN_REWARD}")
    if f"source: {STARTER}" in text:
        text = _with_own_prompts(text, folder)
        (folder / "prompts.txt").write_bytes(starter_file("train").read_bytes())
        (folder / "heldout.txt").write_bytes(starter_file("heldout").read_bytes())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    (folder / "my_reward.py").write_text(REWARD.format(folder=folder), encoding="utf-8")
    load_config(folder / "config.yaml")
    say(f"made {folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    say(f"edit them, then: fdfo train {shlex.quote(f'{folder}/config.yaml')} --dry-run")
    return 0


def _with_own_prompts(text: str, folder: Path) -> str:
    """The config with the prompts of `folder`: to train on, and to evaluate with."""
    trained, held_out = _quoted(f"{folder}/prompts.txt"), _quoted(f"{folder}/heldout.txt")
    text = _line(text, "  source: .*", f"  source: {trained}   # one prompt a line")
    held_out_line = f"evaluation:\n  prompts: {held_out}"
    if re.search("(?m)^evaluation:$", text):
        return _line(text, "evaluation:", held_out_line)
    return f"{text}\n{held_out_line}\n"


def _line(text: str, pattern: str, replacement: str) -> str:
    """`text` with `replacement` for the one line that `pattern` matches."""
    changed, count = re.subn(f"(?m)^{pattern}$", lambda _: replacement, text)
    assert count == 1, f"{count} lines match {pattern}"
    return changed


def _quoted(value: str) -> str:
    """As a YAML value: in quotes where it has more than letters, digits and the marks of a path."""
    return value if re.fullmatch(r"[A-Za-z_./][\w./-]*", value) else json.dumps(value, ensure_ascii=False)
