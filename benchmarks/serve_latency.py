"""How long a served run takes to acknowledge feedback and to give pairs, while it trains.

    python -m benchmarks.serve_latency

A rater and a page ask every 20 ms over real HTTP; the engine trains the shapes run all the while. Acknowledged means on
disk: each answer waited for SQLite's sync.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import RESULTS
from fdfo_engine.bench.record import header, write
from fdfo_engine.client import Client

SETTINGS = ("evaluation.every=0", "log.tensorboard=false", "log.images_every=0", "run.epochs=100000")


def main() -> None:
    """Serves, asks, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--pairs", type=int, default=48, help="of the round that is judged")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-latency-") as folder:
        words = [sys.executable, "-m", "fdfo_engine.cli.main", "serve", "shapes", "--port", "0", f"run.dir={folder}"]
        server = subprocess.Popen([*words, *SETTINGS])
        try:
            measured = measure(Path(folder), arguments.requests, arguments.pairs)
        finally:
            server.terminate()
            server.wait(120)
    result = header("python -m benchmarks.serve_latency", sys.argv[1:]) | {"requests": arguments.requests} | measured
    print(json.dumps(measured, indent=1))
    write(arguments.out or RESULTS / "reliability" / "serve_latency.json", result)


def measure(folder: Path, requests: int, pairs: int) -> dict:
    """Milliseconds of each verb, idle and while the run trains."""
    while not (folder / "serve.json").is_file():
        time.sleep(0.1)
    with Client.of_run(folder) as client:
        client.ready()
        name = client.create_round(count=pairs)["round"]
        shown = client.pairs(name, rater="ann")
        idle = timed(client, name, shown, requests // 4)
        client.start()
        while client.run()["phase"] is None:
            time.sleep(0.05)
        training = timed(client, name, shown, requests)
        state = client.run()
        client.stop()
    return {"idle": idle, "while_training": training, "epoch_at_the_end": state["epoch"]}


def timed(client: Client, name: str, shown: list[dict], requests: int) -> dict:
    """Quantiles in ms: acknowledging an opinion, reading the pairs of a rater, reading an image."""
    verbs = {
        "acknowledge_feedback": lambda n: client.feedback(
            name, [{"pair_id": shown[n % len(shown)]["pair_id"], "choice": "left"}], rater="ann"
        ),
        "read_pairs": lambda n: client.pairs(name, rater=f"rater_{n % 3}", unlabelled=True),
        "read_image": lambda n: client.image(shown[n % len(shown)]["left"]),
    }
    taken: dict[str, list[float]] = {verb: [] for verb in verbs}
    for n in range(requests):
        for verb, ask in verbs.items():
            started = time.perf_counter()
            ask(n)
            taken[verb].append(1e3 * (time.perf_counter() - started))
        time.sleep(0.02)
    return {verb: quantiles(values) for verb, values in taken.items()}


def quantiles(values: list[float]) -> dict[str, float]:
    """Median, 95th and 99th percentile and the largest."""
    cuts = statistics.quantiles(values, n=100)
    return {"median_ms": statistics.median(values), "p95_ms": cuts[94], "p99_ms": cuts[98], "max_ms": max(values)}


if __name__ == "__main__":
    main()
