"""Config files, DeepSpeed's, hostfiles and thresholds of strangers: one line, at once, in little memory."""

import os
from pathlib import Path

import pytest

from adalora_scale.cli import main
from adalora_scale.cluster.launching.hostfile import read_hostfile
from adalora_scale.cluster.preflight.thresholds import load_thresholds
from adalora_scale.config import config_from_tree, load_config
from adalora_scale.config.yaml_text import MAX_YAML_BYTES
from adalora_scale.engines.zero_place import at_stage, deepspeed_config
from adalora_scale.errors import Unsupported, UserError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
GOOD = "model: {model_name_or_path: m}\ndata: {train: rows.jsonl}\ntraining: {output_dir: out}\n"
YAMLS = {
    "aliases that multiply": (LAUGHS, "more than 100,000 values"),
    "merges that multiply": (
        LAUGHS.replace("[x, x, x, x, x, x, x, x, x]", "{x: y}").replace(" [*", " {<<: [*").replace("]\n", "]}\n"),
        "more than 100,000 values",
    ),
    "an alias of itself": ("model: &a [*a]\n", "stands for what it is in"),
    "deep": ("[" * 100_000, "nests too deeply"),
    "rather deep": ("a: " + "[" * 60 + "]" * 60, "nests deeper than 50"),
    "a key twice": (GOOD + "model: {model_name_or_path: other}\n", "line 4 is not valid YAML: the key 'model'"),
    "a key twice inside": (GOOD.replace("m}", "m, model_name_or_path: n}"), "the key 'model_name_or_path'"),
    "a Python object": ("!!python/object/apply:os.system [touch owned]", "python/object"),
    "a Python name": ("model: !!python/name:os.system", "python/name"),
    "a huge number": (GOOD + "adalora: {target_r: 0x" + "f" * 5000 + "}", "more than 64 bits"),
    "more digits than Python takes": (GOOD + "adalora: {target_r: " + "1" * 5000 + "}", "not valid YAML"),
    "no date": ("2001-13-45", "not valid YAML"),
    "no boolean": ("!!bool maybe", "not valid YAML"),
    "no number": ('!!int ""', "not valid YAML"),
    "control characters": ("a: \x1b", "not valid YAML"),
    "not UTF-8": (b"a: \xff", "not UTF-8"),
    "UTF-16": (GOOD.encode("utf-16"), "not UTF-8"),
    "NUL bytes": (b"a\0b", "NUL bytes"),
    "long": ("#" * (MAX_YAML_BYTES + 1), "is longer than"),
    "keys that are no text": (GOOD + "1: 2\n", "1"),
    "a list as a key": ("? [a]\n: 1\n", "not valid YAML"),
    "a list": ("[model]", "must hold a mapping"),
    "nothing": ("", "must hold a mapping"),
}


@pytest.mark.parametrize("name", YAMLS)
def test_a_hostile_config_is_one_line(name, tmp_path, capsys, monkeypatch):
    """Tracebacks, minutes and gigabytes came from these."""
    monkeypatch.chdir(tmp_path)
    content, message = YAMLS[name]
    Path("run.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["train", "--config", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1 and len(said) < 2100
    assert os.listdir() == ["run.yaml"]


def test_a_file_that_is_none(tmp_path, capsys):
    """A pipe without a writer would be waited for, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**30)
    for name in ("pipe", "loop", "sparse", ".", "none", "a\0b", "/dev/zero", "n" * 5000):
        assert main(["train", "--config", str(tmp_path / name)]) == 2
        assert main(["train", "--config", str(_good(tmp_path)), "--deepspeed", str(tmp_path / name)]) == 2
        assert main(["preflight", "--thresholds", str(tmp_path / name)]) == 2
        with pytest.raises(UserError, match="the hostfile"):
            read_hostfile(tmp_path / name)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3 and all(line.startswith("error: ") for line in lines)


def test_a_byte_order_mark_and_ordinary_aliases_are_read(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("\ufeff" + GOOD.replace("rows.jsonl", "&a rows.jsonl, eval: *a"), encoding="utf-8")
    assert load_config(path).data.eval == "rows.jsonl"


@pytest.mark.parametrize("section", ["model", "data", "adalora", "training", "engine", "task"])
@pytest.mark.parametrize("value", ["[1]", "3", "true", "null", "2001-01-01", "!!set {a}", "!!binary YQ==", ".nan", "x"])
def test_wrong_types_in_a_section(section, value, tmp_path):
    """Every section, every type YAML has: a line that names the section, or a config."""
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    try:
        load_config(path, [f"{section}={value}"])
    except UserError as error:
        assert section in str(error) or "output_dir" in str(error)


@pytest.mark.parametrize("key", [1, None, 1.5, True, (1, 2), b"a"])
def test_keys_of_other_types(key):
    with pytest.raises(UserError):
        config_from_tree({"model": {"model_name_or_path": "m"}, "data": {"train": "t"}, "training": {}, key: 1})
    with pytest.raises(UserError):
        config_from_tree(
            {"model": {"model_name_or_path": "m", key: 1}, "data": {"train": "t"}, "training": {"output_dir": "o"}}
        )


JSONS = {
    "deep": "[" * 100_000,
    "rather deep": '{"zero_optimization": ' + "[" * 60 + "]" * 60 + "}",
    "a key twice": '{"zero_optimization": {"stage": 2, "stage": 3}}',
    "a huge number": '{"zero_optimization": {"stage": ' + "9" * 5000 + "}}",
    "a section that is none": '{"zero_optimization": 7}',
    "a list of sections": '{"zero_optimization": {"stage": 2}, "compile": [1]}',
    "a stage that is none": '{"zero_optimization": {"stage": [2]}}',
    "no stage": '{"zero_optimization": null}',
    "not UTF-8": b"\xff",
    "broken": "{",
    "a text": '"zero_optimization"',
}


@pytest.mark.parametrize("name", JSONS)
def test_a_hostile_deepspeed_file(name, tmp_path):
    path, content = tmp_path / "ds.json", JSONS[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((UserError, Unsupported)) as caught:
        at_stage(deepspeed_config(str(path)))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"a\0b slots=1", b"h slots=" + b"1" * 5000, b"h" * 300 + b" slots=1\ng", b"\x1b[2J"],
)
def test_a_hostile_hostfile(content, tmp_path):
    (tmp_path / "hosts").write_bytes(content)
    with pytest.raises(UserError, match=r"hosts"):
        read_hostfile(tmp_path / "hosts")


@pytest.mark.parametrize(
    "content", [LAUGHS, "gpu: &a [*a]", "open_files_min: 0x" + "f" * 5000, "1: 2", "gloo: 1", "open_files_min: .nan"]
)
def test_hostile_thresholds(content, tmp_path):
    (tmp_path / "limits.yaml").write_text(content)
    with pytest.raises(UserError, match=r"limits.yaml"):
        load_thresholds(tmp_path / "limits.yaml")


def _good(folder: Path) -> Path:
    path = folder / "good.yaml"
    path.write_text(GOOD)
    return path
