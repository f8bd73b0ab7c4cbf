"""`inspect` on a terminal and off it, and its `--why`."""

import contextlib
import json
import os
import sys

import pytest
import torch

from adalora_scale.cli import main
from adalora_scale.report import terminal
from tests.export.adapters import base_folder, trained
from tests.report.runs import matrices, write_run


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Run a verb with a real pseudo-terminal as standard output; return what it shows."""

    def run(*arguments, columns=120):
        ours, theirs = os.openpty()
        os.set_blocking(ours, False)
        with open(theirs, "w") as file, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            patch.setenv("COLUMNS", str(columns))
            patch.setenv("TERM", "xterm-256color")
            assert main([*arguments]) == 0
            shown = b""
            with contextlib.suppress(BlockingIOError):
                while True:
                    shown += os.read(ours, 2**16)
        os.close(ours)
        return shown.decode().replace("\r\n", "\n")

    return run


@pytest.fixture
def adapter(request, tmp_path):
    torch.manual_seed(0)
    trained(base_folder("gpt2", tmp_path, request), "gpt2", tmp_path / "run")
    return str(tmp_path / "run")


def test_a_terminal_shows_shades_and_everything_else_plain_text(adapter, on_a_terminal, capsys, monkeypatch):
    """Escape codes in a log file or a pipe are noise; without them on a terminal there is no heat map."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = on_a_terminal("inspect", adapter)
    assert main(["inspect", adapter]) == 0
    plain = capsys.readouterr().out
    assert "\x1b[" in shown and "\x1b" not in plain
    without = "".join(part.partition("m")[2] if place else part for place, part in enumerate(shown.split("\x1b[")))
    assert without.split() == plain.split()
    assert len({len(line) for line in without.splitlines()[-4:]}) == 1, "columns line up"
    assert on_a_terminal("inspect", adapter, columns=20) == plain  # too narrow for the table
    monkeypatch.setenv("NO_COLOR", "1")
    assert on_a_terminal("inspect", adapter) == plain


def test_experts_and_strangers_names_have_their_place(capsys, monkeypatch):
    """A model's names come from a file; a terminal obeys what is written to it."""
    ranks = {"m.0.experts.0.up": 1, "m.0.experts.1.up": 4, "m.0.q": 0, "m.1.q": 4, "score\x1b[2J": 2}
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal.print_rank_maps("above", ranks)
    shown = capsys.readouterr().out
    assert "1–4" in shown and "score\\x1b[2J" in shown and "\x1b" not in shown
    assert [line.split() for line in shown.splitlines() if line.strip().startswith(("0", "1", "sum"))] == [
        ["0", "1–4", "0", "5"], ["1", "4", "4"], ["sum", "5", "4", "9"],
    ]  # fmt: skip


def test_why_a_matrix_has_its_rank(tmp_path, capsys):
    """The figures are those of the last allocation; of a checkpoint those that it could know."""
    folder = write_run(tmp_path / "run", matrices(2), r=4, steps=60, deltas=3)
    (folder / "checkpoint-31").mkdir()
    assert main(["inspect", str(folder), "--why", "layers.1.mlp.up_proj", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    last = json.loads((folder / "ranks.jsonl").read_text().splitlines()[-1])
    name = "model.layers.1.mlp.up_proj"
    assert (found["module"], found["step"], found["budget"]) == (name, last["step"], last["budget"])
    assert len(found["kept"]) == last["ranks"][name] and len(found["kept"] + found["dropped"]) == 4
    assert found["size"] == 64 + 160 + 1
    assert main(["inspect", str(folder), "--why", "layers.1.mlp.up_proj"]) == 0
    text = capsys.readouterr().out
    assert text.count("kept\n") + text.count("dropped") == 4 and f"rank {last['ranks'][name]} of 4" in text
    assert f"{found['needs']:,} parameters more budget" in text
    assert main(["inspect", str(folder / "checkpoint-31"), "--why", "1.mlp.up", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 30


def test_why_without_records_is_one_line(tmp_path, capsys):
    """Adapters of others, runs from before the records, a mistyped name."""
    (tmp_path / "metrics.jsonl").write_text("")
    folder = write_run(tmp_path / "run", matrices(2))
    for arguments, message in (
        ([tmp_path, "--why", "q"], "has none yet (scores.jsonl of a run's output_dir"),
        ([folder, "--why", "q_proj"], "means 2 matrices"),
        ([folder, "--why", "nothing like it"], "no adapted matrix has that in its name"),
    ):
        assert main(["inspect", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
