"""Checks the `#SBATCH` lines of a job script for what SLURM silently takes as it stands or never reads.

SLURM reads these lines itself, before any shell: `#SBATCH --nodes=$NODES` asks for a number of nodes called `$NODES`,
and an output folder that does not exist makes a job vanish without a file.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.reading.text import read_text

_PATTERNS = set("AaJjNnstuxbr%")  # sbatch(1), "filename pattern"; digits may stand between
_PATHS = ("--output", "-o", "--error", "-e")


def check_sbatch(path: Path) -> None:
    """Check a job script's directives.

    Raises:
        UserError: naming the first line that SLURM would misread, and what to write.
    """
    lines = read_text(path, "the job script").splitlines()
    if not lines or not lines[0].startswith("#!"):
        raise UserError(f"{path} line 1: sbatch takes scripts that begin with #!, for example #!/usr/bin/env bash.")
    command = 0
    for number, line in enumerate(lines, start=1):
        place = f"{path} line {number}"
        if not line.startswith("#"):
            command = command or (number if line.strip() else 0)
            if re.match(r"\s+#SBATCH\b", line):
                raise UserError(
                    f"{place}: an #SBATCH that does not begin its line is a comment to SLURM; move it left."
                )
            continue
        if re.match(r"#\s*SBATCH\b", line, re.IGNORECASE) is None:
            continue
        if not re.match(r"#SBATCH\s", line):
            raise UserError(f"{place}: SLURM reads `#SBATCH` only as it is written here, in capitals and in one word.")
        if command:
            raise UserError(f"{place}: SLURM stops reading #SBATCH at the first command (line {command}); move it up.")
        _check_options(line.removeprefix("#SBATCH"), place, path)


def _check_options(text: str, place: str, path: Path) -> None:
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise UserError(f"{place}: {error}; close the quotation mark.") from None
    if not words or not words[0].startswith("-"):
        raise UserError(f"{place}: `{' '.join(words)}` is no option; write for example --nodes=2.")
    for name, value in _options(words):
        if found := re.search(r"\$\w*\{?\w*\}?|`|\$\(", value):
            typed = f"{name}=VALUE" if name.startswith("--") else f"{name} VALUE"
            raise UserError(
                f"{place}: SLURM does not expand `{found[0]}`, it reads it as it stands. Write the value, or give it "
                f"to sbatch: sbatch {typed} {path.name}"
            )
        if name in (*_PATHS, "--chdir", "-D") and value.startswith("~"):
            raise UserError(f"{place}: SLURM does not expand `~`; write the whole path.")
        if name in _PATHS:
            _check_path(value, place)


def _options(words: list[str]) -> Iterator[tuple[str, str]]:
    """Yield (option, value) from --x=VALUE, --x VALUE, -xVALUE and -x VALUE."""
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        name, equals, value = word.partition("=") if word.startswith("--") else (word[:2], word[2:], word[2:])
        if not equals and place < len(words) and not words[place].startswith("-"):
            value = words[place]
            place += 1
        yield name, value


def _check_path(target: str, place: str) -> None:
    for pattern in re.findall(r"%\d*(.)", target):
        if pattern not in _PATTERNS:
            raise UserError(
                f"{place}: SLURM knows no `%{pattern}` in a file name; %x is the job's name, %j its number."
            )
    folder = Path(target).parent
    if "%" not in str(folder) and not folder.is_dir():
        raise UserError(
            f"{place}: the folder {folder} does not exist, and SLURM makes none: the job would leave no output."
        )
