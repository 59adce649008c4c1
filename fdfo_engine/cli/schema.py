"""`fdfo schema`: JSON Schemas of what others read and write."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fdfo_engine.runtime.console import say


def add_parser(verbs: Any) -> None:
    """Adds the verb."""
    parse = verbs.add_parser(
        "schema",
        help="print a JSON Schema: of events, or of settings; or the OpenAPI description of the server",
        description="Prints the JSON Schema (2020-12) of a line of events.jsonl, or of a config file; or the OpenAPI "
        "description (3.1) of `fdfo serve`.",
    )
    parse.add_argument("of", choices=["events", "config", "openapi"])
    parse.set_defaults(verb=run)


def run(arguments: argparse.Namespace) -> int:
    """Prints the schema."""
    say(text(arguments.of))
    return 0


def text(of: str) -> str:
    """The schema `of` events, config or openapi, as docs/schema holds it."""
    if of == "events":
        from fdfo_engine.runtime.events import events_schema

        schema = events_schema()
    elif of == "openapi":
        from fdfo_engine.serve.app import ENDPOINTS
        from fdfo_engine.serve.openapi import description

        schema = description(ENDPOINTS)
    else:
        from fdfo_engine.config import config_schema

        schema = config_schema()
    return json.dumps(schema, indent=1, sort_keys=True)
