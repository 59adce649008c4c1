"""Choices as a table in the columns of the Pick-a-Pic data set, which reward trainers read."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fdfo_engine.choices.records import standing
from fdfo_engine.choices.store import Judged
from fdfo_engine.runtime.durable import replace_file, storage_error
from fdfo_engine.runtime.errors import EnvironmentProblem, UsageError

SUFFIXES = (".jsonl", ".parquet")
_JPEG_QUALITY = 95


def export_choices(judged: Iterable[Judged], model: str, out: Path) -> int:
    """Writes the answers that stand to `out`, a row each, and returns how many; skips and repeats are left out.

    A `.parquet` file holds both images as JPEG, as Pick-a-Pic does; a `.jsonl` file names the files of the images
    instead. `model` is what drew them.

    Raises:
        UsageError: another suffix. EnvironmentProblem: a .parquet file without pyarrow. CheckpointError: the storage
        refuses.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out}: takes a name that ends in {' or '.join(SUFFIXES)}")
    by_event = {each.choice.event: each for each in judged}
    rows = [
        _row(by_event[choice.event], model)
        for choice in standing(each.choice for each in by_event.values())
        if choice.choice != "skip"
    ]
    if out.suffix == ".jsonl":
        replace_file(out, "".join(json.dumps(row) + "\n" for row in rows).encode())
    else:
        _write_parquet(rows, [by_event[int(row["ranking_id"])] for row in rows], out)
    return len(rows)


def _row(judged: Judged, model: str) -> dict[str, Any]:
    choice = judged.choice
    first, second = (path.stem for path in judged.images)
    best = {None: "none", 0: first, 1: second}[choice.preferred]
    return {
        "are_different": True,
        "best_image_uid": best,
        "caption": judged.prompt,
        "created_at": datetime.fromtimestamp(choice.time, UTC).isoformat(),
        "has_label": choice.preferred is not None,
        "image_0_uid": first,
        "image_0_url": judged.images[0].resolve().as_uri(),
        "image_1_uid": second,
        "image_1_url": judged.images[1].resolve().as_uri(),
        "label_0": choice.rewards[0],
        "label_1": choice.rewards[1],
        "model_0": "base:" + model if choice.is_comparison else f"{model}@epoch_{judged.epoch:06d}",
        "model_1": f"{model}@epoch_{judged.epoch:06d}",
        "ranking_id": choice.event,
        "user_id": choice.rater,
        "num_example_per_prompt": 1,
    }


def _write_parquet(rows: list[dict[str, Any]], judged: list[Judged], out: Path) -> None:
    if importlib.util.find_spec("pyarrow") is None:
        raise EnvironmentProblem(f"{out}: pyarrow missing: pip install 'fdfo-engine[parquet]', or take a .jsonl file")
    import pyarrow
    from pyarrow import parquet

    jpegs = {f"jpg_{branch}": [_jpeg(each.images[branch]) for each in judged] for branch in range(2)}
    columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else {})} | jpegs
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer)
    replace_file(out, buffer.getvalue())


def _jpeg(path: Path) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            picture.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    except OSError as error:
        raise storage_error(path, error) from error
    return buffer.getvalue()
