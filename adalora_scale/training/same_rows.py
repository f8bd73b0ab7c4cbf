"""Whether all ranks read the same rows: nodes with disks of their own may hold other files under one name.

The sampler deals out row numbers, so that ranks with other rows train on some twice and on others never, and nothing
else would show it. Ranks compare what they read, not paths and times: digests of the rows that came out of the files,
and of what decides their tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from adalora_scale.data.digests import digest
from adalora_scale.data.preparing import Prepared
from adalora_scale.data.rows import RawData
from adalora_scale.engines.ranks import everywhere
from adalora_scale.errors import UserError

_SHOWN = 4


def require_same_rows(raw: RawData, data: Prepared) -> None:
    """Compare what this rank read with what the others read; a collective call, before the model is loaded.

    Raises:
        UserError: on all ranks, the same line: which ranks read other rows of what, and how many.
    """
    everyone = everywhere(lambda: _read(raw, data))
    for what in ("data.train", "data.eval"):
        read = [own[what] for own in everyone]
        if len(set(read)) > 1:
            raise UserError(
                f"ranks read other rows of {what}: {_by_ranks(read)}; put the same files on every node, or name files "
                "that all of them share."
            )
    for what, fix in (
        ("classes", "put the same files on every node"),
        ("tokens of the same rows", "give every node the same tokenizer, packages and configuration"),
    ):
        read = [own[what] for own in everyone]
        if len(set(read)) > 1:
            ranks = [rank for rank, own in enumerate(read) if own != read[0]]
            raise UserError(f"{_named(ranks)} {'has' if len(ranks) == 1 else 'have'} other {what} than rank 0; {fix}.")


def _read(raw: RawData, data: Prepared) -> dict[str, tuple[int, str]]:
    parts = {"data.train": (raw.train, "train"), "data.eval": (raw.eval, "eval")}
    read = {
        what: (0, "") if part is None else (part.num_rows, data.contents.get(name, ""))
        for what, (part, name) in parts.items()
    }
    return read | {"classes": (0, digest(raw.label_names)), "tokens of the same rows": (0, data.key)}


def _by_ranks(read: Sequence[tuple[int, str]]) -> str:
    """Return who read how many rows: `64 rows on rank 0, 60 rows on ranks 1, 2, 64 other rows on rank 3`."""
    groups: dict[tuple[int, str], list[int]] = {}
    for rank, value in enumerate(read):
        groups.setdefault(value, []).append(rank)
    said, counts = [], set()
    for (count, _), ranks in list(groups.items())[:_SHOWN]:
        said.append(f"{count:,} {'other ' if count in counts else ''}rows on {_named(ranks)}")
        counts.add(count)
    rest = len(groups) - _SHOWN
    return ", ".join(said) + (f" and {rest:,} more variants" if rest > 0 else "")


def _named(ranks: list[int]) -> str:
    rest = len(ranks) - 8
    shown = ", ".join(map(str, ranks[:8])) + (f" and {rest:,} more" if rest > 0 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
