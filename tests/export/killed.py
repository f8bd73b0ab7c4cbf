"""Kills the process that publishes a folder, at every step it makes, and prints as JSON what was there each time.

    python tests/export/killed.py FOLDER {swap,renames} {new,old}

Python tells an audit hook of each call that opens, renames, makes or deletes something: the n-th one is the process's
last. A second process then makes the next call, as a user would.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.export import publishing
from adalora_scale.export.output import output_folder
from adalora_scale.export.record import write_record

STEPS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "ctypes.dlsym")
FILES = ("config.json", "weights/part-1", "weights/part-2")


def write(out: Path, word: str, *, overwrite: bool = True) -> None:
    with output_folder(out, overwrite=overwrite, inputs=[]) as folder:
        (folder / "weights").mkdir()
        for name in FILES:
            (folder / name).write_text(f"{word} {name}")
        write_record(folder, {"format": word})


def seen(out: Path) -> str | None:
    """`old` or `new` for a folder that is whole, None for no folder, else what is wrong with it."""
    if not out.exists():
        return None
    words = {(out / name).read_text().split()[0] for name in FILES if (out / name).exists()}
    names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    whole = names == {*FILES, "export.json"} and len(words) == 1
    return words.pop() if whole else f"damaged: {sorted(names)} {sorted(words)}"


def in_a_child(action) -> tuple[int, str]:
    """Run it in a process of its own; return how that ended and its standard error."""
    read, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write_end, 2)
        code = 0
        try:
            action()
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            code = 2
        os._exit(code)
    os.close(write_end)
    with os.fdopen(read) as file:
        said = file.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


def killed_at(number: int, out: Path):
    count = 0

    def hook(event: str, _) -> None:
        nonlocal count
        if event in STEPS:
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)

    def action() -> None:
        sys.addaudithook(hook)
        write(out, "new")

    return action


def main() -> None:
    root, how, before = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    if how == "renames":  # as on a file system that cannot exchange two names
        publishing.swap = lambda one, other: False
    out, found, number, ended = root / "out", [], 0, -signal.SIGKILL
    while ended == -signal.SIGKILL:
        number += 1
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if before == "old":
            write(out, "old")
        ended, said = in_a_child(killed_at(number, out))
        row = {"ended": ended, "said": said, "killed": seen(out)}
        row["hidden"] = sorted(path.name.split("-")[0] for path in root.iterdir() if path != out)
        row["refused"] = in_a_child(lambda: write(out, "third", overwrite=False))
        row["after refusal"] = seen(out)
        row["next"] = in_a_child(lambda: write(out, "next"))
        row["after"], row["left"] = seen(out), sorted(path.name for path in root.iterdir())
        found.append(row)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
