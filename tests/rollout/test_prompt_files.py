"""What stands in a file of prompts is what is read: rows that do not fit are errors with their number, others count."""

import csv
import json
import subprocess
import sys

import pytest

from fdfo_engine.config import PromptsConfig
from fdfo_engine.rollout.prompts import MAX_PROMPT_BYTES, describe_prompts, load_prompts
from fdfo_engine.runtime.errors import PromptError

NASTY = [
    '"O P E N" painted on a brick wall',
    'say "hi", twice',
    "#1 dad mug",
    "two\u2028lines\u0085or\x0cthree",
    "ein Bär 🐻",
]
TABLE = {
    ".txt": lambda texts: "\n".join(texts),
    ".jsonl": lambda texts: "\n".join(json.dumps({"prompt": t, "id": 1}, ensure_ascii=False) for t in texts),
    ".ndjson": lambda texts: "\n".join(json.dumps(t) for t in texts),
    ".json": lambda texts: json.dumps([{"prompt": t} for t in texts], indent=1),
    ".tsv": lambda texts: "\n".join(["prompt\tnote", *(f"{t}\tx" for t in texts)]),
    ".csv": lambda texts: "\n".join(["prompt,note", *('"' + t.replace('"', '""') + '",x' for t in texts)]),
}


def load(path, text=None, **options):
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_prompts(PromptsConfig(source=str(path), **options), seed=0)


def described(path, text, **options):
    prompts = load(path, text, **options)
    return prompts.prompts, describe_prompts(prompts)


@pytest.mark.parametrize("ending", TABLE)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_every_format_gives_what_stands_there(tmp_path, ending, line_end, mark):
    text = mark + TABLE[ending](NASTY).replace("\n", line_end) + line_end
    assert load(tmp_path / f"p{ending}", text).prompts == NASTY
    assert load(tmp_path / f"Q{ending.upper()}", text).prompts == NASTY


def test_csv_cells_may_hold_line_ends_and_long_rows(tmp_path):
    path = tmp_path / "p.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["image", "prompt"], ["x" * 300_000, "a castle,\non a hill"], ["", 'a "dog"']])
    assert load(path).prompts == ["a castle,\non a hill", 'a "dog"']


def test_an_appended_file_brings_no_byte_order_mark(tmp_path):
    assert load(tmp_path / "p.txt", "\ufeffa cat\n\ufeffa dog\n").prompts == ["a cat", "a dog"]


def test_what_is_left_out_is_counted(tmp_path):
    text = "#1 dad mug\n\n  a cat\n \u200b\u3000\na dog\n"
    assert described(tmp_path / "p.txt", text) == (
        ["#1 dad mug", "a cat", "a dog"],
        "3 prompts (left out: 2 blank; white space around 1 of them dropped; 1 begin with #; "
        "prompts.comments=true leaves such lines out)",
    )
    assert described(tmp_path / "p.txt", text, comments=True) == (
        ["a cat", "a dog"],
        "2 prompts (left out: 2 blank, 1 comments; white space around 1 of them dropped)",
    )
    assert described(tmp_path / "q.txt", "a\na\n", dedup=True)[1] == "1 prompts (left out: 1 repeated)"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.jsonl", '{"prompt": "a red cube"}\n{"prompt": null}\n\n{"prompt": "a blue ball"}\n'),
        ("p.json", '[{"prompt": "a red cube"}, {"prompt": null}, "", "a blue ball"]'),
    ],
)
def test_null_is_no_prompt(tmp_path, name, text):
    prompts, line = described(tmp_path / name, text)
    assert prompts == ["a red cube", "a blue ball"]
    assert line == "2 prompts (left out: 1 blank, 1 null)"


def test_a_json_file_may_hold_an_object_a_line(tmp_path):
    assert load(tmp_path / "p.json", '{"prompt": "a"}\n{"prompt": "b"}\n').prompts == ["a", "b"]


def test_comments_are_of_text_files_only(tmp_path):
    assert load(tmp_path / "p.csv", "prompt\n#1 dad mug\n", comments=True).prompts == ["#1 dad mug"]


def test_a_file_of_null_only(tmp_path):
    with pytest.raises(PromptError, match=r"0 usable prompts in 2 lines \(left out: 2 null\)"):
        load(tmp_path / "p.jsonl", '{"prompt": null}\n{"prompt": null}\n')


@pytest.mark.parametrize("text", ["id,prompt,\n1,a,\n,,,,,\n\n2,b,\n", "id,prompt,prompt \n1,a,x\n\n,,\n2,b,y\n"])
def test_a_blank_row_is_blank_whatever_its_commas(tmp_path, text):
    assert described(tmp_path / "p.csv", text) == (["a", "b"], "2 prompts (left out: 2 blank)")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.csv",
            'id,prompt\n1,a\n2,"b, c"\n3,a castle, oil, 8k\n',
            r"row 3 \(line 4\): 4 cells, and the header has 2",
        ),
        ("p.csv", "id,prompt,note\n1,a,x\n2,b\n", r"row 2 \(line 3\): 2 cells, and the header has 3"),
        ("p.csv", 'prompt,id\n"two\nlines",1\nb,c,2\n', r"row 2 \(line 4\): 3 cells"),
        ("p.csv", 'id,prompt\n1,"a castle\n2,a dog\n', "p.csv:2: the row that begins here is no CSV: unexpected end"),
        ("p.csv", 'id,prompt\n1,a\n2,"O P E N" in blue\n', "p.csv:3: the row that begins here is no CSV.*twice"),
        ("p.csv", "prompt,prompt\na,b\n", "the header has it 2 times"),
        ("p.csv", "id;prompt\n1;a\n", r"no text under prompts.column = 'prompt'; it has \['id;prompt'\]"),
        ("p.csv", "id, prompt\n1,a\n", r"it has \['id', ' prompt'\]"),
        ("p.csv", ",".join(f"c{i}" for i in range(99)), r"'c19'\] and 79 more"),
        ("p.csv", "", "0 usable prompts in 0 rows"),
        ("p.csv", "id,prompt\n", "0 usable prompts in 0 rows"),
        ("p.tsv", "prompt\tid\na\tb\t1\n", r"row 1 \(line 2\): 3 cells, and the header has 2; .*no quoting"),
        ("p.tsv", 'prompt\tid\n"two\nlines"\t1\n', r"row 1 \(line 2\): 1 cells"),
        ("p.jsonl", '{"prompt": "a"},\n', "p.jsonl:1: not JSON: Extra data"),
        ("p.jsonl", '[{"prompt": "a"}]', "p.jsonl:1: no text.*it is of type list"),
        ("p.jsonl", '{"prompt": {"text": "a"}}', r"p.jsonl:1: no text .*what stands there is {'text': 'a'}"),
        ("p.jsonl", '{"prompt": 3.5}', "p.jsonl:1: no text .*what stands there is 3.5"),
        ("p.jsonl", '{"prompt": true}', "p.jsonl:1: no text .*what stands there is True"),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "p.jsonl:1: an object has the key 'prompt' twice"),
        ("p.jsonl", "[" * 100_000, "p.jsonl:1: not JSON"),
        ("p.jsonl", '{"n": ' + "9" * 5000 + "}", "p.jsonl:1: not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "half \\ud83d"}', r"p.jsonl:2: holds half of a character, \\ud83d"),
        ("p.json", '{"prompt": "a"}\n{"prompt": 1}\n', "p.json:2: no text"),
        ("p.json", '[{"prompt": "' + "x" * (MAX_PROMPT_BYTES + 1) + '"}]', "row 1: a text of 16385 bytes"),
        ("p.txt", b"fine\r\nfine\rna\xefve\n", "p.txt:3: not UTF-8: .* at byte 13"),
        ("p.txt", "a cat".encode("utf-16"), "not UTF-8 but UTF-16"),
        ("p.txt", "a cat\nb".encode("utf-16-le"), "p.txt:1: holds a NUL character"),
        ("p.csv", b"prompt\nna\xefve\n", "p.csv:2: not UTF-8"),
        ("p.jsonl.gz", b"\x1f\x8b", "a compressed file; unpack it first"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, name, text, message):
    with pytest.raises(PromptError, match=message):
        load(tmp_path / name, text)


def test_other_keys_may_be_anything(tmp_path):
    """Only the prompt is limited in size and checked: rows may hold images, nulls and nested things."""
    row = {"image": "x" * 100_000, "n": None, "tags": [{"a": 1}], "prompt": "a cat", "bad": "\ud83d"}
    assert load(tmp_path / "p.jsonl", json.dumps(row)).prompts == ["a cat"]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(PromptError, match=r"prompts.source = .*: a folder \("):
        load(tmp_path)


# Parquet


def write_parquet(path, columns, **options):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [parquet]")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def test_parquet_gives_what_stands_there(tmp_path):
    rows = [*NASTY, None, " ", " a cat"]
    path = write_parquet(tmp_path / "P.Parquet", {"a.b": rows, "a": [{"b": "no"}] * len(rows)}, row_group_size=3)
    prompts = load(path, column="a.b")
    assert prompts.prompts == [*NASTY, "a cat"]
    assert describe_prompts(prompts) == ("6 prompts (left out: 1 blank, 1 null; white space around 1 of them dropped)")


def test_parquet_of_repeated_texts_and_of_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [parquet]")
    coded = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    path = write_parquet(tmp_path / "p.parquet", {"prompt": coded, "none": pyarrow.nulls(3)})
    assert load(path).prompts == ["a", "b", "a"]
    with pytest.raises(PromptError, match=r"0 usable prompts in 3 rows \(left out: 3 null\)"):
        load(path, column="none")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"]}, r"no text under prompts.column = 'prompt'; it has \['text'\]"),
        ({"prompt": [1]}, "no text under prompts.column = 'prompt'; it is of type int64"),
        ({"prompt": [["a"]]}, "it is of type list"),
        ({"prompt": [b"a"]}, "it is of type binary"),
    ],
)
def test_parquet_without_the_text_is_named(tmp_path, columns, message):
    with pytest.raises(PromptError, match=message):
        load(write_parquet(tmp_path / "p.parquet", columns))


def test_parquet_reads_the_prompts_column_only(tmp_path):
    """The bytes of the images are overwritten: whoever read them would fail."""
    image = [bytes([i]) * 5000 for i in range(40)]
    path = write_parquet(
        tmp_path / "p.parquet", {"image": image, "prompt": [f"prompt {i}" for i in range(40)]},
        compression="zstd", use_dictionary=False, row_group_size=10,
    )  # fmt: skip
    from pyarrow import ArrowException, parquet

    with parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(g) for g in range(file.num_row_groups)]
    content = bytearray(path.read_bytes())
    for chunk in (group.column(0) for group in groups):
        content[chunk.data_page_offset : chunk.data_page_offset + chunk.total_compressed_size] = bytes(
            chunk.total_compressed_size
        )
    path.write_bytes(content)
    with pytest.raises((ArrowException, OSError)):
        parquet.read_table(path)
    assert load(path).prompts == [f"prompt {i}" for i in range(40)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images_beside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="the extra [parquet]")
    from pyarrow import parquet

    schema = pyarrow.schema([("image", pyarrow.binary()), ("prompt", pyarrow.string())])
    path, rows, side = tmp_path / "p.parquet", 1000, 200_000
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for first in range(0, rows, 500):
            images = [number.to_bytes(4, "big") * (side // 4) for number in range(first, first + 500)]
            texts = [f"prompt {number}" for number in range(first, first + 500)]
            writer.write_table(pyarrow.table([images, texts], schema=schema))
    assert path.stat().st_size > 190e6
    program = (
        "import resource, sys\n"
        "from fdfo_engine.config import PromptsConfig\n"
        "from fdfo_engine.rollout.prompts import load_prompts\n"
        "import pyarrow.parquet\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert len(load_prompts(PromptsConfig(source=sys.argv[1]), 0)) == 1000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60_000, "KiB more than before"
