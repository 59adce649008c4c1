"""One served run: the HTTP thread, the engine's thread, and what both need, opened and closed in order."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import uvicorn

from fdfo_engine.config import BatchPlan, Config
from fdfo_engine.engine import Engine
from fdfo_engine.loop import Training
from fdfo_engine.models.registry import agreed_base
from fdfo_engine.rewards import WeightedRewards
from fdfo_engine.rollout.prompts import describe_prompts, load_prompts
from fdfo_engine.runtime.console import say
from fdfo_engine.runtime.distributed import (
    all_agree_hash,
    broadcast_text,
    lost_ranks_named,
    on_main,
    setup_distributed,
    together,
    world_size,
)
from fdfo_engine.runtime.durable import replace_file
from fdfo_engine.runtime.errors import DistributedError, Stopped, UsageError, error_message, exit_code
from fdfo_engine.runtime.events import RunState, State
from fdfo_engine.runtime.run_folder import RunFolder
from fdfo_engine.runtime.stop import StopRequest
from fdfo_engine.runtime.survivor import speak_for_rank_0
from fdfo_engine.runtime.watch import COLLECTIVE_TIMEOUTS, Watch
from fdfo_engine.serve.access import TOKEN_NAME, token_of
from fdfo_engine.serve.address import ADDRESS_NAME, Address
from fdfo_engine.serve.app import application
from fdfo_engine.serve.backend import Backend, Bell
from fdfo_engine.serve.commands import Commands
from fdfo_engine.serve.database import Database
from fdfo_engine.serve.talk import Talk
from fdfo_engine.serve.worker import Worker

DEFAULT_PORT = 8710


@dataclass(frozen=True)
class Door(Address):
    """Where the server listens, and whom it lets in.

    Attributes:
        origins: pages of other origins that may ask.
    """

    port: int = DEFAULT_PORT
    origins: Sequence[str] = ()

    def check(self) -> None:
        """Refuses what would open the server to strangers unasked.

        Raises:
            UsageError: an address that is not this machine's alone; an origin that means anybody.
        """
        self.require_allowed()
        if bad := [origin for origin in self.origins if origin in ("*", "null")]:
            raise UsageError(f"--allow-origin {bad[0]}: means anybody; takes an origin such as http://localhost:3000")


def serve(config: Config, door: Door, stop: StopRequest | None = None, *, base_has_moved: bool = False) -> None:
    """Serves the run of `config` until it is stopped. Collective: rank 0 has the HTTP side.

    Args:
        config: the settings.
        door: where to listen.
        stop: what asks it to stop, from any thread; by default a signal.
        base_has_moved: as of `loop.run`.

    Raises:
        Stopped: a signal asked for it; all that was acknowledged is on disk.
        FdfoError, ConfigError: as `loop.run`.
    """
    door.check()
    patience_s = COLLECTIVE_TIMEOUTS * config.comm.timeout_s
    setup_distributed("cuda" if torch.cuda.is_available() else "cpu", timeout_s=patience_s)
    BatchPlan.from_config(config, world_size())
    prompts = load_prompts(config.prompts, config.run.seed, pairs_per_prompt=config.sampling.pairs_per_prompt)
    all_agree_hash(prompts.sha256, "the prompt list")
    say(describe_prompts(prompts, config.sampling.pairs_per_epoch))
    rewards = WeightedRewards.from_config(config.rewards, Path(config.run.dir) / "logs")
    base = agreed_base(config)
    folder = on_main(lambda: RunFolder.of(config, base.record, has_moved=base_has_moved))
    try:
        together(lambda: None if folder is None else folder.require_prompts(prompts.sha256))
        bell = Bell()
        with (
            stop or StopRequest() as stop,
            Talk(config, folder, bell) as talk,
            nullcontext() if folder is None else _opened(config, folder, talk, bell, door) as backend,
            Watch(config.run.dir, config.comm.timeout_s, partial(_tell_end, config, folder)),
            lost_ranks_named(),
        ):
            engine = Engine(config, on_event=talk.relay)
            token = broadcast_text("" if backend is None else backend.token)
            commands = Commands(engine, prompts, rewards, token, talk)
            training = partial(Training, engine, prompts, rewards, talk, stop)
            talk.tell(State(epoch=0, state="running", epochs=config.run.epochs))
            Worker(engine, commands, training, talk, backend, stop).serve()
    except BaseException as error:
        _tell_end(config, folder, error)
        raise
    finally:
        if folder is not None:
            folder.close()


def _tell_end(config: Config, folder: RunFolder | None, error: BaseException) -> None:
    """Where rank 0, which tells it, is gone, on any rank."""
    if folder is not None:
        state: RunState = "stopped" if isinstance(error, Stopped) else "failed"
        folder.status.update(state, exit_code=exit_code(error), message=error_message(error))
    elif isinstance(error, DistributedError):
        speak_for_rank_0(Path(config.run.dir), error)


@contextmanager
def _opened(config: Config, folder: RunFolder, talk: Talk, bell: Bell, door: Door) -> Iterator[Backend]:
    """Rank 0's side: opens the database, and listens."""
    token = token_of(folder.path)
    database = Database(folder.path)
    backend = Backend(config, database, token, talk, bell, world_size())
    try:
        with listening(backend, door, folder.path):
            yield backend
    finally:
        database.close()


@contextmanager
def listening(backend: Backend, door: Door, folder: Path) -> Iterator[str]:
    """Answers HTTP in a thread; gives the address, which `folder/serve.json` tells too."""
    with door.bound() as listener:
        port = listener.getsockname()[1]
        url = door.url(port)
        app = application(backend, hosts=door.names, origins=door.origins)
        settings = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
            limit_concurrency=512,
        )
        http = uvicorn.Server(settings)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [listener]}, name="http", daemon=True)
        thread.start()
        replace_file(folder / ADDRESS_NAME, json.dumps({"url": url, "pid": os.getpid()}).encode())
        say(f"serving {url}; the token is in {folder / TOKEN_NAME}")
        if not door.is_loopback:
            say(f"reachable from other machines; from there rather: {door.tunnel(port)}")
        try:
            yield url
        finally:
            (folder / ADDRESS_NAME).unlink(missing_ok=True)
            backend.is_closing = http.should_exit = True
            backend.bell.ring()
            thread.join(5.0)
