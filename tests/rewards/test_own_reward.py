"""A user's own reward: found in the working folder and the config's, announced, its mistakes shown in its own code."""

import importlib
import json
import sys

import pytest
import torch
from tiny_sd3 import tiny_config

from fdfo_engine.config import RewardConfig
from fdfo_engine.loop import run
from fdfo_engine.rewards import WeightedRewards, build
from fdfo_engine.runtime import own_code
from fdfo_engine.runtime.errors import RewardError, UsageError

IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)
REDNESS = """
import helper_of_mine

def redness(prompts, images, factor=1.0):
    return helper_of_mine.mean(images[:, 0]) * factor
"""
CRASHES = """
def crash(prompts, images):
    return inner(images)

def inner(images):
    raise ValueError("oh no")
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No module or folder of a test is there for the next."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(own_code, "_more_folders", [])
    before = set(sys.modules)
    own_code._module_of_file.cache_clear()
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("my_reward", "helper_of_mine", "mine", "broken", "zipfile_", "own_json"):
            del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with a reward in it."""
    here = tmp_path / "here"
    here.mkdir()
    (here / "my_reward.py").write_text(REDNESS)
    (here / "helper_of_mine.py").write_text("def mean(x):\n    return x.flatten(1).mean(1)\n")
    monkeypatch.chdir(here)
    return here


def red(name, **options):
    return build(name, options, "rewards.0.name")(["a", "b"], IMAGES)


@pytest.mark.parametrize("name", ["my_reward:redness", "my_reward.py:redness", "./my_reward.py:redness"])
def test_it_is_found_in_the_working_folder_and_announced(folder, capsys, name):
    assert torch.allclose(red(name, factor=2.0), 2 * IMAGES[:, 0].flatten(1).mean(1))
    said = capsys.readouterr().out
    assert said == f"will import my_reward from {folder / 'my_reward.py'}, as the settings say\n"
    red(name)
    assert capsys.readouterr().out == "", "once"


@pytest.mark.parametrize("name", ["my_reward:redness", "./my_reward.py:redness"])
def test_it_is_found_beside_the_config(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"rewards\.0\.name"):
        build(name, {}, "rewards.0.name")
    own_code.search_in(folder)
    assert red(name).shape == (2,)


def test_it_may_lie_in_a_package_or_anywhere(folder, tmp_path, monkeypatch):
    (folder / "mine").mkdir()
    (folder / "mine" / "own_json.py").write_text("def one(p, x):\n    return [1.0] * len(p)\n")
    assert red("mine.own_json:one") == [1.0, 1.0]
    monkeypatch.chdir(tmp_path)
    assert red(f"{folder}/my_reward.py:redness").shape == (2,)
    monkeypatch.setenv("HOME", str(folder))
    assert red("~/my_reward.py:redness").shape == (2,)


def test_a_file_may_be_named_like_a_module_that_exists(folder):
    (folder / "json.py").write_text("def one(p, x):\n    return [1.0] * len(p)\n")
    assert red("./json.py:one") == [1.0, 1.0]
    assert json.loads("1") == 1
    with pytest.raises(UsageError, match=r"json.* has no 'one'; for .*json\.py take \./json\.py:ATTRIBUTE"):
        red("json:one")


def test_a_process_of_its_own_finds_it_too(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_code.search_in(folder)
    rewards = WeightedRewards.from_config([RewardConfig(name="./my_reward.py:redness", kill_after_s=60.0)])
    (scores,) = rewards(["a", "b"], IMAGES).values()
    rewards.cancel()
    assert torch.allclose(scores, IMAGES[:, 0].flatten(1).mean(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(p, x:\n    pass\n", r"SyntaxError.*broken\.py:1"),
        ("import torch\n\nvalue = undefined_name\n", r"NameError: .*undefined_name.*broken\.py:3, in <module>"),
        ("import no_such_package\n", r"No module named 'no_such_package'.*broken\.py:1"),
        ("f = 3\n", "is a int, takes something to call"),
        ("g = 3\n", r"broken\.py has no 'f'"),
        (
            "class f:\n    def __init__(self):\n        open('/no/such')\n",
            r"cannot be made: FileNotFoundError.*broken\.py:3",
        ),
    ],
)
@pytest.mark.parametrize("name", ["broken:f", "./broken.py:f"])
def test_a_mistake_in_it_is_shown_with_its_line(folder, text, message, name):
    (folder / "broken.py").write_text(text)
    with pytest.raises(UsageError, match=rf"(?s)rewards\.0\.name = '{name}'.*{message}"):
        red(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be_found:f", r"No module named 'nowhere_to_be_found'; looked on Python's path and in .*here"),
        ("./nowhere.py:f", r"no such file; looked for .*here/nowhere\.py"),
        ("my_reward.py", r"is a file; takes one of its functions or classes, my_reward\.py:NAME"),
        (":f", "rewards.0.name"),
        ("my_reward:", "has no ''"),
    ],
)
def test_what_is_not_there_is_told_with_where_it_was_looked_for(folder, name, message):
    with pytest.raises(UsageError, match=message):
        red(name)


def test_weight_is_one_unless_given_and_a_slip_is_no_option():
    assert RewardConfig(name="brightness").weight == 1.0
    assert RewardConfig(name="mine", height=3).model_extra == {"height": 3}
    with pytest.raises(ValueError, match="weight: missing; is 'weigth' a slip for it"):
        RewardConfig(name="brightness", weigth=2.0)
    with pytest.raises(ValueError, match="normalize: missing; is 'normalise' a slip for it"):
        RewardConfig(name="brightness", normalise="std")
    assert RewardConfig(name="mine", weight=1.0, weights=[2]).model_extra == {"weights": [2]}


@pytest.mark.parametrize("kill_after_s", [None, 60.0])
def test_an_exception_is_shown_once_with_its_own_traceback(folder, capsys, kill_after_s):
    (folder / "my_reward.py").write_text(CRASHES)
    settings = RewardConfig(name="my_reward:crash", kill_after_s=kill_after_s)
    rewards = WeightedRewards.from_config([settings], folder / "logs")
    capsys.readouterr()
    for _ in range(3):
        assert torch.isnan(rewards(["a", "b"], IMAGES)["my_reward:crash"]).all()
    rewards.cancel()
    told, place = capsys.readouterr().err, f'File "{folder}/my_reward.py", line 6, in inner'
    assert told.count(place) == 1
    assert told.count("\nValueError: oh no\n") == 1
    assert "trying once more" in told
    assert "no opinion on this batch" in told
    assert "weighted.py" not in told
    assert "isolated.py" not in told
    assert rewards.last_failure == {"my_reward:crash": f"ValueError: oh no ({folder}/my_reward.py:6, in inner)"}
    assert (folder / "logs" / "reward_my_reward_crash.log").read_text().count(place) == 6


def test_another_exception_is_told_too(folder, capsys):
    (folder / "my_reward.py").write_text("def crash(p, x):\n    raise (OSError if x.mean() > 1 else IndexError)('!')\n")
    rewards = WeightedRewards.from_config([RewardConfig(name="my_reward:crash")])
    for images, told, silent in ((IMAGES, "IndexError: !", "OSError: !"), (IMAGES + 1, "OSError: !", "IndexError: !")):
        rewards(["a", "b"], images)
        said = capsys.readouterr().err
        assert told in said
        assert silent not in said


def test_its_answer_to_a_question_may_fail_too(folder):
    (folder / "my_reward.py").write_text(
        "from fdfo_engine.rewards import Reward\n\nclass Mine(Reward):\n"
        "    def require_ready(self):\n        raise KeyError('token')\n"
        "    def require_prompts(self, prompts):\n        raise OSError('file')\n"
    )
    rewards = WeightedRewards.from_config([RewardConfig(name="my_reward:Mine")])
    with pytest.raises(
        RewardError, match=r"reward 'my_reward:Mine': KeyError: 'token' \(.*my_reward\.py:5, in require_ready"
    ):
        rewards.require_ready()
    with pytest.raises(RewardError, match=r"OSError: file \(.*my_reward\.py:7"):
        rewards.require_prompts(["a"])


def test_the_status_says_what_it_raised(folder, tiny_sd3, tmp_path, capsys):
    (folder / "my_reward.py").write_text(CRASHES)
    config = tiny_config(tiny_sd3, tmp_path / "run", rewards=[{"name": "./my_reward.py:crash"}])
    with pytest.raises(RewardError, match="have no reward"):
        run(config)
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["exit_code"] == 5
    assert f"its last exception: ValueError: oh no ({folder}/my_reward.py:6, in inner)" in status["message"]
    assert capsys.readouterr().err.count("line 6, in inner") == 1
