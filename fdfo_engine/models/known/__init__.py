"""Configs of well-known models, with the values that their authors publish: `fdfo plan` then needs no network."""

from pathlib import Path


def known_configs(model_id: str) -> Path | None:
    """Folder of the configs of hub model `model_id`, without weights and tokenizers; None where none is shipped."""
    folder = Path(__file__).parent / model_id.replace("/", "--")
    return folder if model_id.count("/") == 1 and folder.is_dir() else None
