"""The settings as JSON Schema, for editors and frontends."""

from typing import Any

from fdfo_engine.config.schema import Config


def config_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a config file. Rules between two keys are checked by `load_config` alone."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
