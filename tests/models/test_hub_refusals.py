"""Each refusal of the hub has a message of its own, with its way out; the hub here is a small one over HTTP."""

import huggingface_hub.constants
import pytest
from engine.launching import free_port
from fake_hub import hub_of, point_at
from tiny_sd3 import tiny_config

from fdfo_engine.models.registry import locate_base
from fdfo_engine.rewards import build
from fdfo_engine.rollout.prompt_sets import PromptSet, local_files
from fdfo_engine.runtime.errors import EnvironmentProblem, PromptError

NAME = "owner/model"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_of(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def config_of(tmp_path, **model):
    return tiny_config(tmp_path, tmp_path / "run", model={"id": NAME, **model})


def refused(tmp_path, **model):
    with pytest.raises(EnvironmentProblem) as caught:
        locate_base(config_of(tmp_path, **model))
    message = str(caught.value)
    assert message.startswith(f"model.id = '{NAME}': ")
    assert "\n" not in message
    return message


def test_a_gated_model_is_refused_then_found(hub, tiny_sd3, tmp_path, monkeypatch):
    hub.folders[NAME], hub.gated = tiny_sd3, {NAME}
    message = refused(tmp_path)
    for words in ("gated, and you are not logged in", f"{hub.url}/{NAME}", "hf auth login", "HF_TOKEN"):
        assert words in message
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.tokens = {"hf_mine"}
    message = refused(tmp_path)
    for words in ("the account of your token has no access", f"{hub.url}/{NAME}", "hf auth whoami"):
        assert words in message
    hub.members = {"hf_mine"}
    base = locate_base(config_of(tmp_path))
    assert (base.name, base.commit) == (NAME, hub.commit)
    assert (base.folder / "transformer/config.json").read_bytes() == (tiny_sd3 / "transformer/config.json").read_bytes()


def test_a_token_that_the_hub_does_not_know(hub, tiny_sd3, tmp_path, monkeypatch):
    hub.folders[NAME] = tiny_sd3
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    message = refused(tmp_path)
    assert "does not know the token that HF_TOKEN set" in message
    assert "settings/tokens" in message
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "cache").mkdir(exist_ok=True)
    (tmp_path / "cache/token").write_text("hf_old")
    assert "does not know the token that `hf auth login` set" in refused(tmp_path)


def test_a_name_that_is_not_there(hub, tmp_path, monkeypatch):
    message = refused(tmp_path)
    assert "no such repository on the hub, or a private one that needs a login" in message
    assert f"check the name at {hub.url}/{NAME}" in message
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    hub.tokens = {"hf_mine"}
    assert "a private one that your token may not read" in refused(tmp_path)


def test_a_branch_that_is_not_there(hub, tiny_sd3, tmp_path):
    hub.folders[NAME] = tiny_sd3
    assert "no branch, tag or commit 'fp8'" in refused(tmp_path, revision="fp8")


def test_a_repository_without_a_pipeline_is_told(hub, tmp_path):
    (tmp_path / "folder").mkdir()
    hub.folders[NAME] = tmp_path / "folder"
    assert "its repository has no model_index.json" in refused(tmp_path)


def test_no_network_is_told_at_the_first_try(monkeypatch, tmp_path, caplog, capfd):
    url = f"http://127.0.0.1:{free_port()}"
    point_at(monkeypatch, url, tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s to ask again"))
    message = refused(tmp_path)
    for words in (f"{url} was not reached", "HTTPS_PROXY", f"hf download {NAME}"):
        assert words in message
    assert "Retrying" not in caplog.text + capfd.readouterr().err


def test_offline_asks_nobody(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(tmp_path)
    for words in ("HF_HUB_OFFLINE forbids to ask the hub", str(tmp_path / "cache"), f"hf download {NAME}"):
        assert words in message
    assert hub.asked == []


def test_a_hub_with_an_error_of_its_own(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.status = 503
    assert "(status 503); try again later" in refused(tmp_path)


def test_rewards_and_prompt_sets_tell_the_same(hub, tmp_path, monkeypatch):
    hub.folders[NAME], hub.gated = tmp_path, {NAME}
    reward = build("clip", {"model": NAME}, "rewards.0")
    with pytest.raises(EnvironmentProblem, match=r"owner/model: gated, and you are not logged in.*hf auth login"):
        reward.require_ready()
    with pytest.raises(PromptError, match=r"no such repository on the hub.*/datasets/owner/list"):
        local_files(PromptSet("owner/list", ("a.csv",)), allow_download=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PromptError, match="hf download owner/list --repo-type dataset"):
        local_files(PromptSet("owner/list", ("a.csv",)), allow_download=True)
