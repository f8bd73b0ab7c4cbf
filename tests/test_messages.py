"""What strangers named cannot repaint a terminal, forge a line or turn letters round."""

import json
import subprocess
import sys

import pytest

from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.export.inspection import rank_table
from adalora_scale.messages import LONGEST_LINE, printable, quoted, say, say_json, say_text

HOSTILE = {
    "escape": ("a\x1b[2Jb", r"a\x1b[2Jb"),
    "8-bit escape": ("a\x9b2Jb", r"a\x9b2Jb"),
    "NUL": ("a\0b", r"a\x00b"),
    "backspace": ("a\bb", r"a\x08b"),
    "delete": ("a\x7fb", r"a\x7fb"),
    "right to left": ("a\u202eb", r"a\u202eb"),
    "isolate": ("a\u2066b", r"a\u2066b"),
    "zero width": ("a\u200bb", r"a\u200bb"),
    "tag letter": ("a\U000e0041b", r"a\U000e0041b"),
    "surrogate of a file's name": ("a\udcffb", r"a\udcffb"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_error_escapes_what_is_no_text(name, capsys):
    """A key or a file's name in an error would run as a command of the terminal."""
    text, escaped = HOSTILE[name]

    def main():
        raise UserError(f"the key {text} is unknown")

    assert run_reporting_errors(main) == 2
    assert capsys.readouterr().err == f"error: the key {escaped} is unknown\n"
    say(text)
    say_text(f"table\n{text}")
    assert capsys.readouterr().out == f"{escaped}\ntable\n{escaped}\n"


@pytest.mark.parametrize("text", ["é", "漢字", "全\u3000角", "می\u200cخواهم", "naïve – “quoted” …", "λ ≤ 3 🙂"])
def test_letters_of_all_scripts_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize("text", ["a\nerror: forged", "a\rerror: forged", "a\u2028error: forged", "a\x85b"])
def test_a_name_cannot_begin_a_line(text, capsys):
    """A second line could look like this tool's own."""
    say(text)
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert len(rank_table({f"model.layers.0.{text}": 3}).splitlines()) == len(
        rank_table({"model.layers.0.x": 3}).splitlines()
    )


def test_json_stays_json(capsys):
    tree = {"name": "\x1b\x7f\u202e\ud800"}
    say_json(tree)
    out = capsys.readouterr().out
    assert json.loads(out) == tree and out.strip().isprintable() and out.isascii()


def test_a_line_has_an_end(capsys):
    """An error that quotes 100 MB of a row is no line."""

    def main():
        raise UserError("x" * 10_000_000)

    assert run_reporting_errors(main) == 2
    assert len(capsys.readouterr().err) < LONGEST_LINE + 10


def test_any_value_can_be_quoted():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    assert quoted("a" * 10**7).startswith("'aaa") and len(quoted("a" * 10**7)) == 60
    assert quoted(16**5000) == "a huge int" and quoted(deep) == "a huge list" and quoted("é") == "'é'"


def test_a_config_named_with_an_escape_sequence(tmp_path):
    """The whole way out, in a process of its own."""
    name = tmp_path / "a\x1b]0;owned\x07\nerror: b.yaml"
    command = [sys.executable, "-m", "adalora_scale", "train", "--config", str(name)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and len(run.stderr.splitlines()) == 1
    assert "\x1b" not in run.stderr and r"\x1b]0;owned\x07" in run.stderr
