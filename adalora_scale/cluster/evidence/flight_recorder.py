"""Torch's flight recorder, read: which collective ranks wait in, and which rank did not come.

A record is the last few thousand collectives a process entered. NCCL's watchdog writes one a rank when a collective
times out; `dump` writes the same for gloo. (torch's own reader, `torchfrtrace --prefix flight_recorder_ LOG_DIR`, takes
NCCL's; in 2.13 it fails on gloo's, whose groups it cannot name.)
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "flight_recorder_"
"""Files are PREFIX + rank; launch/environment.sh gives the same prefix to NCCL."""


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective as one rank entered it."""

    group: str
    number: int
    """Its place in the sequence of the group's collectives, from 1."""
    operation: str
    """For example `all_reduce`."""
    shape: str
    """Sizes and dtype of what went in, for example `[512] float`."""

    def __str__(self) -> str:
        return f"{self.operation} #{self.number} of {self.shape} in {self.group}"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one rank's recorder held."""

    entered: dict[str, dict[int, Collective]]
    """{group: {number: collective}}"""
    members: dict[str, list[int]]
    """{group: its ranks}, as far as the recorder knows them."""

    def last(self, group: str) -> int:
        """Return the number of the last collective entered in `group`, 0 for none."""
        return max(self.entered.get(group, {}), default=0)


def dump(folder: Path, rank: int) -> None:
    """Write this process's record for `rank`; nothing happens when torch recorded nothing or has no recorder."""
    try:
        from torch._C import _distributed_c10d as c10d

        content = c10d._dump_fr_trace()  # type: ignore[attr-defined]
    except (ImportError, AttributeError, RuntimeError):
        return
    path = folder / f"{PREFIX}{rank}"
    if path.exists():
        return  # NCCL's watchdog was here first and knows more
    unfinished = folder / f".{path.name}.partial"
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def read_records(folder: Path) -> dict[int, Record]:
    """Return {rank: record} of every readable record in `folder`."""
    found = {}
    for path in folder.glob(f"{PREFIX}*"):
        rank = path.name.removeprefix(PREFIX)
        if rank.isdigit() and (tree := _load(path.read_bytes())) is not None:
            found[int(rank)] = _record(tree)
    return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What the records of all ranks say about a hang."""

    text: str
    """Who waited in which collective for whom, in one line."""
    late: list[int]
    """The ranks that were waited for; empty when all entered, but different, collectives."""


def explain(records: dict[int, Record], world_size: int, names: dict[int, str]) -> Finding | None:
    """Say who waits in which collective for whom; None when the records show no difference.

    Args:
        records: {rank: record}; ranks that left none are missing.
        world_size: number of ranks of the run.
        names: {rank: "rank 3 on node7"} for the message.
    """

    def name(rank: int) -> str:
        return names.get(rank, f"rank {rank}")

    silent = [rank for rank in range(world_size) if rank not in records]
    for group in sorted({group for record in records.values() for group in record.entered}):
        present = [rank for rank in records if records[rank].last(group) or rank in _members(records, group)]
        last = {rank: records[rank].last(group) for rank in present}
        if not last:
            continue
        first, final = min(last.values()), max(last.values())
        if first < final:
            late = [rank for rank in present if last[rank] == first]
            waiting = [rank for rank in present if last[rank] > first]
            what = records[waiting[0]].entered[group].get(first + 1)
            before = records[late[0]].entered.get(group, {}).get(first)
            text = (
                f"{_and(name(rank) for rank in waiting)} waited in {what or f'collective #{first + 1} in {group}'}; "
                f"{_and(name(rank) for rank in late)} never entered it"
                + (f" (last entered: {before})" if before else " (entered none)")
            )
            return Finding(text=text, late=late)
        entered = {rank: records[rank].entered[group][final] for rank in present if final}
        if len({(one.operation, one.shape) for one in entered.values()}) > 1:
            text = "; ".join(f"{name(rank)} {one}" for rank, one in entered.items())
            return Finding(text=f"ranks entered different collectives: {text}", late=[])
        if silent and entered:
            what = next(iter(entered.values()))
            text = f"{_and(map(name, entered))} waited in {what}; {_and(map(name, silent))} left no record"
            return Finding(text=text, late=silent)
    return None


def _members(records: dict[int, Record], group: str) -> set[int]:
    return {rank for record in records.values() for rank in record.members.get(group, [])}


def _and(words: Any) -> str:
    listed = list(words)
    if len(listed) > 4:
        listed = [*listed[:3], f"{len(listed) - 3} more ranks"]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def _record(tree: dict[str, Any]) -> Record:
    entered: dict[str, dict[int, Collective]] = defaultdict(dict)
    members: dict[str, list[int]] = {}
    for entry in tree.get("entries", []):
        if entry.get("is_p2p"):
            continue
        number, description = entry["process_group"]
        group = description if description in ("", "default_pg") else f"{description} ({number})"
        entered[group][entry["collective_seq_id"]] = Collective(
            group=group or "default_pg",
            number=entry["collective_seq_id"],
            operation=entry["profiling_name"].split(":")[-1],
            shape=_shape(entry),
        )
        config = tree.get("pg_config", {}).get(number) or tree.get("pg_config", {}).get("", {})
        try:
            members[group] = json.loads(config.get("ranks", "[]"))
        except ValueError:
            members[group] = []
    return Record(entered=dict(entered), members=members)


def _shape(entry: dict[str, Any]) -> str:
    sizes, dtypes = entry.get("input_sizes") or [], entry.get("input_dtypes") or []
    pieces = [f"{list(size)} {str(dtype).lower()}" for size, dtype in zip(sizes, dtypes, strict=False)]
    if len(pieces) > 2:
        pieces = [pieces[0], f"{len(pieces) - 1} more tensors"]
    return " and ".join(pieces) or "nothing"


def _load(content: bytes) -> dict[str, Any] | None:
    try:
        tree = _PlainUnpickler(io.BytesIO(content)).load()
    except (pickle.UnpicklingError, EOFError, ValueError, AttributeError, IndexError, KeyError):
        return None
    return tree if isinstance(tree, dict) else None


class _PlainUnpickler(pickle.Unpickler):
    """torch writes its records as pickles of plain dictionaries, lists, strings and numbers: nothing else is read."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a flight record holds no {module}.{name}")
