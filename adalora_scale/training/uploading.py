"""Checkpoints and results on their way to `training.output_store`, while training goes on.

One thread of rank 0, which makes no collectives, makes the store hold what output_dir holds: every complete checkpoint,
the newest first, and no more of them than `save_total_limit`. What it could not upload it says, and the next checkpoint
tries all of it again: a store that does not answer for an hour costs no training. When the run ends it is an error.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint import stored
from adalora_scale.checkpoint.background import step_back
from adalora_scale.checkpoint.errors import CheckpointError
from adalora_scale.errors import UserError, WrongEnd
from adalora_scale.export.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from adalora_scale.export.model_card import CARD_NAME
from adalora_scale.export.output import TOKENIZER_FILES
from adalora_scale.messages import cause, say
from adalora_scale.report.names import LINE_FILES, REPORT_NAME, RUN_NAME
from adalora_scale.store.client import Store, StoreError
from adalora_scale.training.output_store import KEY, OWNER_NAME
from adalora_scale.training.records import WRONG_END_NAME

_RESULTS = (WEIGHTS_NAME, CONFIG_NAME, REPORT_NAME, CARD_NAME)
_PAUSES_S = (1.0, 5.0, 15.0)
"""Between tries at the end of a run, when there is no next checkpoint to wait for."""


class _TakenOver(StoreError):
    """Another run writes there."""


@dataclass(frozen=True)
class _Request:
    limit: int | None
    best: str | None
    rotates: bool


class Uploader:
    """Uploads a run's checkpoints; rank 0 has one.

    Args:
        store: `training.output_store`.
        output_dir: the run's folder.
    """

    def __init__(self, store: Store, output_dir: Path) -> None:
        self.store = store
        self._output_dir = output_dir
        self._run = b""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._next: _Request | None = None
        self._last: _Request | None = None
        self._busy: Path | None = None
        self._there: set[Path] = set()
        self._problem: UserError | None = None

    def begin(self, run: str, step: int | None) -> None:
        """Clear the way for this run's checkpoints, and put its name on the store.

        Args:
            run: the name of this start of the run.
            step: what it goes on from; None: it begins anew.

        Raises:
            StoreError: the store does not take that.
        """
        self._run = f"{run}\n".encode()
        if aside := stored.set_aside(self.store, step):
            say(f"{self.store}: not continued, renamed to abandoned-…: {', '.join(aside)}")
        self.store.remove(WRONG_END_NAME)
        self.store.write(OWNER_NAME, self._run)
        self.wake(None, None, rotates=False)  # what an earlier start could not upload

    @contextlib.contextmanager
    def rotating(self) -> Iterator[Path | None]:
        """Give the checkpoint that is being uploaded, which must stay on disk, and begin no other one meanwhile."""
        with self._lock:
            yield self._busy

    def wake(self, limit: int | None, best: str | None, *, rotates: bool) -> None:
        """Let the thread upload what is complete on disk; returns at once.

        Args:
            limit: `save_total_limit`.
            best: the folder of the best checkpoint so far.
            rotates: whether older ones may be deleted.
        """
        with self._lock:
            self._next = _Request(limit, Path(best).name if best is not None else None, rotates)
            self._last = self._next
            if self._thread is None:
                # A daemon: a process that is ended on the spot must not wait for a store.
                self._thread = threading.Thread(target=self._work, name="uploader", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Wait for the upload in flight; raises nothing: training has failed, and says so itself."""
        with self._lock:
            thread = self._thread
        if thread is not None:
            thread.join()

    def settle(self) -> None:
        """Wait until every checkpoint on disk is on the store, and try again where one is not.

        Raises:
            StoreError: one could not be uploaded.
        """
        self.close()
        if (last := self._last) is not None and self._problem is not None:
            self._persistently(lambda: self._bring_up(last))
        self._problem = None

    def settle_or_note(self) -> None:
        """Do as `settle`, and say what could not be uploaded: a run that a signal ends goes on from its disk too."""
        with self._noting():
            self.settle()

    def finish(self, tokenizer: Any) -> None:
        """Upload what the run leaves, `run.json` last: a store that has it has all the others of the same run.

        Args:
            tokenizer: the one that was saved beside the adapter, if any.

        Raises:
            StoreError: something could not be uploaded.
        """
        self.settle()
        vocabulary = getattr(tokenizer, "vocab_files_names", None) or {}
        names = dict.fromkeys((*_RESULTS, *TOKENIZER_FILES, *vocabulary.values(), *LINE_FILES))
        there = [name for name in names if (self._output_dir / name).is_file()]

        def put() -> None:
            self._require_own()
            self.store.remove(RUN_NAME)
            for name in [*there, RUN_NAME]:
                self.store.put(self._output_dir / name, name)

        self._persistently(put)
        say(f"checkpoints and results are in {self.store.url}")

    def withdraw(self, names: Iterable[str], reason: str) -> None:
        """Take away what would look like a result, and say there why there is none; raises nothing."""
        self.close()
        with self._noting():
            self._require_own()
            for name in names:
                self.store.remove(name)
            self.store.write(WRONG_END_NAME, (json.dumps({"reason": reason}, indent=2) + "\n").encode())

    def _work(self) -> None:
        step_back()
        while True:
            with self._lock:
                request, self._next = self._next, None
                if request is None:
                    self._thread = None
                    return
            try:
                self._bring_up(request)
                self._problem = None
            except Exception as error:  # whatever it is: nobody else hears a thread
                self._problem = error if isinstance(error, UserError) else StoreError(f"{self.store}: {cause(error)}")
                say(f"note: {self._problem} Tried again at the next checkpoint.")

    def _bring_up(self, request: _Request) -> None:
        """Upload what the disk has and the store has not, then delete what is too old there."""
        self._require_own()
        while (folder := self._choose()) is not None:
            try:
                beside = [path for name in LINE_FILES if (path := self._output_dir / name).is_file()]
                stored.upload(self.store, folder, beside)
                self._there.add(folder)
            except CheckpointError as error:
                say(f"note: not uploaded: {error}")
                self._there.add(folder)  # it will not get better, and the others must not wait for it
            finally:
                self._busy = None
        if request.rotates:
            stored.rotate(self.store, request.limit, request.best)

    def _choose(self) -> Path | None:
        with self._lock:
            waiting = [path for path in files.checkpoints(self._output_dir) if path not in self._there]
            self._busy = waiting[0] if waiting else None
            return self._busy

    def _require_own(self) -> None:
        """See that no other run has begun on this store since.

        Raises:
            StoreError: one has, or the store cannot be asked.
        """
        if self.store.read(OWNER_NAME) != self._run:
            raise _TakenOver(
                f"{self.store} was taken over by another run: this one writes nothing more there. All of it is in "
                f"{self._output_dir}; name another store and go on by training.resume_from_checkpoint=auto."
            )

    def _persistently(self, action: Callable[[], None]) -> None:
        for pause in (*_PAUSES_S, None):
            try:
                return action()
            except StoreError as error:
                if isinstance(error, _TakenOver):
                    raise
                if pause is None:
                    raise StoreError(
                        f"{error} All of it is in {self._output_dir}: the same command with "
                        f"training.resume_from_checkpoint=auto uploads it, or copy it."
                    ) from None
                time.sleep(pause)

    @contextlib.contextmanager
    def _noting(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the run ends, and says itself how
            say(f"note: {error}")


def make_uploader(url: str | None, output_dir: Path) -> Uploader | None:
    """Return what uploads a run's files; None where the run has no store.

    Raises:
        UserError: the URL is none of a store.
    """
    return None if url is None else Uploader(Store(KEY, url), output_dir)


@contextlib.contextmanager
def leaving(uploader: Uploader | None, result: Iterable[str]) -> Iterator[None]:
    """Leave no upload half done behind a run, however it ends.

    Args:
        uploader: rank 0's, if any.
        result: names that a run without a right end must not leave on the store.
    """
    try:
        yield
    except WrongEnd as error:
        if uploader is not None:
            uploader.withdraw(result, str(error))
        raise
    except BaseException:
        if uploader is not None:
            uploader.close()
        raise
