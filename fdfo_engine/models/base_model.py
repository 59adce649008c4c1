"""Where a base model lies, and what it is by content."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

from fdfo_engine.config import ModelConfig
from fdfo_engine.models.base_files import INDEX_NAME, base_files
from fdfo_engine.models.pipeline_folder import names_a_file, why_no_pipeline
from fdfo_engine.models.pipeline_loading import absent_model
from fdfo_engine.runtime.base_record import BaseRecord
from fdfo_engine.runtime.errors import EnvironmentProblem
from fdfo_engine.runtime.hub import ask_hub, hub_errors, quiet_hub
from fdfo_engine.shapes.pipeline import shapes_base


@dataclass(frozen=True)
class Base:
    """A base model on this machine.

    Attributes:
        source: what is loaded: a pipeline folder, or whatever a family of one's own makes of `model.id`.
        name: what people call it: the hub's id, or the folder.
        commit: of the hub, which is not asked again; None of any other folder.
        variant: which of a part's weight files are read, where there are several.
    """

    source: str
    name: str
    commit: str | None = None
    variant: str | None = None

    @property
    def folder(self) -> Path | None:
        """The pipeline folder; None where there is none."""
        folder = Path(self.source)
        return folder if (folder / INDEX_NAME).is_file() else None

    @cached_property
    def record(self) -> BaseRecord | None:
        """What the model is, by content; None without a pipeline folder. Large files are read once, then remembered.

        Raises:
            EnvironmentProblem: a file is missing or cannot be read.
        """
        if self.folder is None:
            return None
        try:
            return BaseRecord(self.name, self.commit, base_files(self.folder, self.variant))
        except (OSError, ValueError, KeyError) as error:
            raise absent_model(self.name, error) from error


def find_base(settings: ModelConfig, pipeline_class: Any) -> Base:
    """Finds the base model that `settings` name; what this machine lacks of it is fetched from the hub, at one commit.

    Args:
        settings: of the model.
        pipeline_class: of diffusers, which says what belongs to the model; None for a family that loads otherwise.

    Raises:
        EnvironmentProblem: it is neither in a folder nor to be had from the hub.
    """
    source = resolve_model_id(settings.id)
    if Path(source).is_dir():
        folder = Path(source).resolve()
    elif pipeline_class is not None:
        folder = _fetched(pipeline_class, source, settings)
    else:
        return Base(source, source)
    repository, commit = hub_snapshot(folder)
    return Base(str(folder), repository or str(folder), commit, settings.variant)


def resolve_model_id(model_id: str) -> str:
    """`shapes` is the bundled miniature; anything else is a folder or a hub id, as it stands."""
    return str(shapes_base()) if model_id == "shapes" else model_id


def model_index(model_id: str, revision: str | None) -> Path:
    """The pipeline's `model_index.json`, in its folder or in the hub's cache.

    Raises:
        EnvironmentProblem: there is none.
    """
    local = Path(model_id) / INDEX_NAME
    if local.is_file():
        return local
    if Path(model_id).is_dir() or names_a_file(model_id):
        raise EnvironmentProblem(f"model.id = {model_id!r}: {why_no_pipeline(model_id)}")
    if _is_path(model_id):
        raise EnvironmentProblem(f"model.id = {model_id!r}: no such folder; if a run's base moved there is --base PATH")
    try:
        return _index_from_hub(model_id, revision)
    except RemoteEntryNotFoundError as error:
        reason = "its repository has no model_index.json: it holds no diffusers pipeline, or files to make one of"
        raise EnvironmentProblem(f"model.id = {model_id!r}: {reason}") from error
    except HFValidationError as error:
        raise EnvironmentProblem(f"model.id = {model_id!r}: no folder here, and no OWNER/NAME of the hub") from error
    except hub_errors() as error:
        raise absent_model(model_id, error, revision) from error


def _index_from_hub(model_id: str, revision: str | None) -> Path:
    with quiet_hub():
        if not isinstance(try_to_load_from_cache(model_id, INDEX_NAME, revision=revision), str):
            ask_hub(model_id, INDEX_NAME, revision=revision)  # the download would try for half a minute
        return Path(hf_hub_download(model_id, INDEX_NAME, revision=revision))


def _is_path(model_id: str) -> bool:
    """Whether it can be no hub id, which is OWNER/NAME."""
    return model_id.count("/") > 1 or model_id.startswith((".", "/", "~"))


def hub_snapshot(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """Repository and commit of a folder of the hub's cache, `models--OWNER--NAME/snapshots/COMMIT`; else None."""
    cache_name = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not cache_name.startswith("models--"):
        return None, None
    return cache_name.removeprefix("models--").replace("--", "/"), folder.name


def _fetched(pipeline_class: Any, model_id: str, settings: ModelConfig) -> Path:
    """The folder of the hub's cache that has all files of the pipeline."""
    commit = model_index(model_id, settings.revision).parent.name
    try:
        with quiet_hub():
            return Path(pipeline_class.download(model_id, revision=commit, variant=settings.variant))
    except hub_errors(ValueError) as error:
        raise absent_model(model_id, error) from error
