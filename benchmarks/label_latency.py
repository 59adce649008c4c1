"""How long a person waits for the next pair after a key press, in headless Chromium against a real engine.

    python -m benchmarks.label_latency

From the press of the arrow to the frame in which the next pair's image is painted: the answer is on disk by then. Needs
Playwright and a Chromium (`CHROMIUM`, or on PATH).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import RESULTS
from fdfo_engine.bench.record import header, write
from fdfo_engine.label.access import Passes, Session
from fdfo_engine.label.server import PAGE_NAME
from fdfo_engine.serve.access import token_of

SETTINGS = ("evaluation.every=0", "log.tensorboard=false", "log.images_every=0", "labels.keep.of=1")
PATIENCE_MS = 300_000
WATCH = """() => {
  window.waits = [];
  let pressed = null;
  let shown = null;
  const look = () => {
    const image = document.querySelector('.frame[data-side=left] img');
    if (image === null || image.src === shown) return;
    shown = image.src;
    if (pressed === null) return;
    const since = pressed;
    pressed = null;
    image.decode().then(() => requestAnimationFrame(() => window.waits.push(performance.now() - since)));
  };
  document.addEventListener('keydown', () => { pressed = performance.now(); }, true);
  new MutationObserver(look).observe(document.body, {subtree: true, childList: true, attributes: true});
  look();
}"""


def main() -> None:
    """Labels a round, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "reliability" / "label_latency.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="label-latency-") as name:
        folder = Path(name) / "run"
        words = [sys.executable, "-m", "fdfo_engine.cli.main", "label", "--config", "shapes", "--port", "0"]
        size = f"labels.round_size={arguments.answers + 1}"
        page = subprocess.Popen([*words, "--no-browser", f"run.dir={folder}", size, *SETTINGS])
        try:
            waits = labelled(link(folder), arguments.answers)
        finally:
            page.terminate()
            page.wait(120)
    measured = {
        "answers": len(waits),
        "median_ms": round(statistics.median(waits), 1),
        "p95_ms": round(statistics.quantiles(waits, n=20)[-1], 1),
        "max_ms": round(max(waits), 1),
    }
    print(json.dumps(measured, indent=1))
    write(arguments.out, header("python -m benchmarks.label_latency", sys.argv[1:]) | measured)


def link(folder: Path) -> str:
    """The owner's link to the page, once it listens."""
    while not (folder / PAGE_NAME).is_file():
        time.sleep(0.1)
    url = json.loads((folder / PAGE_NAME).read_text())["url"]
    return f"{url}/#{Passes(token_of(folder)).word(Session('owner', 'owner'))}"


def labelled(url: str, answers: int) -> list[float]:
    """Milliseconds from each press to the next pair."""
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--headless", "--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": 1400, "height": 900})
        tab.set_default_timeout(PATIENCE_MS)
        tab.goto(url)
        tab.wait_for_function("() => document.body.dataset.scene === 'labelling'")
        tab.wait_for_load_state("networkidle")
        tab.evaluate(WATCH)
        for number in range(answers):
            tab.keyboard.press(["ArrowLeft", "ArrowRight"][number % 2])
            tab.wait_for_function("count => window.waits.length > count", arg=number)
            tab.wait_for_timeout(200)  # nobody answers faster; the pair after the next is loaded meanwhile
        waits: list[Any] = tab.evaluate("() => window.waits")
        browser.close()
    return [float(wait) for wait in waits]


if __name__ == "__main__":
    main()
