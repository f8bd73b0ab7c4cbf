"""When one rank's collective times out, every rank leaves its flight record and its stacks before the launcher ends it.

The ranks cannot talk in collectives any more, so they talk through the log folder: the first to fail puts a request
there, a thread of each rank looks for it. Over hosts that works where the folder is shared.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from pathlib import Path

from adalora_scale.cluster.evidence import flight_recorder
from adalora_scale.cluster.evidence.status import Status, newest_attempt, read_statuses

REQUEST = "dump.request"
STACKS_SUFFIX = ".stacks"
_POLL_S = 2.0
_PATIENCE_LATE_S, _PATIENCE_GONE_S = 10.0, 3.0
"""How long a failed rank waits for the records of ranks that are late, and where one is gone and can leave none.
Launchers end all ranks once one has exited."""


class HangWatch:
    """Answers other ranks' requests for evidence, and asks for theirs.

    Args:
        folder: the run's log folder.
        status: this rank's.
    """

    def __init__(self, folder: Path, status: Status) -> None:
        self._folder = folder
        self._status = status
        self._answered = threading.Lock()
        self._stop = threading.Event()
        self._old_request = self._request_time()
        for old in (folder / f"{flight_recorder.PREFIX}{status.rank}", self._stacks):
            old.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="adalora-hang-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()

    def collect(self, *, late: bool) -> str | None:
        """Ask all ranks for their records, wait a few seconds for them, and say which rank did not come to what.

        Args:
            late: a collective timed out, so that all ranks may be alive to answer; else a connection broke.
        """
        request = self._folder / REQUEST
        request.touch()
        self._answer()
        deadline = time.monotonic() + (_PATIENCE_LATE_S if late else _PATIENCE_GONE_S)
        while time.monotonic() < deadline:
            records = flight_recorder.read_records(self._folder)
            if len(records) >= self._status.world_size:
                break
            time.sleep(0.2)
        records = flight_recorder.read_records(self._folder)
        statuses = newest_attempt(read_statuses(self._folder))
        names = {status.rank: f"rank {status.rank} on {status.host}" for status in statuses}
        found = flight_recorder.explain(records, self._status.world_size, names)
        return found.text if found else None

    @property
    def _stacks(self) -> Path:
        return self._folder / f"{self._status.name}{STACKS_SUFFIX}"

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            if self._request_time() != self._old_request:
                self._answer()
                return

    def _request_time(self) -> int | None:
        try:
            return (self._folder / REQUEST).stat().st_mtime_ns
        except OSError:
            return None

    def _answer(self) -> None:
        """Write where every thread of this rank is, and its record, once."""
        if not self._answered.acquire(blocking=False):
            return
        try:
            with open(self._stacks, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
                file.flush()
                os.fsync(file.fileno())
            flight_recorder.dump(self._folder, self._status.rank)
        except OSError:
            return  # evidence is welcome, not worth another failure
