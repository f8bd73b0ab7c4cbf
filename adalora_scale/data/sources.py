"""From one name in `data.train` or `data.eval` to its rows: a file, a pattern, a folder, a saved data set, a hub id.

One name is one `Source`, however many files it stands for. Files come in the order of their paths, character by
character, on every machine.
"""

from __future__ import annotations

import glob
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adalora_scale.data.names import ENDINGS, PACKED, is_local, kind_of, local_path
from adalora_scale.data.row_files import LARGE, check_file, file_identity, file_stamp, iterate_rows, sample_of
from adalora_scale.data.row_table import Source
from adalora_scale.data.saved_tables import hub_source, is_saved, saved_source
from adalora_scale.errors import UserError
from adalora_scale.process_rank import process_rank

logger = logging.getLogger(__name__)

_SHOWN = 10


def open_source(name: str, configuration: str | None, split: str) -> Source:
    """Return the rows that a name stands for.

    Args:
        name: a file, a pattern (`*`, `?`, `[…]`, `**` for folders at any depth), a folder of files, a folder that
            `save_to_disk` of the datasets library wrote, or a hub id.
        configuration: of a hub data set.
        split: of a hub data set or a saved `DatasetDict`.

    Raises:
        UserError: there is nothing of that name, or it cannot be read; names it and the fix.
    """
    if not is_local(name):
        return hub_source(name, configuration, split)
    path = local_path(name)
    if os.path.isdir(path):
        return saved_source(name, path, split) if is_saved(path) else _of_files(name, _in_folder(name, path))
    if glob.has_magic(name) and not os.path.lexists(path):
        return _of_files(name, _matching(name, path))
    return _of_files(name, [name])


def say_idle_keys(train: list[Source], eval: list[Source], *, configuration: bool, splits: tuple[str, ...]) -> None:
    """Name keys that were set and that no source has a use for: a recipe's, where its hub id was replaced by a file.

    Args:
        train, eval: the sources.
        configuration: whether `data.name` is set.
        splits: those of `train_split` and `eval_split` that are set.
    """
    of = {"train_split": train, "eval_split": eval}
    idle = [f"data.{key}" for key in splits if not any("split" in source.keys for source in of[key])]
    if configuration and not any("name" in source.keys for source in [*train, *eval]):
        idle.append("data.name")
    if idle and process_rank() == 0:
        logger.warning("data: not used: %s, which hub ids (and splits also saved DatasetDicts) have", ", ".join(idle))


def refuse_shared_files(train: list[Source], eval: list[Source]) -> None:
    """Refuse a pattern or a folder of training data that takes in a file of the evaluation data.

    Raises:
        UserError: names the file.
    """
    held_out = {file for source in eval for file in source.files}
    for source in train:
        if len(source.files) > 1 and (shared := held_out & set(source.files)):
            raise UserError(
                f"data.train={source.name} takes in {min(shared).name} of data.eval, so that evaluation rows would be "
                "trained on; write a pattern without it, or list the files."
            )


def refuse_files_read_twice(train: list[Source]) -> None:
    """Refuse training data that takes in a file twice, where a part of its rows is held out.

    Raises:
        UserError: names the file.
    """
    counts = Counter(place for source in train for place in ([str(f.resolve()) for f in source.files] or [source.name]))
    if twice := sorted(place for place, count in counts.items() if count > 1):
        raise UserError(
            f"data.train takes in {Path(twice[0]).name} twice, so that data.eval_fraction would hold out rows "
            "that are trained on; name it once ({path, weight} shows rows more often), or name data.eval."
        )


def _in_folder(name: str, path: Path) -> list[str]:
    """Return the files of rows in a folder, sorted, and say once what else is there."""
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None
    folders = [entry.name for entry in entries if entry.is_dir()]
    files = [entry.name for entry in entries if entry.name not in set(folders)]
    rows = [file for file in files if not file.startswith(".") and kind_of(Path(file)) is not None]
    if not rows:
        deeper = f"; folders inside are read by a pattern such as {os.path.join(name, '**', '*.jsonl')}"
        raise UserError(f"{name} is a folder without files of rows ({ENDINGS}){deeper if folders else ''}.")
    _say_unread(name, [*(file for file in files if file not in set(rows)), *(f"{folder}/" for folder in folders)])
    return [os.path.join(name, file) for file in rows]


def _matching(name: str, path: Path) -> list[str]:
    """Return the files of rows that a pattern matches, sorted, and say once what else it matches."""
    found = sorted(glob.glob(str(path), recursive=True))
    files = [file for file in found if not os.path.isdir(file)]
    rows = [file for file in files if kind_of(Path(file)) is not None]
    if not rows:
        what = f"matches only {_listed(found)}, no file of rows ({ENDINGS})" if found else "matches no file"
        literal = "; a bracket that is part of a name is written [[]" if "[" in name else ""
        raise UserError(f"{name} {what} (looked in {Path.cwd()}){literal}.")
    folders = [] if "**" in name else [f"{file}/" for file in found if os.path.isdir(file)]
    _say_unread(name, [*(file for file in files if kind_of(Path(file)) is None), *folders])
    return rows


def _say_unread(name: str, others: list[str]) -> None:
    if others and process_rank() == 0:
        logger.warning("data: %s: not read: %s", name, _listed(others))


def _listed(names: Collection[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(list(names)[:_SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def _of_files(name: str, files: list[str]) -> Source:
    paths = [check_file(file) for file in files]
    for path in paths:
        for twin in (path.with_name(path.name + ending) for ending in PACKED):
            if twin in paths:
                raise UserError(
                    f"{name} takes in both {path.name} and {twin.name}, by their names the same rows; remove one of "
                    "them or name the files."
                )
    if len(files) > 1 and process_rank() == 0:
        logger.info("data: %s: %d files: %s", name, len(files), _listed(files))
    columns, first = sample_of(files[0])

    def rows(wanted: Collection[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        for file in files:
            yield from _some(file, iterate_rows(file, wanted))

    real = tuple(path.resolve() for path in paths)
    return Source(name, columns, first, rows, _identity(paths), files=real)


def _some(file: str, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    none = True
    for row in rows:
        none = False
        yield row
    if none:
        raise UserError(f"data file {file} has no rows.")


def _identity(paths: list[Path]) -> list[Any] | None:
    if len(paths) == 1:
        return file_identity(paths[0])
    small = all(file_identity(path) is None for path in paths) and sum(p.stat().st_size for p in paths) < LARGE
    return None if small else [file_stamp(path) for path in paths]
