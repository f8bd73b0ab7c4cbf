"""Reading the small text files that launches are described in."""

from __future__ import annotations

from pathlib import Path

from adalora_scale.errors import UserError


def read_lines(path: Path, what: str) -> list[str]:
    """Return a file's lines.

    Args:
        path: the file.
        what: its name in messages, for example "the hostfile".

    Raises:
        UserError: it cannot be read, or is not UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{what} {path} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text; save it as UTF-8.") from None
