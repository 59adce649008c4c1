"""An ai-toolkit extension: a job that trains with FDFO, shown and stopped by ai-toolkit's interface.

Put this folder into ai-toolkit's `extensions/`, with fdfo-engine[serve] installed. In the job's config:

    process: [{type: fdfo, config: sd35m_pickscore, overrides: [run.epochs=20], sample_prompts: [a red fox]}]
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

from toolkit.extension import Extension

from fdfo_engine.client import Client

LOOK_S = 1.0


def process_class():
    """Made late: the base class is ai-toolkit's."""
    from jobs.process import BaseExtensionProcess

    class FdfoProcess(BaseExtensionProcess):
        """Serves the run, lets it train, and carries its events to the job's row in ai-toolkit's database."""

        def run(self) -> None:
            """Until the run is done, has failed, or somebody stops it."""
            folder = Path(self.get_conf("training_folder", "output")) / self.job.name
            row = JobRow(self.get_conf("sqlite_db_path", "aitk_db.db"), os.environ.get("AITK_JOB_ID", ""))
            words = [self.get_conf("config", required=True), *self.get_conf("overrides", []), f"run.dir={folder}"]
            server = subprocess.Popen([sys.executable, "-m", "fdfo_engine.cli.main", "serve", "--port", "0", *words])
            try:
                self._follow(server, folder, row)
            finally:
                server.send_signal(signal.SIGTERM)
                server.wait(120)

        def _follow(self, server: subprocess.Popen, folder: Path, row: JobRow) -> None:
            row.set(status="running", info="Loading model")
            while not (folder / "serve.json").is_file() and server.poll() is None:
                time.sleep(LOOK_S / 4)
            if server.poll() is not None:
                row.set(status="error", info="fdfo serve ended; its output says why")
                raise RuntimeError("fdfo serve ended; its output above says why")
            with Client.of_run(folder) as client:
                client.ready()
                seen, state = 0, client.start()
                row.set(total_steps=state["epochs"], info="Training")
                while state["state"] != "idle":
                    seen = self._carry(folder / "events.jsonl", seen, row)
                    self._obey(client, folder, row)
                    time.sleep(LOOK_S)
                    state = client.run()
                self._carry(folder / "events.jsonl", seen, row)
                self._end(client, folder, row, state)

        def _carry(self, path: Path, seen: int, row: JobRow) -> int:
            """Events behind line `seen` go to the row; returns the last line."""
            whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            for line in whole[seen:]:
                row.set(**of_event(json.loads(line)))
            return len(whole)

        def _obey(self, client: Client, folder: Path, row: JobRow) -> None:
            """What somebody clicked."""
            if row.take("stop", keep=True):
                client.stop()
            if row.take("save_now"):
                client.checkpoint()
            if row.take("sample_now"):
                self._sample(client, folder)

        def _sample(self, client: Client, folder: Path) -> None:
            step = client.run()["epoch"]
            for n, prompt in enumerate(self.get_conf("sample_prompts", [])):
                path = folder / "samples" / f"{int(time.time() * 1000)}__{step:09d}_{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(client.generate(prompt, seed=n)[0])

        def _end(self, client: Client, folder: Path, row: JobRow, state: dict) -> None:
            (folder / "plugin.html").write_bytes(client.report())
            self._sample(client, folder)
            if row.take("stop", keep=True):
                row.set(status="stopped", info="Job stopped")
            elif state["epoch"] >= state["epochs"]:
                row.set(status="completed", info="Training completed", step=state["epoch"])
            else:
                row.set(status="error", info=state.get("error") or "the run stopped by itself")

    return FdfoProcess


def of_event(event: dict) -> dict:
    """The columns of a job that an event changes."""
    data, kind = event["data"], event["type"]
    if kind == "phase":
        left = f", {data['eta_s']:.0f} s left" if data.get("eta_s") else ""
        info = f"{data['name']} {data['done']}/{data['total'] or '?'} {data['unit']}{left}"
        speed = {"speed_string": f"{data['per_second']:.2f} {data['unit']}/sec"} if data.get("per_second") else {}
        return {"info": info, **speed}
    if kind == "metrics" and data["kind"] == "update":
        return {"step": data["epoch"]}
    return {"info": data["message"]} if kind in ("warning", "error") and data.get("message") else {}


class JobRow:
    """The job's row of ai-toolkit's database; columns that this version of it lacks are left alone."""

    def __init__(self, path: str, job: str) -> None:
        self._path, self._job = path, job
        with sqlite3.connect(path, timeout=10) as db:
            self._columns = {row[1] for row in db.execute("PRAGMA table_info(Job)")}

    def set(self, **values: object) -> None:
        """Writes some columns."""
        for name in values.keys() & self._columns:
            with sqlite3.connect(self._path, timeout=10) as db:
                db.execute(f"UPDATE Job SET {name} = ? WHERE id = ?", (values[name], self._job))

    def take(self, name: str, *, keep: bool = False) -> bool:
        """Whether a flag is set; it is cleared unless `keep`."""
        if name not in self._columns:
            return False
        with sqlite3.connect(self._path, timeout=10) as db:
            (flag,) = db.execute(f"SELECT {name} FROM Job WHERE id = ?", (self._job,)).fetchone()
        if flag and not keep:
            self.set(**{name: 0})
        return bool(flag)


class FdfoExtension(Extension):
    """What ai-toolkit finds."""

    uid = "fdfo"
    name = "FDFO"

    @classmethod
    def get_process(cls):
        """The class that runs such a job."""
        return process_class()


AI_TOOLKIT_EXTENSIONS = [FdfoExtension]
