"""Records what a terminal shows in a person's first hour: the commands are run, and what they print is written down.

    PYTHONPATH=tests python -m benchmarks.terminals [demo own_reward gated_model]

Each session begins in an empty folder and becomes `docs/terminals/NAME.txt`. Two things are not as they were: the names
of folders and ports of this machine, and the pauses. `gated_model` asks a small stand-in for the hub, of the tests.
`own_reward` builds the wheel and runs what it installs, so that nothing of the checkout is found.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import ROOT

SHORT = (
    "run.epochs=4 sampling.pairs_per_epoch=12 sampling.block_pairs=6 evaluation.every=4 evaluation.count=32 "
    "checkpoint.every=2 log.tensorboard=false"
)
FEW = "run.epochs=2 sampling.pairs_per_epoch=12 sampling.block_pairs=6 evaluation.every=0 log.tensorboard=false"
GATED = "stand-in/gated-model"
HUB_SHOWN = "https://hub.example"


def main() -> None:
    """Runs the sessions that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sessions", nargs="*", choices=[*SESSIONS, []], help="default: all")
    for name in parser.parse_args().sessions or SESSIONS:
        with tempfile.TemporaryDirectory(prefix="terminal-") as folder:
            home = Path(folder) / "home"
            home.mkdir()
            text = SESSIONS[name](Path(folder), home)
        out = ROOT / "docs" / "terminals" / f"{name}.txt"
        out.parent.mkdir(exist_ok=True)
        out.write_text(text, encoding="utf-8")
        print(f"{out}: {len(text.splitlines())} lines")


def demo(folder: Path, home: Path) -> str:
    """What `make demo-short` runs once the installation is there."""
    commands = [f"fdfo train shapes --ranks 2 {SHORT}", "fdfo status runs/shapes", "fdfo report runs/shapes"]
    return recorded(commands, home, path=[ROOT], hidden={folder: ""})


def own_reward(folder: Path, home: Path) -> str:
    """From an empty folder, with the installed wheel."""
    wheels, site = folder / "wheels", folder / "site"
    for words in (
        ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(wheels), str(ROOT)],
        ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheels)],
    ):
        found = [str(next(wheels.glob("*.whl")))] if words[1] == "pip" else words[-1:]
        subprocess.run([sys.executable, *words[:-1], *found], check=True, stdout=subprocess.DEVNULL)
    commands = [
        "ls",
        "fdfo new mine",
        "cat mine/my_reward.py",
        "fdfo generate shapes --untrained --prompt 'a red circle' --out pictures",
        "fdfo rewards try mine/my_reward.py:redness --image pictures/0000_a_red_circle.png",
        f"fdfo train mine/config.yaml 'rewards=[{{name: ./my_reward.py:redness}}]' {FEW}",
        "fdfo status runs/mine",
    ]
    return recorded(commands, home, path=[site], hidden={folder: ""})


def gated_model(folder: Path, home: Path) -> str:
    """Refused, refused again by a token that is not known, then found."""
    with hub(folder) as server:
        variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(folder / "hf"), "NO_PROXY": "127.0.0.1"}
        settings = f"model.id={GATED} model.height=16 model.width=16 model.max_sequence_length=16"
        dry = f"fdfo train shapes --ranks 1 --dry-run {settings} | tail -6"
        commands = [dry, f"HF_TOKEN=hf_old {dry}", f"HF_TOKEN=hf_mine {dry}"]
        return recorded(commands, home, path=[ROOT], hidden={server.url: HUB_SHOWN, folder: ""}, **variables)


@contextmanager
def hub(folder: Path) -> Iterator:
    """A hub on this machine that gives a tiny pipeline to one token."""
    from fake_hub import HubServer
    from tiny_sd3 import build_tiny_sd3

    server = HubServer()
    server.folders[GATED] = build_tiny_sd3(folder / "pipeline")
    server.gated, server.tokens, server.members = {GATED}, {"hf_mine"}, {"hf_mine"}
    yield server
    server.close()


def recorded(
    commands: Sequence[str], home: Path, *, path: Sequence[Path], hidden: dict, **variables: str
) -> str:  # fmt: skip
    """The commands with what each printed and, where it was not 0, its exit status."""
    binaries = home.parent / "bin"
    binaries.mkdir()
    script = binaries / "fdfo"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fdfo_engine.cli.main "$@"\n')
    script.chmod(0o755)
    environment = os.environ | variables | {
        "PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": ":".join(map(str, path)), "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(home.parent / "cache"), "COLUMNS": "110",
    }  # fmt: skip
    lines = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail; {command}"], cwd=home, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        lines += [f"$ {command}", done.stdout.rstrip()]
        lines += [f"(exit status {done.returncode})"] if done.returncode else []
    text = "\n".join(line for line in lines if line) + "\n"
    for where, shown in {home: "~", **hidden}.items():
        text = text.replace(str(where), shown)
    return re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)


SESSIONS = {"demo": demo, "own_reward": own_reward, "gated_model": gated_model}


if __name__ == "__main__":
    main()
