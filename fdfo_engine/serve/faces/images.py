"""Images, in the shape of OpenAI's API, for chat interfaces and SDKs; and the files of all images."""

from __future__ import annotations

import base64
import time

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, Response

from fdfo_engine.serve.endpoints import Call, Endpoint, answer
from fdfo_engine.serve.openai_messages import GenerateImages, ImageItem, ImagesBody, ModelItem, ModelsBody
from fdfo_engine.serve.problems import Problem
from fdfo_engine.serve.weights import model_names, require_model

GENERATION_WAIT_S = 600.0


async def generate(call: Call) -> Response:
    """Waits until the images are drawn: that API has no operations."""
    backend, body = call.backend, call.body
    await run_in_threadpool(require_model, body.model, backend.config.run.dir)
    _require_size(call)
    asked = body.model_dump(
        mode="json",
        include={"prompt", "model", "n", "seed", "num_inference_steps", "guidance_scale"},
        exclude_none=True,
    )
    operation = await run_in_threadpool(backend.submit, "generate", asked, key=call.key)
    operation = await backend.wait_for(operation.id, GENERATION_WAIT_S)
    if operation.problem is not None:
        raise Problem.stored(operation.problem)
    if operation.result is None:
        raise Problem(503, "busy", "the engine is busy with something long", retry_after_s=30)
    items = [await run_in_threadpool(_item, call, name) for name in operation.result["images"]]
    return answer(ImagesBody(created=int(time.time()), data=items))


def _require_size(call: Call) -> None:
    model = call.backend.config.model
    own = f"{model.width}x{model.height}"
    if call.body.size not in (None, "auto", own):
        raise Problem(400, "size", f"size {call.body.size!r}: this run draws {own}")


def _item(call: Call, name: str) -> ImageItem:
    if call.body.response_format == "url":
        return ImageItem(url=str(call.request.url_for("GET /v1/images/{id}/content", id=name)))
    path = call.backend.image_file(name)
    if path is None:
        raise Problem(410, "image_gone", f"image {name}: its file is gone")
    return ImageItem(b64_json=base64.b64encode(path.read_bytes()).decode())


async def models(call: Call) -> Response:
    """What images can be drawn with."""
    names = await run_in_threadpool(model_names, call.backend.config.run.dir)
    return answer(ModelsBody(data=[ModelItem(id=name, created=0) for name in names]))


async def content(call: Call) -> Response:
    """A PNG file."""
    name = call.path("id")
    path = await run_in_threadpool(call.backend.image_file, name)
    if path is None:
        known = await run_in_threadpool(call.backend.rounds.pair_of_image, name)
        if known is not None:
            raise Problem(410, "image_gone", f"image {name}: its file is gone")
        raise Problem(404, "no_image", "there is no such image")
    return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=86400, immutable"})


ENDPOINTS = (
    Endpoint(
        "POST", "/v1/images/generations", "Draws images, as OpenAI's API does.", generate, {200: ImagesBody},
        body=GenerateImages, creates=True, problems=(400, 404, 409, 410, 422, 429, 503), speaks_openai=True,
    ),
    Endpoint("GET", "/v1/models", "What images can be drawn with.", models, {200: ModelsBody}, speaks_openai=True),
    Endpoint(
        "GET", "/v1/images/{id}/content", "An image's PNG.", content, {200: "image/png"}, problems=(404, 410),
    ),
)  # fmt: skip
