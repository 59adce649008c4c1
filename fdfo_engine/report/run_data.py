"""Everything a report shows, read from a run folder that may be unfinished, failed or damaged."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from fdfo_engine.choices import Choice
from fdfo_engine.report.people import choices_of
from fdfo_engine.report.records import EpochLine, EvaluationLine, Listing, Machine, Record, has_form
from fdfo_engine.runtime.best_checkpoint import Best, read_best
from fdfo_engine.runtime.errors import CheckpointError, UsageError
from fdfo_engine.runtime.json_text import json_object
from fdfo_engine.runtime.run_folder import (
    ENVIRONMENT_NAME,
    EVALUATIONS_NAME,
    METRICS_NAME,
    read_log,
    runs_beside,
    stored_config,
)
from fdfo_engine.runtime.run_pictures import IMAGES_NAME
from fdfo_engine.runtime.run_status import read_status

_MAX_SIDE = 320
_MAX_SHEET_SIDE = 1200
_LOSSLESS_SIDE = 128
_PICTURE_NAME = re.compile(r"[\w-]+/[\w-]+\.png")  # never outside the run folder


@dataclass
class Gallery:
    """Pictures of one evaluation: `items` have `picture` (a data: URI, or None if unreadable), `prompt`, `scores`."""

    epoch: int
    items: list[dict[str, Any]]


@dataclass
class RunData:
    """A run as found on disk; `missing` has a sentence for each thing that a whole run would have."""

    path: Path
    status: dict[str, Any] | None = None
    config_text: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    galleries: list[Gallery] = field(default_factory=list)
    pairs: tuple[str, str] | None = None
    choices: list[Choice] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    best: Best | None = None


def read_run(path: Path) -> RunData:
    """Reads the run folder `path`.

    Raises:
        UsageError: `path` is no run folder.
    """
    data = RunData(path, config_text=_config_text(path))
    data.metrics = _records(path / METRICS_NAME, EpochLine)
    data.evaluations = _records(path / EVALUATIONS_NAME, EvaluationLine)
    data.status = _status(path)
    data.best = read_best(path)
    if data.config_text is None and data.status is None and not data.metrics:
        raise UsageError(
            f"{path}: no run folder; it has no config.yaml, status.json or metrics.jsonl{runs_beside(path)}"
        )
    data.settings = _settings(data.config_text)
    data.environment = _json_record(path / ENVIRONMENT_NAME, Machine)
    galleries = [_gallery(file) for file in _gallery_files(path)]
    data.galleries = [gallery for gallery in galleries if gallery is not None]
    data.pairs = _last_sheet(path / IMAGES_NAME)
    data.choices = choices_of(path)
    data.missing = _missing(data)
    return data


def _missing(data: RunData) -> list[str]:
    checks = [
        (data.metrics, "No epoch has finished, so there are no training curves."),
        (data.evaluations, "No evaluation was recorded."),
        (data.galleries, "No evaluation pictures were kept."),
        (data.settings, "The settings (config.yaml) are absent or cannot be read."),
        (data.environment, "The environment of the run (environment.json) was not recorded."),
        (data.status, "There is no readable status.json, so whether the run ended is unknown."),
    ]
    notes = [sentence for found, sentence in checks if not found]
    if len(data.galleries) == 1:
        notes.append("Pictures of one evaluation only: nothing to compare them with yet.")
    unreadable = sum(item["picture"] is None for gallery in data.galleries for item in gallery.items)
    return notes + ([f"{unreadable} evaluation pictures cannot be read."] if unreadable else [])


def _config_text(path: Path) -> str | None:
    try:
        return stored_config(path)
    except CheckpointError:
        return None


def _records(path: Path, form: type[Record]) -> list[dict[str, Any]]:
    return [record for record in read_log(path) if has_form(form, record)]


def _status(path: Path) -> dict[str, Any] | None:
    try:
        return read_status(path)
    except ValueError:
        return None


def _settings(text: str | None) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text or "")
    except (yaml.YAMLError, ValueError, RecursionError):  # no YAML; a number or date that is none; too deep a nesting
        return {}
    return settings if isinstance(settings, dict) else {}


def _json_record(path: Path, form: type[Record]) -> dict[str, Any] | None:
    try:
        value = json_object(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if has_form(form, value) else None


def _gallery_files(path: Path) -> list[Path]:
    """The first, the middle and the last: before, during and after."""
    files = sorted((path / IMAGES_NAME).glob("evaluation_epoch_*.json"))
    return [files[n] for n in sorted({0, (len(files) - 1) // 2, len(files) - 1})] if files else []


def _gallery(file: Path) -> Gallery | None:
    listing = _json_record(file, Listing)
    if listing is None:
        return None
    items = []
    for item in listing["items"]:
        name = item["file"]
        uri = embedded(file.parent / name, _MAX_SIDE) if _PICTURE_NAME.fullmatch(name) else None
        items.append({"picture": uri, "prompt": item["prompt"], "scores": item.get("scores", {})})
    return Gallery(listing["epoch"], items)


def _last_sheet(folder: Path) -> tuple[str, str] | None:
    """Name and data: URI of the newest grid of training pairs."""
    sheets = sorted(folder.glob("*.png"), key=lambda sheet: (sheet.stat().st_mtime, sheet.name))
    uri = embedded(sheets[-1], _MAX_SHEET_SIDE) if sheets else None
    return (sheets[-1].stem, uri) if uri else None


def embedded(path: Path, max_side: int) -> str | None:
    """A picture as a data: URI, scaled down to `max_side`; small ones stay lossless; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            picture = file.convert("RGB")
    except OSError:
        return None
    lossless = max(picture.size) <= _LOSSLESS_SIDE
    picture.thumbnail((max_side, max_side))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG") if lossless else picture.save(buffer, format="JPEG", quality=88)
    kind = "png" if lossless else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
