"""Small local files in the formats of the known sets; a hub that only gives what was allowed."""

import json
from pathlib import Path

import huggingface_hub
import pytest

from fdfo_engine.config import PromptsConfig
from fdfo_engine.rollout import prompt_sets
from fdfo_engine.rollout.prompt_sets import PROMPT_SETS
from fdfo_engine.rollout.prompts import MAX_PROMPT_BYTES, load_prompts
from fdfo_engine.runtime.errors import EnvironmentProblem, PromptError

NASTY = 'a "quoted" cat, on\u2028two <b>lines</b>'


def load(source, **options):
    return load_prompts(PromptsConfig(source=str(source), **options), 0).prompts


def write_parti(folder):
    rows = ["Prompt\tCategory\tChallenge\tNote", "bond\tAbstract\tBasic\tBiology-inspired concepts",
            '"a ""red"" cube"\tArts\tBasic\t', "\tArts\tBasic\tempty", "ein Bär\tAnimals\tBasic\t"]  # fmt: skip
    (folder / "PartiPrompts.tsv").write_text("\n".join(rows), encoding="utf-8")
    return ["bond", '"a ""red"" cube"', "ein Bär"]  # a .tsv file has no quoting


def write_drawbench(folder):
    (folder / "drawbench.csv").write_text('Prompts,Category\n"A red car, and a dog.",Colors\nfoo,Text\n')
    return ["A red car, and a dog.", "foo"]


def write_hpdv2(folder):
    (folder / "benchmark").mkdir()
    for style in ("anime", "concept-art", "paintings", "photo", "unwanted"):
        (folder / "benchmark" / f"{style}.json").write_text(json.dumps([f"{style} one", f" {NASTY} ", ""]))
    return [p for s in ("anime", "concept-art", "paintings", "photo") for p in (f"{s} one", NASTY)]


def write_pickscore(folder):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [parquet]")
    from pyarrow import parquet

    (folder / "data").mkdir()
    for name, captions in (
        ("test-00000-of-00002", ["one", "two"]),
        ("test-00001-of-00002", ["two"]),
        ("train-0", ["no"]),
    ):
        table = pyarrow.table({"caption": captions, "label_0": [0.5] * len(captions)})
        parquet.write_table(table, folder / "data" / f"{name}.parquet")
    return ["one", "two", "two"]


WRITERS = {"parti": write_parti, "drawbench": write_drawbench, "hpdv2": write_hpdv2, "pickscore": write_pickscore}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub whose datasets are folders here; it keeps what it was asked, and has cached what it was let fetch."""
    asked, cached = [], set()

    def snapshot_download(repo, *, repo_type, allow_patterns, local_files_only):
        assert repo_type == "dataset"
        asked.append((repo, tuple(allow_patterns), local_files_only))
        if local_files_only and repo not in cached:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        cached.add(repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_every_set_has_a_writer():
    assert set(WRITERS) == set(PROMPT_SETS)


@pytest.mark.parametrize("name", WRITERS)
def test_a_set_is_fetched_only_if_allowed_and_then_read_from_the_cache(name, tmp_path, hub):
    expected = WRITERS[name](tmp_path)
    known = PROMPT_SETS[name]
    with pytest.raises(PromptError, match="nothing is fetched unasked") as caught:
        load(name)
    assert known.repo in str(caught.value)
    assert known.files[0] in str(caught.value)
    assert hub == [(known.repo, known.files, True)], "only the cache was looked at"
    assert load(name, allow_download=True) == expected
    assert load(name) == expected
    assert [local for _, _, local in hub] == [True, False, True]


def test_a_part_of_a_set_does_not_pass_for_the_whole(tmp_path, hub):
    """As an interrupted fetch leaves it: the hub's client gives the folder without a word."""
    write_hpdv2(tmp_path)
    assert len(load("hpdv2", allow_download=True)) == 8
    (tmp_path / "benchmark" / "photo.json").unlink()
    with pytest.raises(PromptError, match="this would fetch"):
        load("hpdv2")
    with pytest.raises(PromptError, match=r"zhwang/HPDv2 has no benchmark/photo\.json$"):
        load("hpdv2", allow_download=True)
    for number in (0, 2):
        (tmp_path / f"part-0000{number}-of-00003.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(PromptError, match=r"has no part-00001-of-00003\.jsonl$"):
        load("hub:some/where/part-*.jsonl", allow_download=True)
    assert load("hub:some/where/part-0000[02]*.jsonl", allow_download=True) == ["a", "a"], "as asked"


def test_of_what_the_hub_client_says_the_first_line_is_told(monkeypatch):
    def refuses(*_, **__):
        raise huggingface_hub.errors.HFValidationError("first line\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuses)
    monkeypatch.setattr(prompt_sets, "hub_reason", lambda *_, **__: None)
    with pytest.raises(PromptError, match=r"could not fetch .* of the dataset some/where .*: first line$"):
        load("hub:some/where", allow_download=True)


@pytest.mark.parametrize(("there", "missing"), [((1, 2), [0]), ((0, 1), [2]), ((1,), [0, 2]), ((0, 1, 2), [])])
def test_each_numbered_part_of_a_table_is_asked_for(there, missing):
    parts = [f"data/part-{number:05d}-of-00003.parquet" for number in range(3)]
    found = prompt_sets.PromptSet("some/where", ("data/part-*.parquet", "more.json"))
    names = [*(parts[number] for number in there), "more.json"]
    assert prompt_sets._missing(found, names) == [parts[number] for number in missing]
    assert prompt_sets._missing(found, names[:-1]) == [*(parts[number] for number in missing), "more.json"]
    assert prompt_sets._missing(found, []) == ["data/part-*.parquet", "more.json"]


def test_what_the_hub_gives_in_folders_is_read(tmp_path, hub):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.csv").write_text("prompt\na\n")
    (tmp_path / "README.md").write_text("words")
    assert load("hub:some/where", allow_download=True) == ["a"]


def test_any_dataset_of_the_hub_by_id(tmp_path, hub):
    write_drawbench(tmp_path)
    assert load("hub:some/where/drawbench.csv", column="Category", allow_download=True) == ["Colors", "Text"]
    assert hub[-1][:2] == ("some/where", ("drawbench.csv",))
    with pytest.raises(PromptError, match=r"has no nothing\.csv"):
        load("hub:some/where/nothing.csv", allow_download=True)
    with pytest.raises(PromptError, match="hub:OWNER/NAME"):
        load("hub:some")


def test_an_empty_cache_of_the_real_hub_client_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PromptError, match=r"would fetch benchmark/anime\.json.* of the dataset zhwang/HPDv2"):
        load("hpdv2")
    assert list(tmp_path.iterdir()) == []


def test_geneval_is_a_local_file(tmp_path):
    lines = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {"tag": "counting", "include": [{"class": "cup", "count": 3}], "prompt": "a photo of three cups"},
    ]
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    assert load(path) == ["a photo of a cat", "a photo of three cups"]
    with pytest.raises(PromptError, match=r"evaluation_metadata\.jsonl"):
        load("geneval")


def test_local_files_of_every_format(tmp_path):
    expected = write_parti(tmp_path), write_drawbench(tmp_path)
    assert load(tmp_path / "PartiPrompts.tsv", column="Prompt") == expected[0]
    assert load(tmp_path / "drawbench.csv", column="Prompts") == expected[1]
    objects = tmp_path / "test.json"
    objects.write_text(json.dumps([{"prompt": NASTY, "image_path": ["x"]}, {"prompt": "b"}]))
    assert load(objects) == [NASTY, "b"]
    assert load(tmp_path / "drawbench.csv", column="Category", dedup=True) == ["Colors", "Text"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.csv", "Prompts,Category\nx,y\n", "row 1: no text under prompts.column = 'prompt'; it has .*'Prompts'"),
        ("a.json", "{", "not JSON"),
        ("a.json", '{"prompt": "x"}', "takes a list"),
        ("a.json", "[3]", "row 1.*int"),
        ("a.json", "[]", "0 usable prompts in 0 rows"),
        ("a.tsv", "prompt\n" + "x" * (MAX_PROMPT_BYTES + 1), "at most"),
        ("a.parquet", "no table", "parquet"),
    ],
)
def test_what_cannot_be_read_is_named(name, text, words, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises((PromptError, EnvironmentProblem), match=words):
        load(path)


def test_a_file_of_a_sets_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("parti").write_text("mine\n")
    assert load("parti") == ["mine"]
    assert prompt_sets.named_set("unknown", "prompt") is None


def test_the_set_that_comes_with_the_engine_is_two_lists():
    settings = PromptsConfig(source="starter")
    trained, held_out = (load_prompts(settings, 0, split=split).prompts for split in ("train", "heldout"))
    assert (len(trained), len(held_out)) == (336, 64)
    plain = [prompt.casefold() for prompt in (*trained, *held_out)]
    assert len(set(plain)) == 400, "no line twice, nor in both"
    assert all(3 <= len(prompt.split()) <= 20 for prompt in plain)


def test_a_source_that_is_not_there_names_the_sets():
    with pytest.raises(PromptError, match=r"no such file .*Sets by name: starter, pickscore"):
        load("data/prompts.txt")
