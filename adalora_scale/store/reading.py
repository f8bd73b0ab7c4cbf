"""A folder on a store for a verb that reads: its files are copied here first, and go when the process ends."""

from __future__ import annotations

import argparse
import atexit
import shutil
import sys
import tempfile
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.files import is_url, writing
from adalora_scale.messages import say
from adalora_scale.store.client import Store

_copies: set[Path] = set()


def readable_folder(text: str) -> Path:
    """Return the folder that an argument names, for argparse's `type`; of a URL a copy in the temporary folder.

    Folders inside of it (a run's checkpoints) are left out: name one by its own URL.

    Raises:
        ArgumentTypeError: the URL is none of a store, nothing is there, or it cannot be read.
    """
    if not is_url(text):
        return Path(text)
    try:
        return _copy(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def is_copy(folder: Path) -> bool:
    """Whether a folder is such a copy, in which nothing must be written."""
    return folder in _copies


def _copy(url: str) -> Path:
    store = Store("URL", url)
    names = [name for name, size in store.names().items() if size is not None and not name.startswith(".")]
    if not names:
        raise UserError(f"{url} holds no files; name a run's folder on the store, or one of its checkpoints.")
    say(f"downloading {len(names)} files of {url}", to=sys.stderr)  # standard output may be read by a program
    above = Path(tempfile.mkdtemp(prefix="adalora-scale-"))
    atexit.register(shutil.rmtree, above, ignore_errors=True)
    folder = above / url.rstrip("/").rpartition("/")[2]  # names of runs are shown
    with writing(folder):
        folder.mkdir()
        for name in names:
            store.get(name, folder / name)
    _copies.add(folder)
    return folder
