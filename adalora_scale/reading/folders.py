"""Which files are a folder's own: what its names and links point to elsewhere is neither read nor copied."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from adalora_scale.errors import UserError
from adalora_scale.reading.json_text import shown

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
"""Endings of files that can run code when they are opened."""


def own_file(path: Path, folder: Path, *, error: type[UserError] = UserError) -> Path:
    """Return a file's path if it is the folder's own: not a link to somewhere else.

    Three kinds of links are a folder's own: those of a snapshot in the hub's cache (`snapshots/<commit>/`) to the
    `blobs/` beside it; those of a download to the blobs of such a cache; and weights that lie on another disk, a link
    named `….safetensors` to a file named so: only tensors can be read from it. The folder itself may be a link.

    Raises:
        UserError: (as `error`) it leads out of the folder.
    """
    try:
        home, real = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as problem:  # links that lead in a circle
        raise error(f"{path} cannot be read ({problem}); put the file itself there.") from None
    if real.is_relative_to(home):
        return path
    repository = home.parent.parent
    if home.parent.name == "snapshots" and real.is_relative_to(repository / "blobs"):
        return path
    if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--"):
        return path
    if path.suffix == real.suffix == ".safetensors":
        return path
    raise error(
        f"{path} leads out of its folder (to {shown(str(real))}), so it is not read; put the file itself there."
    )


def named_file(name: str, folder: Path, *, source: Path, error: type[UserError] = UserError) -> Path:
    """Return the path of a file that another file of the folder names.

    Args:
        name: relative to the folder, as `source` says it.
        folder: where it must lie.
        source: the file with the name in it, for messages.
        error: what is raised.

    Raises:
        UserError: (as `error`) the name is absolute or leads out of the folder.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        raise error(f"{source} names the file {shown(name)}, which is not one inside its folder; get the files again.")
    return own_file(folder / name, folder, error=error)


def refuse_pickle(path: Path, way_out: str, *, error: type[UserError] = UserError) -> None:
    """Refuse a file by its ending, before it is opened.

    Raises:
        UserError: (as `error`) it is a pickle's.
    """
    if path.suffix.lower() in PICKLES:
        raise error(f"{path} is a pickle, which can run code when it is opened, so it is not read. {way_out}")
