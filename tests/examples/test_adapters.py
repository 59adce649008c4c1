"""The adapters under examples/, each against a real server on the shapes model; hosts are stubs of their interfaces."""

import asyncio
import importlib.util
import io
import json
import pickle
import sqlite3
import sys
import threading
import types
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from serve.serving import served, settings, shapes_config

from fdfo_engine.rewards import build

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MAX_LINES = 150


def load(name):
    path = EXAMPLES / name
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def listening(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A served run with two epochs trained: its folder and a client."""
    folder = tmp_path_factory.mktemp("adapters")
    with served(shapes_config(folder, "run.epochs=50", "checkpoint.keep=3")) as client:
        yield folder, client


def test_adapters_are_short():
    for name in ("comfyui_fdfo/__init__.py", "ai_toolkit_fdfo/__init__.py", "label_studio/backend.py",
                 "openai_images.py", "flow_grpo_bridge.py", "grpo_loop.py"):  # fmt: skip
        assert len((EXAMPLES / name).read_text().splitlines()) <= MAX_LINES, name


def stub_of_comfy_api():
    """What the nodes use of `comfy_api.latest`, after its public documentation."""

    def port(kind):
        def make(*args, **options):
            return types.SimpleNamespace(kind=kind, id=args[0] if args else options.get("display_name"), **options)

        return types.SimpleNamespace(Input=make, Output=make)

    fields = {"io": types.SimpleNamespace(
        ComfyNode=object, Schema=lambda **given: types.SimpleNamespace(**given), NodeOutput=lambda *values: values,
        Custom=port, String=port("STRING"), Int=port("INT"), Image=port("IMAGE"),
    ), "ComfyExtension": object}  # fmt: skip
    latest = types.ModuleType("comfy_api.latest")
    latest.__dict__.update(fields)
    return {"comfy_api": types.ModuleType("comfy_api"), "comfy_api.latest": latest}


def test_comfyui_nodes_sample_judge_update_and_fetch(run, monkeypatch, tmp_path):
    folder, client = run
    for name, module in stub_of_comfy_api().items():
        monkeypatch.setitem(sys.modules, name, module)
    comfy = load("comfyui_fdfo/__init__.py")
    nodes = asyncio.run(asyncio.run(comfy.comfy_entrypoint()).get_node_list())
    schemas = {node: node.define_schema() for node in nodes}
    assert len({schema.node_id for schema in schemas.values()}) == 5
    for node, schema in schemas.items():  # ComfyUI passes inputs by id
        taken = node.execute.__func__.__code__.co_varnames[1 : node.execute.__func__.__code__.co_argcount]
        assert [port.id for port in schema.inputs] == list(taken)
        assert getattr(schema, "not_idempotent", False) == (node is not comfy.Connect)
    (connection,) = comfy.Connect.execute(run_dir=str(folder))
    round_, left, right = comfy.SamplePairs.execute(connection, prompts="", count=2)
    assert (left.shape, left.dtype) == ((2, 64, 64, 3), torch.float32)
    assert 0 <= left.min() < left.max() <= 1
    assert not left.equal(right)
    with pytest.raises(ValueError, match="takes 2 letters of l, r, t, s"):
        comfy.SendFeedback.execute(connection, round_, choices="lxr")
    comfy.SendFeedback.execute(connection, round_, choices="l t")
    before = client.run()["weights_version"]
    (checkpoint,) = comfy.Update.execute(connection, round_)
    assert client.run()["weights_version"] == before + 2
    with pytest.raises(Exception, match="comfyui is a LoRA's"):  # this run trains every weight
        comfy.GetLora.execute(connection, checkpoint, folder=str(tmp_path))
    connection.close()


def test_the_official_openai_package_draws_from_a_checkpoint(run):
    folder, client = run
    sampled = client.create_round(count=2)
    client.feedback(
        sampled["round"], [{"pair_id": p["pair_id"], "scores": dict.fromkeys(p["images"], 1.0) | {p["images"][0]: 0.0}}
                           for p in sampled["pairs"]],
    )  # fmt: skip
    checkpoint = client.train(sampled["round"])["checkpoint"]
    example = load("openai_images.py")
    sdk = example.connect(folder)
    names = [model.id for model in sdk.models.list()]
    assert {"base", "run", f"run@{checkpoint}"} <= set(names)
    drawn = {model: example.draw(sdk, "a red circle", model, seed=3) for model in ("base", f"run@{checkpoint}")}
    assert all(Image.open(io.BytesIO(png)).size == (64, 64) for png in drawn.values())
    assert drawn["base"] != drawn[f"run@{checkpoint}"]
    assert example.draw(sdk, "a red circle", "base", seed=3) == drawn["base"]
    import openai

    with pytest.raises(openai.NotFoundError, match="takes base, run"):
        example.draw(sdk, "a red circle", "dall-e-3")
    with pytest.raises(openai.BadRequestError, match="this run draws 64x64"):
        sdk.images.generate(prompt="a", model="run", size="1024x1024")
    sdk.close()


def test_the_grpo_loop_trains_on_rewards_and_a_loss_of_its_own(run):
    _, client = run
    loop = load("grpo_loop.py")
    before = client.run()
    means = loop.train(client, loop.warmth, epochs=1, prompts=2, group=4)
    after = client.run()
    assert len(means) == 1
    assert after["epoch"] == before["epoch"] + 1
    assert after["weights_version"] == before["weights_version"] + 2
    assert after["next_pair"] == before["next_pair"] + 4
    pairs = [{"prompt": "a", "pair_id": 0}, {"prompt": "a", "pair_id": 1}]
    found = loop.advantages(pairs, {0: [1.0, 3.0], 1: [5.0, 7.0]})
    flat = np.array([*found[0], *found[1]])
    assert np.allclose(flat, (np.array([1, 3, 5, 7]) - 4) / (np.std([1, 3, 5, 7]) + 1e-4))


def test_a_scorer_that_speaks_pickles_is_reached_through_the_bridge():
    bridge, asked = load("flow_grpo_bridge.py"), []

    class Scorer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = pickle.loads(self.rfile.read(int(self.headers["Content-Length"])))  # noqa: S301 - the stub's side
            asked.append(body["prompts"])
            pixels = [np.asarray(Image.open(io.BytesIO(image)))[..., 0].mean() for image in body["images"]]
            answer = pickle.dumps({"scores": [float("nan") if p > 200 else p for p in pixels]})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    images = torch.stack([torch.full((3, 16, 16), value) for value in (0.1, 0.6, 0.95)])
    with listening(Scorer) as scorer, listening(bridge.handler_of(scorer)) as url:
        reward = build(f"{url}/score", {}, "rewards.0")
        scores = reward(["a", "b", "c"], images)
    assert [prompt for prompts in asked for prompt in prompts][-3:] == ["a", "b", "c"]
    assert scores[:2].tolist() == pytest.approx([0.1 * 255, 0.6 * 255], abs=2)
    assert torch.isnan(scores[2])


class Studio(BaseHTTPRequestHandler):
    """Label Studio's side: keeps what is imported."""

    tasks: ClassVar[list] = []

    def do_POST(self):
        assert self.headers["Authorization"] == "Token studio"
        self.tasks.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(201)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


def annotated(number, task, selected):
    result = [{"type": "pairwise", "from_name": "choice", "value": {"selected": selected}}]
    if selected == "tie":
        result = [{"type": "choices", "from_name": "tie", "value": {"choices": ["tie"]}}]
    return {"annotation": {"id": number, "result": result, "lead_time": 1.5}, "task": {"id": number, **task}}


def test_label_studio_annotates_undoes_and_trains(run):
    _, client = run
    module = load("label_studio/backend.py")
    Studio.tasks = []
    with listening(Studio) as studio:
        bridge = module.Bridge(client, httpx.Client(base_url=studio, headers={"Authorization": "Token studio"}), 7, 3)
        first = bridge.import_round()
        with listening(module.handler_of(bridge)) as url, httpx.Client(base_url=url) as label_studio:
            tasks = list(Studio.tasks)
            assert len(tasks) == 3
            assert all(task["data"]["left"].startswith("data:image/png;base64,") for task in tasks)
            assert label_studio.get("/health").json()["status"] == "UP"
            assert "model_version" in label_studio.post("/setup", json={"project": "7.1"}).json()
            predicted = label_studio.post("/predict", json={"tasks": tasks}).json()["results"]
            assert [p["result"] for p in predicted] == [[], [], []]

            def tell(action, body):
                response = label_studio.post("/webhook", json={"action": action, **body})
                assert response.status_code == 201
                return response.json()

            for number, (task, selected) in enumerate(zip(tasks, ("left", "right", "tie"), strict=True)):
                tell("ANNOTATION_CREATED", annotated(number, task, selected))
            assert client.round(first)["labelled"] == 3
            tell("ANNOTATION_UPDATED", annotated(0, tasks[0], "right"))
            tell("ANNOTATION_DELETED", {"annotation": {"id": 1}})
            assert client.round(first)["labelled"] == 2
            trained = tell("START_TRAINING", {})
        assert client.round(first)["state"] == "trained"
        assert trained["next_round"] != first
        assert len(Studio.tasks) == 6
        bridge._studio.close()


def stub_of_ai_toolkit(config, name):
    """What the extension uses of ai-toolkit, after its public interface."""

    class Extension:
        name = uid = None

    class BaseExtensionProcess:
        def __init__(self):
            self.job = types.SimpleNamespace(name=name)

        def get_conf(self, key, default=None, required=False):
            assert not required or key in config
            return config.get(key, default)

    toolkit, jobs = types.ModuleType("toolkit.extension"), types.ModuleType("jobs.process")
    toolkit.Extension, jobs.BaseExtensionProcess = Extension, BaseExtensionProcess
    return {"toolkit": types.ModuleType("toolkit"), "toolkit.extension": toolkit, "jobs": types.ModuleType("jobs"),
            "jobs.process": jobs}  # fmt: skip


@pytest.mark.slow
def test_an_ai_toolkit_job_trains_samples_and_reports(tmp_path, monkeypatch):
    database = tmp_path / "aitk_db.db"
    with sqlite3.connect(database) as db:
        db.execute("CREATE TABLE Job (id TEXT, status TEXT, info TEXT, step INTEGER, total_steps INTEGER, "
                   "speed_string TEXT, stop INTEGER, save_now INTEGER, sample_now INTEGER)")  # fmt: skip
        db.execute("INSERT INTO Job VALUES ('j1', 'queued', '', 0, 0, '', 0, 1, 1)")
    config = {"config": "shapes", "overrides": settings(tmp_path / "unused")[1:], "sqlite_db_path": str(database),
              "training_folder": str(tmp_path), "sample_prompts": ["a red circle"]}  # fmt: skip
    for module, stub in stub_of_ai_toolkit(config, "job").items():
        monkeypatch.setitem(sys.modules, module, stub)
    monkeypatch.setenv("AITK_JOB_ID", "j1")
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    (extension,) = load("ai_toolkit_fdfo/__init__.py").AI_TOOLKIT_EXTENSIONS
    extension.get_process()().run()
    with sqlite3.connect(database) as db:
        row = db.execute("SELECT status, info, step, total_steps, stop, save_now, sample_now FROM Job").fetchone()
        (speed,) = db.execute("SELECT speed_string FROM Job").fetchone()
    assert row == ("completed", "Training completed", 3, 3, 0, 0, 0)
    assert speed.endswith("/sec")
    assert len(list((tmp_path / "job/samples").glob("*.png"))) == 2  # as asked, and at the end
    report = (tmp_path / "job/plugin.html").read_text()
    assert "<html" in report
    assert "http://" not in report.replace("http://www.w3.org", "")


def test_a_client_that_shares_no_code_trains_and_fetches_a_pipeline_that_loads(run, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    folder, client = run
    demo = load("httpx_demo.py")
    server = demo.Server(folder)
    assert len(demo.train(server, 1)) == 1
    demo.fetch(server, tmp_path / "exported")
    server.http.close()
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "exported", text_encoder_3=None, tokenizer_3=None)
    (exported,) = [name for name in client.checkpoints() if name == client.run()["last_checkpoint"]]
    weights = load_file(folder / "checkpoints" / exported / "ema.safetensors")
    held = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(held[name.removeprefix("transformer.")].float(), w) for name, w in weights.items())


def test_the_demo_is_short_and_imports_nothing_of_ours():
    text = (EXAMPLES / "httpx_demo.py").read_text()
    assert len(text.splitlines()) < 100
    assert "import fdfo" not in text
    assert "from fdfo" not in text
