"""Doing costly preparation once among all processes of a job, without any collective.

Ranks that wait for a slow one inside a collective are killed by its timeout (axolotl#2684), so the wait is on a file
lock: the first process builds a directory under a temporary name and renames it, the others find it complete.
The directory's name is a digest of everything that decides its content.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
from filelock import FileLock, Timeout

from adalora_scale.errors import UserError, full_disk
from adalora_scale.files import sync_tree, writing

logger = logging.getLogger(__name__)


def default_cache_dir() -> Path:
    """Return the directory of prepared data, inside the cache of the datasets library."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "adalora_scale"


def build_once(cache_dir: Path, key: str, build: Callable[[Path], None]) -> Path:
    """Return ``cache_dir/key``, calling `build` on a temporary directory if it does not exist yet.

    Args:
        cache_dir: directory shared by the processes that should share the work.
        key: digest of everything that decides the content.
        build: fills the directory it is given; what it raises passes through, and nothing is left behind.

    Raises:
        UserError: the disk is full, or the directory cannot be written.
    """
    final = cache_dir / key
    if final.is_dir():
        return final
    with writing(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_dir / f"{key}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.info("waiting for another process to prepare the data in %s", final)
        lock.acquire()
    try:
        if final.is_dir():
            return final
        for leftover in cache_dir.glob(f"{key}.tmp-*"):  # of a process that died; nobody else may write under the lock
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=cache_dir))
        try:
            build(temporary)
            sync_tree(temporary)  # a crash must not keep the name and lose the bytes
            temporary.chmod(0o755 & ~_umask())  # mkdtemp's 0700 would lock a shared cache to one user
            temporary.rename(final)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if (reason := full_disk(error)) is not None:
                raise UserError(
                    f"{cache_dir}, the cache of prepared data, cannot be written: {reason}; free some room there, or "
                    f"set HF_DATASETS_CACHE to a folder on another disk."
                ) from None
            raise
    finally:
        lock.release()
    return final


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
