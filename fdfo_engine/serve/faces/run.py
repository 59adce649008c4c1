"""The run as a user interface shows it: start, pause, stop; settings, numbers, checkpoints, report, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, JSONResponse, Response

from fdfo_engine.config import dump_config
from fdfo_engine.config.json_schema import config_schema
from fdfo_engine.report import write_report
from fdfo_engine.serve.backend import Backend
from fdfo_engine.serve.commands import SERVE_FOLDER
from fdfo_engine.serve.endpoints import Call, Endpoint, answer
from fdfo_engine.serve.messages import CheckpointsBody, ConfigBody, Empty, Export, MetricsBody, OperationBody, RunBody
from fdfo_engine.serve.problems import Problem

RunState = Literal["idle", "running", "pausing"]


def _status(backend: Backend) -> RunBody:
    wish, status = backend.wish, backend.status
    state: RunState = wish if wish == "running" or not status["is_training"] else "pausing"
    checkpoints = backend.checkpoints
    return RunBody(
        state=state,
        epoch=status["epoch"],
        epochs=backend.config.run.epochs,
        next_pair=status["next_pair"],
        weights_version=status["weights_version"],
        queued=len(backend.queue.operations("queued", "running")),
        phase=backend.phase,
        last_checkpoint=checkpoints[-1] if checkpoints else None,
        error=status["error"],
    )


async def run(call: Call) -> Response:
    """Where the run is."""
    return answer(await run_in_threadpool(_status, call.backend))


async def start(call: Call) -> Response:
    """Lets the run train by its own rewards; queued operations run between its epochs."""
    return await _wished(call, "running")


async def pause(call: Call) -> Response:
    """Ends training after the epoch that is in progress."""
    return await _wished(call, "idle")


async def stop(call: Call) -> Response:
    """Ends training, or the operation in progress, at once: what it did is dropped, up to the last whole epoch."""
    return await _wished(call, "idle", now=True)


async def _wished(call: Call, wish: Any, *, now: bool = False) -> Response:
    await run_in_threadpool(lambda: call.backend.set_wish(wish, now=now))
    return answer(await run_in_threadpool(_status, call.backend), 202)


async def checkpoint(call: Call) -> Response:
    """Keeps a checkpoint."""
    operation = await run_in_threadpool(call.backend.submit, "checkpoint", {}, key=call.key)
    return answer(OperationBody.of(operation), 202)


async def export(call: Call) -> Response:
    """Writes the trained weights; the operation's result names the files."""
    operation = await run_in_threadpool(call.backend.submit, "export", call.body.model_dump(), key=call.key)
    return answer(OperationBody.of(operation), 202)


async def exported(call: Call) -> Response:
    """A file of a finished export."""
    operation = await run_in_threadpool(call.backend.queue.operation, call.number("operation"))
    files = (operation.result or {}).get("files", []) if operation is not None and operation.kind == "export" else []
    if operation is None or call.path("file") not in files:
        raise Problem(404, "no_file", "no export has this file")
    folder = call.backend.folder / SERVE_FOLDER / "exports" / f"export_{operation.id}"
    return FileResponse(folder / call.path("file"), media_type="application/octet-stream")


async def config(call: Call) -> Response:
    """The resolved settings."""
    settings = call.backend.config
    return answer(ConfigBody(settings=settings.model_dump(mode="json"), yaml=dump_config(settings)))


async def schema(_call: Call) -> Response:
    """JSON Schema of a config."""
    return JSONResponse(config_schema())


async def metrics(call: Call) -> Response:
    """What was logged."""
    epochs, evaluations = await run_in_threadpool(lambda: call.backend.logs)
    return answer(MetricsBody(epochs=epochs, evaluations=evaluations))


async def checkpoints(call: Call) -> Response:
    """Names of the whole ones."""
    return answer(CheckpointsBody(checkpoints=await run_in_threadpool(lambda: call.backend.checkpoints)))


async def report(call: Call) -> Response:
    """The run's report, one page that needs nothing else."""
    path = await run_in_threadpool(_written_report, call.backend)
    return FileResponse(path, media_type="text/html", headers={"Cache-Control": "no-store"})


def _written_report(backend: Backend) -> Path:
    folder = backend.folder / SERVE_FOLDER
    folder.mkdir(exist_ok=True)
    return write_report(backend.folder, folder / "report.html")


ENDPOINTS = (
    Endpoint("GET", "/v1/run", "Where the run is.", run, {200: RunBody}),
    Endpoint("POST", "/v1/run/start", "Trains by the run's own rewards.", start, {202: RunBody}, body=Empty),
    Endpoint("POST", "/v1/run/resume", "The same as start.", start, {202: RunBody}, body=Empty),
    Endpoint("POST", "/v1/run/pause", "Stops after this epoch.", pause, {202: RunBody}, body=Empty),
    Endpoint("POST", "/v1/run/stop", "Stops now.", stop, {202: RunBody}, body=Empty),
    Endpoint(
        "POST", "/v1/run/checkpoint", "Keeps a checkpoint.", checkpoint, {202: OperationBody}, body=Empty, creates=True,
        problems=(422, 429),
    ),
    Endpoint(
        "POST", "/v1/run/export", "Writes the trained weights for other tools.", export, {202: OperationBody},
        body=Export, creates=True, problems=(422, 429),
    ),
    Endpoint(
        "GET", "/v1/run/exports/{operation}/{file:path}", "A file of an export.", exported,
        {200: "application/octet-stream"}, problems=(404,),
    ),
    Endpoint("GET", "/v1/run/config", "The resolved settings.", config, {200: ConfigBody}),
    Endpoint("GET", "/v1/run/metrics", "What was logged.", metrics, {200: MetricsBody}),
    Endpoint("GET", "/v1/run/checkpoints", "Whole checkpoints.", checkpoints, {200: CheckpointsBody}),
    Endpoint("GET", "/v1/run/report.html", "The run's report.", report, {200: "text/html"}),
    Endpoint("GET", "/v1/config/schema", "JSON Schema of a config.", schema, {200: "application/json"}),
)  # fmt: skip
