"""The OpenAPI 3.1 description, made of the same declarations that the router runs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from fdfo_engine import __version__
from fdfo_engine.serve.endpoints import Endpoint
from fdfo_engine.serve.openai_messages import OpenAIError
from fdfo_engine.serve.problems import MEDIA_TYPE, ProblemBody

_REF = "#/components/schemas/{model}"
_COMMON_PROBLEMS = (401, 403)
_BODY_PROBLEMS = (400, 413, 415, 422)
_WORDS = {
    200: "Done.", 201: "Recorded.", 202: "Queued.", 204: "Done.", 400: "The request is malformed.",
    401: "The token is missing.", 403: "This host, origin or page may not ask.",
    404: "There is none.", 409: "The state does not allow it.",
    410: "It is gone.", 413: "The body is too large.", 415: "The body is no JSON.", 422: "Fields are wrong.",
    429: "Too much is queued.", 503: "Not now.", 507: "The storage is full.",
}  # fmt: skip


def description(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    """The whole document, sorted, so that a committed copy differs only where the interface does."""
    endpoints = list(endpoints)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = endpoint.path.replace(":path", "")
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "fdfo_engine",
            "version": __version__,
            "summary": "Online RL post-training of a text-to-image flow model, behind HTTP.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": _schemas(endpoints),
        },
    }


def _schemas(endpoints: Iterable[Endpoint]) -> dict[str, Any]:
    taken: dict[type[BaseModel], None] = {ProblemBody: None, OpenAIError: None}
    for endpoint in endpoints:
        models = [endpoint.body, *endpoint.answers.values()]
        taken |= {model: None for model in models if isinstance(model, type)}
    _, schemas = models_json_schema([(model, "validation") for model in taken], ref_template=_REF)
    definitions: dict[str, Any] = schemas["$defs"]
    return dict(sorted(definitions.items()))


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _name(endpoint),
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint),
        "responses": _responses(endpoint),
    }
    if endpoint.is_open:
        operation["security"] = []
    if endpoint.body is not None:
        operation["requestBody"] = {
            "required": bool(endpoint.body.model_json_schema().get("required")),
            "content": {"application/json": {"schema": _reference(endpoint.body)}},
        }
    return operation


def _responses(endpoint: Endpoint) -> dict[str, Any]:
    responses: dict[str, Any] = {}
    for status, model in endpoint.answers.items():
        responses[str(status)] = {"description": _WORDS[status], **_content(model)}
    if endpoint.path == "/v1/events":
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    statuses = {*_COMMON_PROBLEMS, *endpoint.problems} if not endpoint.is_open else {403, *endpoint.problems}
    if endpoint.body is not None:
        statuses |= {*_BODY_PROBLEMS}
    if endpoint.query is not None:
        statuses.add(422)
    if endpoint.creates:
        statuses.add(400)
    for status in sorted(statuses):
        responses[str(status)] = {"description": _WORDS[status], "content": _problem(endpoint, status)}
    return responses


def _problem(endpoint: Endpoint, status: int) -> dict[str, Any]:
    """Of the image endpoints OpenAI's shape, but for what is refused before they are reached."""
    content = {MEDIA_TYPE: {"schema": _reference(ProblemBody)}}
    if endpoint.speaks_openai and status not in _COMMON_PROBLEMS:
        return {"application/json": {"schema": _reference(OpenAIError)}}
    return content


def _content(model: type[BaseModel] | str | None) -> dict[str, Any]:
    if model is None:
        return {}
    if isinstance(model, str):
        is_json = model == "application/json"
        return {"content": {model: {"schema": {"type": "object"} if is_json else {"type": "string"}}}}
    return {"content": {"application/json": {"schema": _reference(model)}}}


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    names = re.findall(r"{(\w+)(?::path)?}", endpoint.path)
    found = [{"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names]
    if endpoint.query is not None:
        schema = endpoint.query.model_json_schema()
        found += [
            {
                "name": name,
                "in": "query",
                "required": False,
                "schema": field,
                "description": field.pop("description", ""),
            }
            for name, field in schema["properties"].items()
        ]
    if endpoint.creates:
        header = {"type": "string", "minLength": 1, "maxLength": 200}
        words = "The same key with the same body gives the stored answer; with another body it is refused."
        found.append(
            {"name": "Idempotency-Key", "in": "header", "required": False, "schema": header, "description": words}
        )
    return found


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _name(endpoint: Endpoint) -> str:
    words = re.sub(r"[{}]|:path", "", endpoint.path).strip("/").replace(".", "_")
    return f"{endpoint.method.lower()}_{re.sub(r'[/-]', '_', words)}"
