"""Each source: the same rows as one plain file of them, in one order, and nothing of it left out without a word."""

import gzip
import json
import logging
import os

import datasets
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from adalora_scale.config import DataConfig
from adalora_scale.data import packed, row_files, row_limits, row_table
from adalora_scale.data.digests import dataset_digest
from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.data.rows import load_raw
from adalora_scale.data.tokenization import prepare_language_model
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows
from tests.conftest import ROOT

ROWS = [{"prompt": f"Question {i}: é\t\"{i}\", 'x'", "completion": f"answer {i}\nof two lines"} for i in range(7)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ROOT / "launch" / "quickstart" / "base_model")


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(content):
    return pa.compress(content, codec="zstd", asbytes=True)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def load(train, task="causal_lm", **options):
    return load_raw(DataConfig(train=str(train), **options), wanted_rows(find_task(task)), seed=1)


def refusal(train, **options):
    with pytest.raises(UserError) as error:
        load(train, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def table(rows, between):
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
    return "".join(between.join(fields) + "\n" for fields in [list(rows[0]), *quoted]).encode()


def tokens_by_hand(tokenizer, row):
    """What the tokenizer itself gives for a prompt and its completion, the prompt's tokens masked."""
    prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
    whole = [*whole, tokenizer.eos_token_id]
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


def one_file(folder, ending, content):
    return write(folder / f"rows{ending}", content)


SOURCES = {
    "jsonl.gz": lambda d: one_file(d, ".jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)),
    "jsonl.zst": lambda d: one_file(d, ".jsonl.zst", zst(jsonl(ROWS))),
    "several members and frames": lambda d: (
        (
            write(d / "f" / "a.jsonl.gz", gzip.compress(jsonl(ROWS[:1]), mtime=0) + gzip.compress(jsonl(ROWS[1:3]))),
            write(d / "f" / "b.jsonl.zst", zst(jsonl(ROWS[3:5])) + zst(jsonl(ROWS[5:]))),
        )[0].parent
    ),
    "an array, packed": lambda d: one_file(d, ".json.gz", gzip.compress(json.dumps(ROWS, indent=1).encode(), mtime=0)),
    "objects over lines, packed": lambda d: one_file(
        d, ".json.zst", zst("\n".join(json.dumps(row, indent=1) for row in ROWS).encode())
    ),
    "ndjson": lambda d: one_file(d, ".ndjson", jsonl(ROWS)),
    "csv.gz": lambda d: one_file(d, ".csv.gz", gzip.compress(table(ROWS, ","), mtime=0)),
    "tsv": lambda d: one_file(d, ".tsv", table(ROWS, "\t")),
    "TSV.ZST": lambda d: one_file(d, ".TSV.ZST", zst(table(ROWS, "\t"))),
    "a pattern": lambda d: (
        [write(d / "many" / f"{i}.jsonl", jsonl([row])) for i, row in enumerate(ROWS)] and d / "many" / "*.jsonl"
    ),
    "a pattern at any depth": lambda d: (
        [write(d / "deep" / f"{i}" / "x" / "rows.jsonl", jsonl([row])) for i, row in enumerate(ROWS)]
        and d / "deep" / "**" / "*.jsonl"
    ),
    "a folder of all kinds": lambda d: (
        (
            write(d / "kinds" / "a.jsonl", jsonl(ROWS[:2])),
            write(d / "kinds" / "b.csv.gz", gzip.compress(table(ROWS[2:4], ","), mtime=0)),
            write(d / "kinds" / "c.json", json.dumps(ROWS[4:6]).encode()),
            write(d / "kinds" / "d.tsv", table(ROWS[6:], "\t")),
        )[0].parent
    ),
    "a saved Dataset": lambda d: (
        datasets.Dataset.from_list(ROWS).save_to_disk(d / "saved", num_shards=3) or d / "saved"
    ),
    "a saved DatasetDict": lambda d: (
        datasets.DatasetDict(
            train=datasets.Dataset.from_list(ROWS), test=datasets.Dataset.from_list(ROWS[:1])
        ).save_to_disk(d / "saved")
        or d / "saved"
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_gives_the_rows_and_tokens_of_one_plain_file(name, tmp_path, tokenizer):
    """A row that is lost, doubled, out of order or changed on the way; and tokens that are not the tokenizer's own."""
    raw = load(SOURCES[name](tmp_path))
    plain = load(write(tmp_path / "plain.jsonl", jsonl(ROWS)))
    assert raw.train.to_list() == ROWS
    assert dataset_digest(raw.train) == dataset_digest(plain.train), (
        "else ranks that read other forms of it are refused"
    )
    config = DataConfig(train="x")
    ready = prepare_language_model(raw, tokenizer, config, seed=1, cache_dir=tmp_path / "tokens").train
    assert ready.to_list() == [tokens_by_hand(tokenizer, row) for row in ROWS]


def test_a_saved_view_has_all_its_columns_and_the_names_of_its_classes(tmp_path):
    """`set_format` is the writer's view, and a ClassLabel's numbers are no classes of ours."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    dataset = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    dataset.with_format("numpy", columns=["label"]).save_to_disk(tmp_path / "saved")
    raw = load(tmp_path / "saved", "sequence_classification")
    assert raw.label_names == ["no", "yes"] and raw.train.to_list() == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
    ]


def test_splits_of_a_saved_dict_are_chosen_by_name(tmp_path):
    parts = {name: datasets.Dataset.from_list(ROWS[i : i + 2]) for i, name in enumerate(("sft", "dev"))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    raw = load(tmp_path / "saved", eval=str(tmp_path / "saved"), train_split="sft", eval_split="dev")
    assert (raw.train.to_list(), raw.eval.to_list()) == (ROWS[:2], ROWS[1:3])
    assert "holds the splits sft, dev, not 'train'; set data.train_split" in refusal(tmp_path / "saved")
    assert "not '../x'" in refusal(tmp_path / "saved", train_split="../x")


def test_what_is_not_read_is_named_once(tmp_path, caplog):
    folder = tmp_path / "d"
    for name in ("b.jsonl", "a.jsonl", ".hidden.jsonl", "notes.md", "x.pkl", "rows.parquet.gz", "sub/c.jsonl"):
        write(folder / name, jsonl([{**ROWS[0], "prompt": name, "extra": 1}]))
    raw = load(folder)
    assert raw.train["prompt"][:] == ["a.jsonl", "b.jsonl"]
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert said == [
        f"data: {folder}: not read: .hidden.jsonl, notes.md, rows.parquet.gz, x.pkl, sub/",
        f"data: {folder}: not used: columns extra",
    ]
    caplog.clear()
    load(f"{folder}/*")
    assert caplog.messages[0].endswith(
        f"not read: {folder}/notes.md, {folder}/rows.parquet.gz, {folder}/x.pkl, {folder}/sub/"
    )
    caplog.clear()
    load(f"{folder}/**/*.jsonl", name="main", train_split="train[:1%]", eval_split="x", format="prompt_completion")
    assert "not used: data.train_split, data.eval_split, data.name" in caplog.text
    assert "not read" not in caplog.text


def test_nothing_to_read_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "is a folder without files of rows (.jsonl, .json" in refusal(tmp_path / "empty")
    write(tmp_path / "empty" / "sub" / "a.jsonl", jsonl(ROWS))
    assert f"a pattern such as {tmp_path}/empty/**/*.jsonl" in refusal(tmp_path / "empty")
    assert "*.jsonl matches no file (looked in" in refusal(tmp_path / "*.jsonl")
    write(tmp_path / "notes.md", b"x")
    assert "matches only" in refusal(tmp_path / "*.md") and "notes.md, no file of rows" in refusal(tmp_path / "*.md")
    write(tmp_path / "run[1]" / "a.jsonl", jsonl(ROWS))
    assert "is written [[]" in refusal(tmp_path / "run[1]" / "*.jsonl")
    assert load(tmp_path / "run[[]1]" / "*.jsonl").train.num_rows == len(ROWS)
    assert load(tmp_path / "run[1]" / "a.jsonl").train.num_rows == load(tmp_path / "run[1]").train.num_rows == len(ROWS)
    write(tmp_path / "rows.parquet.gz", gzip.compress(b"PAR1", mtime=0))
    assert "unknown extension '.parquet.gz'; supported" in refusal(tmp_path / "rows.parquet.gz")
    write(tmp_path / "rows.gz", gzip.compress(jsonl(ROWS), mtime=0))
    assert "unknown extension '.gz'" in refusal(tmp_path / "rows.gz")


@pytest.mark.parametrize("bad", ["", "prompt,completion\n", '{"prompt": "a"}\n', '{"prompt": 1}'])
def test_a_bad_file_among_many_is_named_itself(tmp_path, bad):
    """An empty file adds nothing, and nobody would see it."""
    write(tmp_path / "d" / "a.jsonl", jsonl(ROWS))
    name = "b.csv" if bad.startswith("p") else "b.jsonl"
    write(tmp_path / "d" / name, bad.encode())
    assert f"{tmp_path}/d/{name}" in refusal(tmp_path / "d")


def test_rows_that_stand_there_twice_are_refused(tmp_path):
    """A file beside its packed form, and evaluation rows among the training files, are taken in by patterns."""
    write(tmp_path / "d" / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "d" / "b.jsonl", jsonl(ROWS[:1]))
    assert "takes in b.jsonl of data.eval" in refusal(tmp_path / "d" / "*.jsonl", eval=str(tmp_path / "d" / "b.jsonl"))
    assert "takes in b.jsonl of data.eval" in refusal(tmp_path / "d", eval=f"{tmp_path}/./d/b*")
    assert load(tmp_path / "d" / "a*", eval=str(tmp_path / "d" / "b.jsonl")).eval.num_rows == 1
    write(tmp_path / "d" / "a.jsonl.zst", zst(jsonl(ROWS)))
    assert "takes in both a.jsonl and a.jsonl.zst" in refusal(tmp_path / "d")


@pytest.mark.parametrize("second", ["d/a.jsonl", "d/../d/a.jsonl", "d/*.jsonl", "link.jsonl"])
def test_a_file_that_is_read_twice_has_no_rows_held_out(tmp_path, second):
    """Else the same row stands in what is trained and in what judges it."""
    write(tmp_path / "d" / "a.jsonl", jsonl(ROWS))
    write(tmp_path / "b.jsonl", jsonl(ROWS[:1]))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "d" / "a.jsonl")
    names = [str(tmp_path / "d" / "a.jsonl"), str(tmp_path / second)]
    wanted = wanted_rows(find_task("causal_lm"))
    for train in (names, [{"path": name, "weight": 1} for name in names]):
        with pytest.raises(UserError, match=r"takes in a\.jsonl twice"):
            load_raw(DataConfig(train=train, eval_fraction=0.5), wanted, seed=0)
    raw = load_raw(DataConfig(train=names, eval=str(tmp_path / "b.jsonl")), wanted, seed=0)
    assert raw.train.num_rows >= 2 * len(ROWS)


def test_a_changed_or_added_file_of_a_folder_is_seen(tmp_path, monkeypatch):
    """Rows are gathered once and kept; a cache that looks at one file only would train on what was there before."""
    monkeypatch.setattr("adalora_scale.data.sources.LARGE", 100)
    built, inner = [], row_table.build_once
    monkeypatch.setattr(
        row_table, "build_once", lambda cache, key, build: built.append(key) or inner(cache, key, build)
    )
    for i, row in enumerate(ROWS[:3]):
        write(tmp_path / "d" / f"{i}.jsonl", jsonl([row]))
    first = load(tmp_path / "d").train.to_list()
    assert load(tmp_path / "d").train.to_list() == first == ROWS[:3]
    write(tmp_path / "d" / "2.jsonl", jsonl([ROWS[4]]))
    assert load(tmp_path / "d").train.to_list() == [*ROWS[:2], ROWS[4]]
    write(tmp_path / "d" / "10.jsonl", jsonl([ROWS[5]]))
    assert load(tmp_path / "d").train.to_list() == [ROWS[0], ROWS[1], ROWS[5], ROWS[4]], "10 stands before 2 in order"
    assert len(built) == 4 and len(set(built)) == 3


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (gzip.compress(jsonl(ROWS) * 1000, mtime=0)[:-40], "cut off"),
        (gzip.compress(jsonl(ROWS), mtime=0)[:-8] + b"\0" * 8, "CRC check failed"),
        (jsonl(ROWS), "cannot be unpacked: Not a gzipped file"),
        (gzip.compress(b"", mtime=0), "no rows"),
        (gzip.compress(jsonl(ROWS[:1]) + b'{"prompt": "\xff"}\n', mtime=0), ":2: not UTF-8"),
        (gzip.compress(jsonl(ROWS[:1]) + b"[" * 100, mtime=0), ":2: nests deeper"),
        (gzip.compress(jsonl(ROWS[:1]) + b'{"prompt": ', mtime=0), ":2: broken JSON"),
        (gzip.compress(b"\x80\x04" + jsonl(ROWS), mtime=0), ":1: not JSON"),
        (zst(jsonl(ROWS) * 1000)[:-40], "Truncated"),
        (zst(jsonl(ROWS))[:30] + b"\0\0\0\0" + zst(jsonl(ROWS))[34:], "cannot be unpacked"),
        (zst(jsonl(ROWS)) + b"tail", "cannot be unpacked"),
    ],
)
def test_a_damaged_packed_file_is_one_line(tmp_path, content, said):
    ending = "zst" if said == "Truncated" or content[:4] == zst(b"")[:4] else "gz"
    path = write(tmp_path / f"rows.jsonl.{ending}", content)
    message = refusal(path)
    assert said in message and str(path) in message


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_what_unpacks_without_end_is_bounded(tmp_path, pack, monkeypatch):
    """A file of a few hundred kilobytes may hold a line, an array or rows of any length."""
    ending = "gz" if pack is gzip.compress else "zst"
    path = write(tmp_path / f"line.jsonl.{ending}", pack(b'{"text": "' + b"a" * (2 * MAX_ROW_BYTES) + b'"}'))
    assert ":1: the row is longer than" in refusal(path)
    monkeypatch.setattr(row_limits, "MAX_ARRAY_BYTES", 10_000)
    monkeypatch.setattr(row_files, "MAX_ARRAY_BYTES", 10_000)
    path = write(tmp_path / f"array.json.{ending}", pack(b"[" + b'{"text": "a"},' * 10_000 + b'{"text": "a"}]'))
    assert "is one JSON array of more than 10,000 bytes" in refusal(path)
    monkeypatch.setattr(packed, "_SMALL", 100)
    monkeypatch.setattr(packed, "MAX_EXPANSION", 20)
    path = write(tmp_path / f"rows.jsonl.{ending}", pack(b'{"text": "a"}\n' * 100_000))
    assert "20 times its own size" in refusal(path)
    assert row_files.file_identity(path) is not None, "its rows are gathered on disk, however small the file is"


def test_a_table_whose_quotes_do_not_close_is_refused(tmp_path):
    """Read leniently, `"a" b` loses its quotes and a quote that never closes swallows the rows behind it."""
    for ending, between in (("csv", ","), ("tsv", "\t")):
        for text in ('"a" b', '"a', 'a\n0,"b" c'.replace(",", between)):
            path = write(tmp_path / f"rows.{ending}", f"label{between}text\n0{between}{text}\n".encode())
            assert "quotes inside it are written twice" in refusal(path, format="text")
    path = write(tmp_path / "rows.tsv", b'label\ttext\n0\tsay "a", b\n')
    assert load(path, format="text").train["text"][:] == ['say "a", b']
    write(path, b"text\tlabel\na\tb\tc\n")
    assert "3 fields, the header has 2; quote fields that contain a tab" in refusal(path, format="text")


def saved(folder, change):
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)
    change(folder)
    return folder


def edit(folder, **changes):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | changes))


def damage(folder):
    (path,) = folder.glob("*.arrow")
    content = path.read_bytes()
    for start in range(len(content) - 8):
        # offsets of the first text column: 0, 1, 2 … of the lengths of prompts
        if content[start : start + 8] == (0).to_bytes(4, "little") + len(ROWS[0]["prompt"].encode()).to_bytes(
            4, "little"
        ):
            path.write_bytes(content[: start + 4] + (2**30).to_bytes(4, "little") + content[start + 8 :])
            return
    raise AssertionError("no offsets found")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d / "state.json").write_text("{"), "state.json"),
        (lambda d: edit(d, _data_files=[{"filename": "../other/data.arrow"}]), "names no Arrow files inside"),
        (lambda d: edit(d, _data_files=[]), "names no Arrow files inside"),
        (lambda d: edit(d, _format_type="nonsense"), "cannot read"),
        (lambda d: next(d.glob("*.arrow")).unlink(), "does not exist"),
        (lambda d: next(d.glob("*.arrow")).write_bytes(b"ARROW"), "cannot read"),
        (damage, "cannot read"),
    ],
)
def test_a_damaged_saved_folder_is_one_line(tmp_path, change, said):
    """Offsets of a damaged table lead out of its memory, and end the process."""
    assert said in refusal(saved(tmp_path / "saved", change))


def test_files_are_closed_again(tmp_path):
    """A folder of more files than a process may open."""
    for i in range(40):
        write(tmp_path / "d" / f"{i:03}.jsonl.gz", gzip.compress(jsonl(ROWS[:1]), mtime=0))
    before = len(os.listdir("/proc/self/fd"))
    raw = load(tmp_path / "d")
    assert raw.train.num_rows == 40 and len(os.listdir("/proc/self/fd")) - before <= 2
