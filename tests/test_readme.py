"""The code of the README and of docs/ works as printed, and the files that the README's commands name exist."""

import os
import re
import subprocess
import sys
import textwrap

import pytest

from tests.conftest import ROOT

README = ROOT / "README.md"
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
OUR_FOLDERS = {"launch", "configs", "tests", "docker", "docs", "benchmarks", "adalora_scale"}


def blocks(*languages, page=README):
    """Return (line number, text) of a page's blocks in one of the languages."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    return [
        (text[: match.start()].count("\n") + 1, textwrap.dedent(match[3]))
        for match in FENCE.finditer(text)
        if match[2] in languages
    ]


def paths_in(shell):
    """Return the words of a shell block that look like files of this project."""
    code = "\n".join(line.split(" #")[0] for line in shell.splitlines() if not line.lstrip().startswith("#"))
    words = re.split(r"[\s='\"`(),;|&<>]+", code)
    return {
        word.removeprefix("./").rstrip("/")
        for word in words
        if "/" in word and word.removeprefix("./").split("/")[0] in OUR_FOLDERS and not re.search(r"[*$\[{]", word)
    }


def test_python_blocks_run_as_printed(tmp_path):
    """The first thing a newcomer pastes would fail."""
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    found = [(page, *block) for page in pages for block in blocks("python", "py", page=page)]
    if not found:
        pytest.skip("there is no python block")
    for page, line, code in found:
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=_checkout(tmp_path / f"{page.stem}-{line}"),
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, f"{page.name}:{line}\n{code}\n{result.stderr[-3000:]}"


def _checkout(folder):
    """A folder in which the project's paths lead to its files, while what a block writes stays out of the project."""
    folder.mkdir()
    for entry in ROOT.iterdir():
        if entry.name not in ("runs", ".git"):
            (folder / entry.name).symlink_to(entry)
    (folder / "runs").mkdir()
    return folder


def test_files_named_in_shell_blocks_exist():
    """A command that was renamed would stay in the README for ever."""
    found = blocks("bash", "sh", "shell", "console")
    if not found:
        pytest.skip("README.md has no shell block")
    missing = {
        f"README.md:{line}: {path}" for line, shell in found for path in paths_in(shell) if not (ROOT / path).exists()
    }
    assert not missing


def test_paths_are_recognised_in_commands():
    """The check above would pass on anything if it saw no path."""
    shell = """
    # bash launch/comment.sh
    bash ./launch/quickstart.sh   # about launch/other.sh
    python launch/train.py --config configs/recipes/a.yaml data.train=tests/x.jsonl training.output_dir=runs/a $x/launch
    """
    assert paths_in(shell) == {"launch/quickstart.sh", "launch/train.py", "configs/recipes/a.yaml", "tests/x.jsonl"}
