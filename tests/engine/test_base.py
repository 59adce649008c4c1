"""A run is held to its base model, by content: another one is refused before it is loaded, wherever it lies."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fake_hub import publish, use_cache
from safetensors.torch import load_file, save_file
from tiny_sd3 import PROMPTS, tiny_config

from fdfo_engine import Engine
from fdfo_engine.cli.main import main
from fdfo_engine.config import dump_config
from fdfo_engine.runtime.base_record import recorded_base
from fdfo_engine.runtime.checkpoint import CheckpointStore
from fdfo_engine.runtime.errors import CheckpointError
from fdfo_engine.runtime.run_checkpoints import RunCheckpoints

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
REWARDS = [[0.0, 1.0], [1.0, 0.0], [0.5, 0.25], [0.0, 1.0]]


def settings(folder, **sections):
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    prompts = {"source": str(folder / "prompts.txt")}
    return tiny_config(folder / "base", folder / "run", prompts=prompts, update={"ema": 0.5}, **sections)


def started(config, *, records=True):
    """A run of one epoch, by the library; its config lies beside its folder."""
    engine = Engine(config)
    engine.update(engine.rollout(PROMPTS), REWARDS)
    if not records:  # as versions did that knew no record
        engine.checkpoints = RunCheckpoints(config, None, {})
    engine.save()
    run = Path(config.run.dir)
    (run.parent / "config.yaml").write_text(dump_config(config))
    return run


@pytest.fixture(scope="module")
def runs(tiny_sd3, tmp_path_factory):
    """Folders with a base, a run on it that recorded it or not, and the run's config: made once, for copies."""
    made = {}
    for records in (True, False):
        made[records] = tmp_path_factory.mktemp("made")
        shutil.copytree(tiny_sd3, made[records] / "base")
        started(settings(made[records]), records=records)
    return made


def copied(made, folder):
    shutil.copytree(made, folder, dirs_exist_ok=True)
    for file in (folder / "config.yaml", folder / "run/config.yaml"):
        file.write_text(file.read_text().replace(str(made), str(folder)))
    return folder / "run"


@pytest.fixture
def run(runs, tmp_path):
    return copied(runs[True], tmp_path)


@pytest.fixture
def old_run(runs, tmp_path):
    """Of a version that recorded no base."""
    return copied(runs[False], tmp_path)


@pytest.fixture
def base(tmp_path):
    return tmp_path / "base"


def scale(base, part=WEIGHTS):
    weights = {name: 1.25 * weight for name, weight in load_file(base / part).items()}
    save_file(weights, base / part, metadata={"format": "pt"})


def words(verb, run, *more):
    """The command line of `verb` on the run."""
    out = run.parent / f"out_{verb}"
    few = ["--prompt", "a cat", "--steps", "1"] if verb == "generate" else []
    if verb == "evaluate":
        (run.parent / "list.txt").write_text("a cat")
        few = ["--prompts", str(run.parent / "list.txt"), "--steps", "1", "--larger", "1", "--metrics", "brightness"]
    given = {
        "train": ["--config", str(run.parent / "config.yaml"), "run.epochs=2", "--ranks", "1"],
        "export": [str(run), str(out)],
    }
    return [verb, *given.get(verb, [str(run), "--out", str(out)]), *few, *more]


VERBS = ("train", "generate", "evaluate", "export")


def never(*_, **__):
    raise AssertionError("weights are read")


def test_the_record_lies_in_run_checkpoint_export_and_card(run, base, tmp_path):
    recorded = recorded_base(run)
    assert WEIGHTS in recorded.files
    (name,) = CheckpointStore(run / "checkpoints").names()
    assert CheckpointStore(run / "checkpoints").load(name).state["base"] == recorded.as_json()
    assert main(words("export", run)) == 0
    out = tmp_path / "out_export"
    assert recorded_base(out) == recorded
    card = (out / "README.md").read_text()
    assert f"SHA-256 of what it is made of: `{recorded.sha256}`" in card


@pytest.mark.parametrize("verb", VERBS)
def test_weights_replaced_in_place_are_refused_before_they_are_loaded(run, base, verb, monkeypatch, capsys):
    monkeypatch.setattr("fdfo_engine.models.pipeline_model.load_pipeline", never)
    scale(base)
    was = recorded_base(run).files[WEIGHTS].sha256
    before = (run / "config.yaml").read_bytes()
    assert main(words(verb, run)) == 7
    error = capsys.readouterr().err
    assert "of another base model: 1 of 18 files differ" in error
    assert f"{WEIGHTS}: " in error
    assert was[:16] in error
    assert (run / "config.yaml").read_bytes() == before
    with pytest.raises(CheckpointError, match="of another base model"):
        Engine.resume(run)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model.safetensors", "text_encoder_2/model.safetensors"])
def test_every_part_counts(run, base, part):
    scale(base, part)
    with pytest.raises(CheckpointError, match=f"1 of 18 files differ\n  {part}: "):
        Engine.resume(run)


def test_the_scheduler_counts_and_a_readme_does_not(run, base):
    (base / "README.md").write_text("# new")
    assert Engine.resume(run).epoch == 1
    file = base / "scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shift": 2.0}))
    with pytest.raises(CheckpointError, match=r"scheduler/scheduler_config\.json"):
        Engine.resume(run)


@pytest.mark.parametrize("verb", VERBS)
def test_a_base_that_moved_is_named(run, base, tmp_path, verb, capsys):
    moved = base.rename(tmp_path / "moved")
    assert main(words(verb, run)) == 3
    assert "--base PATH" in capsys.readouterr().err
    assert main(words(verb, run, "--base", str(moved))) == 0
    scale(moved)
    shutil.rmtree(tmp_path / f"out_{verb}", ignore_errors=True)
    again = [*words(verb, run, "--base", str(moved)), *(["run.epochs=3"] if verb == "train" else [])]
    assert main(again) == 7
    assert WEIGHTS in capsys.readouterr().err


def test_a_run_goes_on_from_a_moved_base_to_the_bit(run, base, tmp_path):
    whole = Engine.resume(run)
    whole.update(whole.rollout(PROMPTS), REWARDS)
    moved = base.rename(tmp_path / "moved")
    engine = Engine.resume(run, base=moved)
    engine.update(engine.rollout(PROMPTS), REWARDS)
    weights = whole.trainer.weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in engine.trainer.weights().items())
    engine.save()
    assert Engine.resume(run).epoch == 2, "the run has kept where its base lies now"


def test_the_setting_may_name_the_new_place_too(run, base, tmp_path, capsys):
    moved = base.rename(tmp_path / "moved")
    assert main(words("train", run, f"model.id={moved}")) == 0
    assert f'model.id: "{base}" there, "{moved}" given' in capsys.readouterr().out
    assert main(words("generate", run)) == 0


def test_another_setting_is_still_refused_as_one(run, capsys):
    assert main(words("train", run, "sampling.steps=2")) == 2
    assert "made with other settings" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["link", "relative"])
def test_the_same_folder_by_another_name_is_the_same(run, base, tmp_path, place, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(base)
    assert Engine.resume(run, base={"link": tmp_path / "link", "relative": "base"}[place]).epoch == 1


@pytest.fixture
def of_hub(tiny_sd3, base, tmp_path, monkeypatch):
    """A run on `me/tiny` of the hub, and the snapshot that it began with."""
    shutil.copytree(tiny_sd3, base)
    use_cache(monkeypatch, tmp_path / "cache")
    snapshot = publish(tmp_path / "cache", "me/tiny", base)
    return started(settings(tmp_path, model={"id": "me/tiny"})), snapshot


def test_the_hub_moved_on(of_hub, base, tmp_path, capsys):
    run, snapshot = of_hub
    (base / "README.md").write_text("# new")
    publish(tmp_path / "cache", "me/tiny", base)
    assert Engine.resume(run).epoch == 1, "a commit that changes nothing"
    scale(base)
    publish(tmp_path / "cache", "me/tiny", base)
    assert main(words("train", run)) == 7
    error = capsys.readouterr().err
    assert f"recorded: me/tiny at commit {snapshot.name}" in error
    assert f"hf download me/tiny --revision {snapshot.name}" in error
    assert main(words("export", run, "--base", str(snapshot))) == 0
    assert "base_model: me/tiny\n" in (tmp_path / "out_export/README.md").read_text()
    assert f"at commit `{snapshot.name}`" in (tmp_path / "out_export/README.md").read_text()
    assert main(words("train", run, f"model.revision={snapshot.name}")) == 0


def test_a_copy_of_a_hub_model_keeps_its_name_in_exports(of_hub, tmp_path):
    run, snapshot = of_hub
    copied = shutil.copytree(snapshot, tmp_path / "copied")
    assert main(words("export", run, "--base", str(copied))) == 0
    assert "base_model: me/tiny\n" in (tmp_path / "out_export/README.md").read_text()


def test_an_old_run_recorded_nothing_and_goes_on(old_run, base, capsys):
    run = old_run
    assert recorded_base(run) is None
    assert main(words("generate", run)) == 0
    assert "its base model was is not recorded" in capsys.readouterr().out
    assert main(words("train", run)) == 0
    assert capsys.readouterr().out.count("is not recorded") == 1
    assert recorded_base(run).files[WEIGHTS].size == (base / WEIGHTS).stat().st_size
    scale(base)
    assert main(words("train", run, "run.epochs=3")) == 7


def test_an_old_run_whose_base_moved_is_trusted_with_the_option_only(old_run, base, tmp_path, capsys):
    run = old_run
    moved = base.rename(tmp_path / "moved")
    assert main(words("train", run, f"model.id={moved}")) == 2
    assert "model.id" in capsys.readouterr().err
    assert main(words("generate", run, "--base", str(moved))) == 0
    assert main(words("train", run, "--base", str(moved))) == 0
    assert recorded_base(run) is not None
    assert Engine.resume(run).epoch == 2


@pytest.mark.parametrize("damage", [lambda text: "", lambda text: "{}", lambda text: text.replace('"files"', '"f"')])
def test_a_damaged_record_is_told(run, damage):
    file = run / "base.json"
    file.write_text(damage(file.read_text()))
    with pytest.raises(CheckpointError, match=r"base.json: is no record of a base model"):
        Engine.resume(run)


def test_a_changed_record_is_told(run):
    file = run / "base.json"
    content = json.loads(file.read_text())
    content["files"][WEIGHTS][1] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"base.json: the record of its base model is damaged"):
        Engine.resume(run)


def test_a_checkpoint_carried_to_another_run_is_held_to_its_base(run, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    scale(other)
    second = Engine(settings(tmp_path, run={"dir": str(tmp_path / "second")}).with_base(other))
    shutil.copytree(run / "checkpoints", tmp_path / "second/checkpoints")
    with pytest.raises(CheckpointError, match=r"epoch_000001: of another base model: 1 of 18"):
        second.load()
