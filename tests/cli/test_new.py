"""`fdfo config` and `fdfo new`: what is shipped can be listed, printed and copied, and the copy runs."""

from itertools import islice

import pytest

from fdfo_engine.cli.main import main
from fdfo_engine.config import bundled_configs, load_config
from fdfo_engine.config.shipped import further_files
from fdfo_engine.rollout.prompts import load_prompts
from fdfo_engine.runtime.own_code import own_callable, search_in
from fdfo_engine.training.preflight import preflight


def test_every_config_is_listed_with_what_it_says_of_itself(capsys):
    assert main(["config"]) == 0
    out = capsys.readouterr().out
    for name in bundled_configs():
        line = next(line for line in out.splitlines() if line.startswith(f"{name} "))
        assert len(line.split()) > 4
    for name in ("cluster/slurm.sbatch", "examples/reward_server.py"):
        assert name in out


@pytest.mark.parametrize("words", [["show", "sd35m_16gb"], ["sd35m_16gb"]])
def test_a_config_is_printed_as_it_stands(words, capsys):
    assert main(["config", *words]) == 0
    assert capsys.readouterr().out == bundled_configs()["sd35m_16gb"].read_text()


def test_every_further_file_is_printed(capsys):
    for name, file in further_files().items():
        assert main(["config", "show", name]) == 0
        assert capsys.readouterr().out.rstrip("\n") == file.read_text().rstrip("\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["config", "show", "sd35m_16g"], "did you mean sd35m_16gb?"),
        (["config", "show"], "takes list, or show NAME"),
        (["config", "a", "b"], "takes list, or show NAME"),
        (["new", "FOLDER", "--from", "nothing"], "no such config; takes flux1_dev"),
    ],
)
def test_a_mistake_is_a_line(words, says, tmp_path, capsys):
    assert main([word.replace("FOLDER", str(tmp_path / "mine")) for word in words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()


@pytest.mark.parametrize("name", sorted(bundled_configs()))
def test_a_copy_says_what_the_original_says_but_for_its_folder_and_prompts(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = f"my {name}"  # a space, as in many people's folders
    assert main(["new", folder, "--from", name]) == 0
    assert f"fdfo train '{folder}/config.yaml' --dry-run" in capsys.readouterr().out
    copy, original = load_config(f"{folder}/config.yaml"), load_config(name)
    assert copy.run.dir == f"runs/{folder}"
    back = {"run": original.run, "prompts": original.prompts, "evaluation": original.evaluation}
    assert copy.model_copy(update=back) == original
    if original.model.id == "shapes":
        assert copy.prompts == original.prompts
        return
    prompts, evaluation = islice(preflight(copy), 2)
    assert prompts.exit_code == evaluation.exit_code == 0
    assert prompts.text.startswith("336 prompts")
    assert "64 of 64" in evaluation.text
    (tmp_path / folder / "prompts.txt").write_text("a line of mine\n")
    assert load_prompts(copy.prompts, 0).prompts == ["a line of mine"]


def test_the_reward_of_a_copy_scores(tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    assert main(["new", "mine"]) == 0
    search_in(tmp_path / "mine")
    reward = own_callable("./my_reward.py:redness", "rewards.0.name")
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 1.0
    assert reward(["a", "b"], images).tolist() == [0.0, 1.0]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "kept.txt").write_text("kept")
    assert main(["new", str(tmp_path)]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]
