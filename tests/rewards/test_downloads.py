"""Nothing is fetched silently: refused where it is not allowed, said where it is; what is here needs no hub."""

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from rewards.tiny_clip import build_tiny_clip
from transformers import AutoModelForImageTextToText, AutoModelForZeroShotObjectDetection

from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.rewards.model_options import Source, loaded, read_auto
from fdfo_engine.runtime.errors import EnvironmentProblem, RewardError

IMAGES = torch.rand(1, 3, 40, 40, generator=torch.Generator().manual_seed(0))
ON_HUB = {
    "pickscore": {}, "clip": {}, "hpsv2": {}, "aesthetic": {}, "vlm": {}, "vlm_alignment": {},
    "vlm_quality": {}, "vlm_photorealism": {}, "geneval": {},
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub whose every request is an error of the test."""
    import huggingface_hub.constants

    requests = []

    def refuse(*arguments, **more):
        if not any("agent-harnesses" in str(a) for a in arguments):  # what huggingface_hub asks for its own user agent
            requests.append((arguments, more))
        raise ConnectionError("asked the hub")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.file_download.get_hf_file_metadata", refuse)
    monkeypatch.setattr("httpx2.Client.send", refuse)
    return requests


def options(name, tmp_path, **more):
    if name == "geneval":
        (tmp_path / "m.jsonl").write_text('{"prompt": "a cat", "include": [{"class": "cat"}]}')
        more["metadata"] = str(tmp_path / "m.jsonl")
    return {"model": "fdfo-tests/no-such-model", **more}


@pytest.mark.parametrize("name", ON_HUB)
def test_without_leave_the_hub_is_not_asked(name, hub, tmp_path):
    rewards = WeightedRewards({name: (1.0, build(name, options(name, tmp_path), "rewards.0"))})
    rewards.forbid_downloads()
    with pytest.raises(EnvironmentProblem, match=r"no-such-model.*--allow-download"):
        rewards.require_ready()
    with pytest.raises(EnvironmentProblem, match="nothing is fetched unasked"):
        rewards(["a cat"], IMAGES)
    own = build(name, options(name, tmp_path, allow_download=False), "rewards.0")
    with pytest.raises(EnvironmentProblem, match="nothing is fetched unasked"):
        own(["a cat"], IMAGES)
    assert hub == []


@pytest.mark.parametrize("kind", [AutoModelForZeroShotObjectDetection, AutoModelForImageTextToText])
def test_an_auto_class_asks_for_no_adapter(kind, hub):
    with pytest.raises(OSError, match="find them in the cached files"):
        read_auto(kind, "float32")("fdfo-tests/no-such-model", revision="main", local_files_only=True)
    assert hub == []


def test_a_folder_needs_no_leave(hub, tmp_path):
    folder = str(build_tiny_clip(tmp_path / "clip"))
    rewards = WeightedRewards({"clip": (1.0, build("clip", {"model": folder}, "rewards.0"))})
    rewards.forbid_downloads()
    rewards.require_ready()
    assert torch.isfinite(rewards(["a cat"], IMAGES)["clip"]).all()
    assert hub == []


def test_what_is_fetched_is_said(capsys):
    calls = []

    def read(model, *, revision, local_files_only):
        calls.append((model, revision, local_files_only))
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        return "network"

    assert loaded("CLIP model", Source("owner/name", "main", True), read) == "network"
    assert calls == [("owner/name", "main", True), ("owner/name", "main", False)]
    assert "fetching the CLIP model of owner/name from huggingface.co" in capsys.readouterr().out


def test_what_is_here_is_taken_in_silence(capsys):
    assert loaded("CLIP model", Source("owner/name", "v1", True), lambda model, **how: how) == {
        "revision": "v1", "local_files_only": True,
    }  # fmt: skip
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("model", ["/no/such/folder", "a/b/c", "./here"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(model, capsys):
    def read(model, **how):
        assert how["local_files_only"]
        raise OSError("no file config.json")

    with pytest.raises(RewardError, match="cannot load"):
        loaded("CLIP model", Source(model, "main", True), read)
    assert "fetching" not in capsys.readouterr().out
