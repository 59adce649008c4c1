"""A model family of one's own is found as a reward of one's own is."""

import sys

import pytest

from fdfo_engine.config import load_config
from fdfo_engine.models import registry
from fdfo_engine.runtime import own_code
from fdfo_engine.runtime.errors import UsageError


@pytest.mark.parametrize("name", ["family_of_mine:Mine", "./family_of_mine.py:Mine"])
def test_it_lies_in_the_working_folder(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "family_of_mine.py").write_text("class Mine:\n    word = 'mine'\n")
    own_code._module_of_file.cache_clear()
    config = load_config("shapes", [f"model.family={name}"])
    assert registry._loader(config, "anything").word == "mine"
    assert "will import family_of_mine from" in capsys.readouterr().out
    (tmp_path / "family_of_mine.py").unlink()
    del sys.modules["family_of_mine"]


def test_what_is_wrong_in_it_is_shown_with_its_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "broken_family.py").write_text("\nundefined\n")
    with pytest.raises(UsageError, match=r"model\.family = 'broken_family:Mine': NameError.*broken_family\.py:2"):
        registry._loader(load_config("shapes", ["model.family=broken_family:Mine"]), "anything")
