"""Data files of strangers: the file and the line are named, at once, in little memory, and nothing is unpacked."""

import bz2
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from adalora_scale.config import DataConfig
from adalora_scale.data import row_files, row_limits
from adalora_scale.data.row_limits import MAX_COLUMNS, MAX_ROW_BYTES
from adalora_scale.data.rows import load_raw
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task, wanted_rows

ROW = b'{"text": "a"}\n'


def read_file(path):
    """The rows of a file, as they stand there."""
    row_files.check_file(str(path))
    return [row for _, row in row_files.iterate_rows(str(path))]


def load(path, task="causal_lm"):
    return load_raw(DataConfig(train=str(path)), wanted_rows(find_task(task)), seed=0)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def tar():
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as file:
        member = tarfile.TarInfo('{"a')  # looks like a row
        member.size = len(ROW)
        file.addfile(member, io.BytesIO(ROW))
    return packed.getvalue()


def zipped():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("rows.jsonl", ROW)
    return packed.getvalue()


HOSTILE = {
    "a row without end": ("jsonl", ROW + b'{"text": "' + b"a" * (MAX_ROW_BYTES + 1) + b'"}\n', ":2: the row is longer"),
    "no line break": ("jsonl", b"{" * (MAX_ROW_BYTES + 1), ":1: the row is longer"),
    "deep lists": ("jsonl", ROW + b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ":2: nests deeper"),
    "deep objects": ("jsonl", ROW + b'{"a":' * 5000 + b"1" + b"}" * 5000, ":2: nests deeper"),
    "deep and broken": ("jsonl", b"{" + b"[" * 100_000, ":1: nests deeper"),
    "deep over lines": ("json", b'{"a":\n' * 100_000, "nests deeper"),
    "deep array": ("json", b"[" * 100_000, "nests too deeply"),
    "rather deep array": ("json", b'[{"text": ' + b"[" * 60 + b"]" * 60 + b"}]", "nests deeper"),
    "a key twice": ("jsonl", ROW + b'{"text": "a", "text": "b"}', ":2: the key 'text' stands there twice"),
    "a key twice in an array": ("json", b'[{"text": "a", "text": "b"}]', "the key 'text' stands there twice"),
    "a key twice in a turn": (
        "jsonl",
        b'{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}',
        ":1: the key 'role' stands there twice",
    ),
    "many keys": (
        "jsonl",
        ROW + b"{" + b",".join(b'"k%d":1' % i for i in range(20_000)) + b"}",
        f":2: has more than {MAX_COLUMNS:,} keys",
    ),
    "many keys inside": (
        "jsonl",
        b'{"text":"a","x":[' + b",".join(b'{"k%d":1}' % i for i in range(20_000)) + b"]}",
        f":1: has more than {MAX_COLUMNS:,} keys",
    ),
    "gzip": ("jsonl", gzip.compress(ROW * 1000), ":1: not JSON"),
    "bzip2": ("jsonl", bz2.compress(ROW), ":1: not JSON"),
    "zip": ("jsonl", zipped(), ":1: not JSON"),
    "tar": ("jsonl", tar(), ":1: holds NUL bytes"),
    "gzip as CSV": ("csv", gzip.compress(b"text\na\n"), "NUL bytes"),
    "zip as CSV": ("csv", zipped(), "NUL bytes"),
    "gzip as Parquet": ("parquet", gzip.compress(ROW), "not a Parquet file"),
    "a Parquet file that ends": ("parquet", b"PAR1" + b"x" * 100 + b"PAR1", "cannot read"),
    "NUL bytes": ("jsonl", ROW + b'{"text": "a\0"}\n', ":2: holds NUL bytes"),
    "NUL bytes in CSV": ("csv", b"text\na\0b\n", ":2: holds NUL bytes"),
    "half a character": ("jsonl", ROW + b'{"text": "\\ud800"}\n', ":2: a \\u escape stands for half a character"),
    "not UTF-8": ("jsonl", ROW + b'{"text": "\xff"}\n', ":2: not UTF-8"),
    "not UTF-8 in an array": ("json", b'[{"text": "\xff"}]', "not UTF-8"),
    "a CSV line without end": ("csv", b"text\n" + b"a" * (MAX_ROW_BYTES + 1), ":2: the row is longer"),
    "a CSV quote without end": ("csv", b'text\n"' + b"a" * 999_999 + b"\n" + b"b" * MAX_ROW_BYTES, "the row is longer"),
    "many CSV columns": ("csv", b",".join(b"c%d" % i for i in range(2000)) + b"\n1", "has 2,000 columns"),
    "text that is a number": ("jsonl", ROW + b'{"text": 1e999}', ":2: the number '1e999' is too large"),
    "text that is a list": ("jsonl", b'{"text": [1, {"a": null}]}', "column 'text' must be text"),
    "a huge number and a bad row": ("jsonl", b'{"n": ' + b"1" * 5000 + b"}\n" + b"{]", ":1: Exceeds the limit"),
    "an unfinished row": ("jsonl", ROW + b'{"text": "', ":2: broken JSON"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_named(name, tmp_path):
    """These ended the process, were unpacked, took minutes, or were taken as they are."""
    suffix, content, message = HOSTILE[name]
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    before, start = psutil.Process().memory_info().rss, time.monotonic()
    with pytest.raises(UserError) as caught:
        load(path)
    said = str(caught.value)
    assert message in said and str(path) in said and len(said.splitlines()) == 1 and len(said) < 500
    assert time.monotonic() - start < 20 and psutil.Process().memory_info().rss - before < 2**30


@pytest.mark.parametrize("label", [b"1e999", b"-1e999", b"NaN", b"[NaN]", b"[[1]]", b"[{}]", b"{}"])
def test_a_label_that_is_no_class(label, tmp_path):
    """Infinity is equal to its floor, and has no whole number."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a", "label": ' + label + b"}\n")
    with pytest.raises(UserError, match=r"rows.jsonl:1: (column 'label'|the number)"):
        load(path, "sequence_classification")


def test_an_infinite_label_of_a_table(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1.0, float("inf")]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"row 2: column 'label' must be finite, not inf"):
        load(tmp_path / "rows.parquet", "sequence_classification")


def test_json_inside_a_table_has_the_limits_of_json(tmp_path):
    """Else Python's own recursion ends the run with a traceback."""
    deep = pa.array(["[" * 900 + "]" * 900], pa.json_())
    pq.write_table(pa.table({"messages": deep}), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet after row 0: a JSON value: nests deeper"):
        load(tmp_path / "rows.parquet")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": "[" * 900 + "]" * 900}))
    with pytest.raises(UserError, match=r"rows.jsonl:1: column 'messages' must be a non-empty list"):
        load(tmp_path / "rows.jsonl")


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(tmp_path / "loop.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe", "loop", "zero", "folder", "none", "a\0b", "n" * 5000, "~nobody-of-this-name/x"):
        path = f"{name}.jsonl" if name.startswith("~") else str(tmp_path / f"{name}.jsonl")
        with pytest.raises(UserError) as caught:
            load(path)
        assert name[:10] in str(caught.value)


@pytest.mark.parametrize(
    "name", ["rows.pkl", "rows.pickle", "rows.pt", "rows.npy", "rows.jsonl", "rows.json", "rows.csv"]
)
def test_a_pickle_is_not_opened(name, tmp_path):
    (tmp_path / name).write_bytes(pickle.dumps(Touch(str(tmp_path / "owned"))))
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_long_rows_of_tables_and_arrays(tmp_path):
    """A limit that one kind of file goes round is none."""
    long = "a" * (MAX_ROW_BYTES + 1)
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "a"}, {"text": long}]))
    datasets.Dataset.from_dict({"text": ["a", long]}).to_parquet(tmp_path / "rows.parquet")
    turns = [{"role": "user", "content": "a" * (MAX_ROW_BYTES // 2)}] * 3
    datasets.Dataset.from_dict({"messages": [turns[:1], turns]}).to_parquet(tmp_path / "turns.parquet")
    for name in ("rows.json", "rows.parquet", "turns.parquet"):
        with pytest.raises(UserError, match=rf"{name} row 2: column '\w+' is [\d,]+ bytes long; split the row"):
            load(tmp_path / name)


def test_what_is_allowed_is_read(tmp_path):
    """The limits must not meet ordinary files."""
    code = "{[" * 500 + '":' * 1500
    rows = [{"text": "é 漢字\u2028\x1b"}, {"text": code}, {"text": "b" * 1_000_000}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "bom.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "texts.json").write_text(json.dumps([row["text"] for row in rows]))
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    (tmp_path / "mac.csv").write_bytes(b"text\rone\rtwo\r")
    for name in ("bom.jsonl", "rows.json", "texts.json"):
        assert read_file(tmp_path / name) == rows
    assert read_file(tmp_path / "one.json") == rows[:1]
    assert read_file(tmp_path / "mac.csv") == [{"text": "one"}, {"text": "two"}]
    many = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2000
    (tmp_path / "turns.jsonl").write_text(json.dumps({"messages": many}) + "\n")
    assert len(load(tmp_path / "turns.jsonl").train[0]["messages"]) == 4000


def test_a_line_of_a_gigabyte_in_a_process_of_its_own(tmp_path):
    """The peak of a whole process is what a node runs out of."""
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.truncate(2**30)
    code = (
        "import sys; from adalora_scale.data.row_files import check_file\n"
        "try: check_file(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"  # ru_maxrss counts the parent's, too
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120)
    said, kilobytes = run.stdout.splitlines()
    assert ":1: the row is longer" in said and int(kilobytes) < 1_000_000


def test_a_large_file_is_passed_over_once_until_it_changes(tmp_path, monkeypatch):
    """Every start of every rank would read all its data once more."""
    looked, inner = [], row_files.refuse_hostile
    monkeypatch.setattr(row_files, "refuse_hostile", lambda *args: (looked.append(args), inner(*args)))
    monkeypatch.setattr(row_files, "default_cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(row_files, "LARGE", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a row"}\n' * 20)
    assert [len(read_file(path)) for _ in range(3)] == [20] * 3 and len(looked) == 1
    path.write_text('{"text": "a row"}\n' * 20 + "[" * 200 + "\n")
    for _ in range(2):
        with pytest.raises(UserError, match="deeper than"):
            row_files.check_file(str(path))
    assert len(looked) == 3


def test_a_line_that_is_cut_off_is_named_in_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(row_limits, "MAX_ARRAY_BYTES", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a row"}\n' * 20 + '{"text": "a r')
    with pytest.raises(UserError, match=r"rows\.jsonl:21: the row does not begin and end on its line"):
        row_files.check_file(str(path))
