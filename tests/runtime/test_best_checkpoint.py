"""Which checkpoint was best: kept in a file of its own, which may be lost without harm."""

import json

from fdfo_engine.runtime.best_checkpoint import Best, forget_best, note_best, read_best


def test_the_best_is_kept_by_its_pointer(tmp_path):
    assert read_best(tmp_path) is None
    assert not note_best(tmp_path, Best("epoch_000001", float("nan"), 0.0))
    assert note_best(tmp_path, Best("epoch_000001", 0.5, 0.1))
    assert not note_best(tmp_path, Best("epoch_000002", 0.5, 0.1))
    assert note_best(tmp_path, Best("epoch_000003", 0.6, 0.1))
    assert read_best(tmp_path) == Best("epoch_000003", 0.6, 0.1)
    forget_best(tmp_path, after="epoch_000003")
    assert read_best(tmp_path) is not None
    forget_best(tmp_path, after="epoch_000002")
    assert read_best(tmp_path) is None, "the run went on from before it"


def test_a_damaged_pointer_is_told_and_ends_nothing(tmp_path, capsys):
    note_best(tmp_path, Best("epoch_000001", 0.5, 0.1))
    file = tmp_path / "best.json"
    file.write_text(file.read_text().replace("0.5", "0.9"))
    assert read_best(tmp_path) is None
    assert "which checkpoint was best is not known" in capsys.readouterr().err
    assert note_best(tmp_path, Best("epoch_000002", 0.1, 0.1))


def test_what_is_of_another_form_is_told_and_not_believed(tmp_path, capsys):
    (tmp_path / "best.json").write_text(json.dumps({"name": "epoch_000001"}))
    assert read_best(tmp_path) is None
    assert "which checkpoint was best is not known" in capsys.readouterr().err
    forget_best(tmp_path / "nowhere", after="epoch_000001")
    assert str(Best("epoch_000003", 0.61239, 0.0123)) == "epoch_000003, held-out reward 0.6124 ±0.012"
