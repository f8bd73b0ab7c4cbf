"""Disk throughput, and whether a folder is one file system for all ranks."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import Any

from adalora_scale.cluster.preflight.facts import Host
from adalora_scale.cluster.preflight.findings import Finding, Status
from adalora_scale.cluster.ranks import Board

CHUNK = 8 << 20
MOST_BYTES = 512 << 20
"""Bytes read or written by one host."""
MOST_SECONDS = 4.0
UNWRITABLE = "output_dir writable"
"""The check's name where rank 0 itself cannot write."""
_PROBE_PATIENCE_S = 5.0  # network file systems cache that a file is absent


def check_shared_folder(board: Board, folder: Path, hosts: list[Host] | None) -> list[Finding]:
    """See whether a file that rank 0 makes in `folder` is there for every rank; every rank calls this.

    Returns:
        The findings on rank 0; an empty list elsewhere.
    """
    probe: str | None = None
    problem = ""
    if board.place.rank == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = f".preflight-{secrets.token_hex(8)}"
            (folder / probe).touch()
        except OSError as error:
            probe, problem = None, error.strerror or str(error)
    try:
        name = board.announce("probe", probe)
        seen = board.collect("probe seen", name is None or _appears(folder / name))
        board.announce("probe over")
    finally:
        if probe is not None:
            with contextlib.suppress(OSError):
                (folder / probe).unlink()
    if seen is None:
        return []
    check, where = "output_dir shared", str(folder)
    if name is None:
        return [Finding(check=UNWRITABLE, where=where, status="FAIL", text=f"rank 0 cannot write there: {problem}")]
    names = {rank: host.name for host in hosts or [] for rank in host.ranks}
    blind = [rank for rank, sees in enumerate(seen) if not sees]
    if blind:
        on = ", ".join(sorted({names.get(rank, f"rank {rank}") for rank in blind}))
        text = f"not the same folder on {on}: a file of rank 0 is not there; put it on a file system all hosts mount"
        return [Finding(check=check, where=where, status="FAIL", text=text)]
    return [Finding(check=check, where=where, status="ok", text="one folder for every rank")]


def read_throughput(folder: Path) -> dict[str, Any]:
    """Read from the largest file of `folder`, past the page cache where the system lets us.

    Returns:
        `bytes`, `seconds` and `file`, or `error`.
    """
    try:
        files = [path for path in folder.iterdir() if path.is_file()]
        largest = max(files, key=lambda path: path.stat().st_size)
        with open(largest, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            buffer = bytearray(CHUNK)
            began, done = time.perf_counter(), 0
            while done < MOST_BYTES and time.perf_counter() - began < MOST_SECONDS and (count := file.readinto(buffer)):
                done += count
            return {"bytes": done, "seconds": time.perf_counter() - began, "file": str(largest)}
    except (OSError, ValueError) as error:
        return {"error": f"{folder}: {getattr(error, 'strerror', None) or 'the folder holds no file'}"}


def write_throughput(folder: Path) -> dict[str, Any]:
    """Write a file into `folder`, until it is on the disk, and remove it; returns like `read_throughput`."""
    path = folder / f".preflight-{secrets.token_hex(8)}"
    chunk = os.urandom(CHUNK)  # file systems that compress would flatter themselves with zeros
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            began, done = time.perf_counter(), 0
            while done < MOST_BYTES // 4 and time.perf_counter() - began < MOST_SECONDS:
                done += file.write(chunk)
                os.fdatasync(file.fileno())
            return {"bytes": done, "seconds": time.perf_counter() - began, "file": str(folder)}
    except OSError as error:
        return {"error": error.strerror or str(error)}
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


def judge_throughput(check: str, host: str, measured: dict[str, Any], least_mb_s: float) -> Finding:
    """Turn one host's measurement into a finding."""
    if "error" in measured:
        return Finding(check=check, where=host, status="FAIL", text=measured["error"])
    speed = measured["bytes"] / 1e6 / max(measured["seconds"], 1e-9)
    text = f"{speed:,.0f} MB/s ({measured['bytes'] / 1e6:,.0f} MB, {measured['file']})"
    status: Status = "ok"
    if measured["bytes"] < CHUNK:
        status, text = "note", f"{text}: too little to tell"
    elif speed < least_mb_s:
        status, text = "FAIL", f"{text}, less than {least_mb_s:g}"
    return Finding(
        check=check,
        where=host,
        status=status,
        text=text,
        value=speed,
        limit=least_mb_s,
        unit="MB/s",
    )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + _PROBE_PATIENCE_S
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # makes NFS look again
        time.sleep(0.1)
    return True
