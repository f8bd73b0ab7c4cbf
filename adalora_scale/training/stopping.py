"""Signals from a run's first line to its last: SIGTERM, SIGUSR1 (a scheduler) and SIGINT (a person) ask for an end.

Until the first step the end comes at once: nothing is lost but time. From then on a signal is noted, and the loop ends
after a step (`signals.py`); what is written when training is over is written to its end. Exit codes: 85 with a note
`requeue` in output_dir, 130 after SIGINT. A second SIGINT ends the process on the spot.

Before the first step one rank of several cannot know what a SIGTERM means: launchers also send it to whoever is left
when a rank has failed, and such a job must not go back into the queue again and again. Every rank that was asked
therefore says so in a file of its own, and rank 0 leaves `requeue` when all have, or when one had SIGUSR1, which
launchers send to nobody.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from adalora_scale.errors import INTERRUPTED_EXIT_CODE, KEYBOARD_EXIT_CODE, Interrupted, UserError, WrongEnd
from adalora_scale.files import write_json
from adalora_scale.messages import say
from adalora_scale.process_rank import process_count, process_rank

REQUEUE_NAME = "requeue"
"""A file in output_dir that says: a signal stopped the run, start it again with resume_from_checkpoint=auto."""
SCHEDULERS = (signal.SIGTERM, signal.SIGUSR1)
SIGNALS = (*SCHEDULERS, signal.SIGINT)
_ASKED = ".asked-"
_BEGINNING = "before the first step"
_SAME_PRESS_S = 1.0
"""One Ctrl-C reaches a rank twice: from the terminal, and from its launcher."""
_GRACE_S = 10.0
"""How long the main thread may take to end before it is taken to wait for ranks that are gone."""
_EVERYBODY_S = 5.0


class Stopping:
    """What signals this process got, and what they mean now; there is one, `stopping`."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal."""
        self.directory: Path | None = None
        """The run's output_dir, once it is known."""
        self.held = False
        """Whether this process holds output_dir and may write there."""
        self.anew = False
        """Whether the run begins anew beside checkpoints of another one, which `auto` would go on from."""
        self.phase = _BEGINNING
        self._deferred = False
        self._when = 0.0
        self._listens: set[int] = set()
        self._pid = os.getpid()
        self._is_run = False
        self._ended = threading.Event()
        self._said = self._noted = False

    @property
    def code(self) -> int:
        """The exit code that the signal asks for."""
        return exit_code(self.received)

    def defer(self) -> None:
        """Only note signals from here on: whoever called asks for them."""
        self._deferred = True

    @contextlib.contextmanager
    def at_once(self, phase: str) -> Iterator[None]:
        """Let signals end the process while inside, one that was noted before too.

        Raises:
            Interrupted: one came.
        """
        self.phase, self._deferred = phase, False
        if self.received is not None:
            raise Interrupted(f"stopped by {self.received} {phase}", self.code)
        yield
        self._deferred = True

    @contextlib.contextmanager
    def listening(self, numbers: Sequence[int], *, until_exit: bool = False) -> Iterator[None]:
        """Take signals while inside. Nested calls add to what the outer one takes.

        One that was noted and that nobody acted upon is not lost: when the outermost call ends, it does what it does
        to a process that does not listen. Outside the main thread Python allows no handlers, and nothing happens.

        Args:
            numbers: the signals.
            until_exit: whether the process ends afterwards; signals have nothing left to stop then, and do nothing.
        """
        main = threading.current_thread() is threading.main_thread()
        new = [number for number in numbers if number not in self._listens] if main else []
        outermost = bool(new) and not self._listens
        if outermost:
            self._pid, self.received, self._deferred, self.phase = os.getpid(), None, False, _BEGINNING
            self._ended, self._said, self._noted, self.directory = threading.Event(), False, False, None
            stop_watching = self._watch()
        before = {number: signal.signal(number, self._take) for number in new}
        self._listens |= set(new)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if until_exit else handler)
            self._listens -= set(new)
            if outermost:
                self._ended.set()
                stop_watching()
        if outermost and self.received is not None and self._deferred:
            signal.raise_signal(signal.Signals[self.received])

    @contextlib.contextmanager
    def a_run(self) -> Iterator[None]:
        """Take all signals for a whole run; one that came while results were being written has nothing left to stop."""
        if self._is_run:
            yield
            return
        self._is_run = True
        try:
            with self.listening(SIGNALS):
                yield
                if self.received is not None:
                    say(f"{self.received} came when results were being written: they are all there")
                    self.received = None
        finally:
            self._is_run = False

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Leave a note where a signal ends the run outside its training loop, on this rank or on another."""
        try:
            yield
        except Interrupted:
            if not self._deferred:
                self.leave_note()
            raise
        except (UserError, WrongEnd):
            raise
        except Exception as error:
            if not self._another_was_asked():
                raise
            self.leave_note()
            raise Interrupted(f"stopped by {self.received} to another rank", self.code) from error

    def _take(self, number: int, frame: FrameType | None) -> Any:
        name = signal.Signals(number).name
        if os.getpid() != self._pid:
            self._in_a_child(number)
            return
        if self.received is not None:
            if number == signal.SIGINT and time.monotonic() - self._when > _SAME_PRESS_S:
                say("SIGINT again: ending on the spot", to=sys.stderr)
                os._exit(KEYBOARD_EXIT_CODE)
            return
        self.received, self._when = name, time.monotonic()
        if not self._deferred:
            raise Interrupted(f"stopped by {name} {self.phase}", self.code)

    def _in_a_child(self, number: int) -> None:
        """A worker of tokenisation or of a loader got the signal that its whole group got: its parent decides."""
        if number == signal.SIGTERM and not self._deferred:  # pools end their workers so
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _watch(self) -> Callable[[], None]:
        """Let a thread hear of signals, too: the main thread may wait in C++ for a rank that has ended.

        Returns:
            What ends it.
        """
        source, target = os.pipe()
        os.set_blocking(target, False)
        before = signal.set_wakeup_fd(target, warn_on_full_buffer=False)  # an event loop's, in a notebook
        threading.Thread(target=self._insist, args=(source, self._ended), name="stopping", daemon=True).start()

        def end() -> None:
            signal.set_wakeup_fd(before)
            os.close(target)  # and the thread ends

        return end

    def _insist(self, source: int, ended: threading.Event) -> None:
        """Tell the other ranks at once, and end the process where the main thread does not."""
        while heard := os.read(source, 1):
            if heard[0] not in self._listens or self._deferred:
                continue
            name = signal.Signals(heard[0]).name
            self._say(name)
            if not ended.wait(_GRACE_S) and not self._deferred:
                self.received = self.received or name
                self.leave_note()
                os._exit(self.code)
        os.close(source)

    # ---- what is left behind ------------------------------------------------------------------------------------

    def leave_note(self) -> None:
        """Say to the other ranks that this one was asked, and to the scheduler that the run wants to go on."""
        rank, world_size = _place()
        with contextlib.suppress(OSError, UserError):
            if self.directory is None or self.received is None or self._noted:
                return
            self._noted = True
            self._say(self.received)
            if rank != 0:
                return
            if self.held and not self.anew and self.received != signal.SIGINT.name and self._meant(world_size):
                write_json(self.directory / REQUEUE_NAME, {"step": None, "signal": self.received})
            self.forget_asked()
            say(f"{self.received} {self.phase}: {self._what_is_there()}")

    def _say(self, name: str) -> None:
        """Say to the other ranks that this one was asked."""
        rank, world_size = _place()
        if world_size > 1 and self.directory is not None and self.directory.is_dir() and not self._said:
            self._said = True
            with contextlib.suppress(OSError):
                (self.directory / f"{_ASKED}{rank}").write_text(name, encoding="utf-8")

    def _another_was_asked(self) -> bool:
        """Whether a rank left because a signal asked it to: what this one sees of it is no failure then."""
        if _place()[1] == 1 or self.directory is None or self._deferred:
            return False
        time.sleep(1)  # it may be about to say so
        said = self._asked()
        self.received = self.received or next(iter(said), None)
        return bool(said)

    def forget_asked(self) -> None:
        """Remove what ranks of an earlier start said; rank 0 calls it when it begins and when it ends."""
        if self.directory is not None:
            for path in self.directory.glob(f"{_ASKED}*"):
                path.unlink(missing_ok=True)

    def _what_is_there(self) -> str:
        if self.anew:
            return "start it again as it was started"
        numbers = [path.parent.name.removeprefix("checkpoint-") for path in self._manifests()]
        newest = max((int(number) for number in numbers if number.isdigit()), default=None)
        if newest is None:
            return "there is no checkpoint yet; resume_from_checkpoint=auto starts anew"
        return f"resume_from_checkpoint=auto goes on from checkpoint-{newest}"

    def _manifests(self) -> list[Path]:
        return list(self.directory.glob("checkpoint-*/manifest.json")) if self.directory is not None else []

    def _meant(self, world_size: int) -> bool:
        """Whether the signal was meant for the run, and is not a launcher's answer to a failed rank."""
        deadline = time.monotonic() + _EVERYBODY_S
        while world_size > 1:
            said = self._asked()
            if signal.SIGUSR1.name in said or len(said) == world_size:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _asked(self) -> list[str]:
        found = self.directory.glob(f"{_ASKED}*") if self.directory is not None else ()
        return [path.read_text(encoding="utf-8") for path in found]


stopping = Stopping()


def _forget_in_a_child() -> None:
    """What a worker gets is not the run's: its signals must not be heard by the thread that watches for those."""
    if stopping._listens:
        with contextlib.suppress(ValueError):  # forked by a thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_a_child)


def exit_code(received: str | None) -> int:
    """Return the exit code of a run that a signal of this name ended."""
    return KEYBOARD_EXIT_CODE if received == signal.SIGINT.name else INTERRUPTED_EXIT_CODE


def _place() -> tuple[int, int]:
    return process_rank(), process_count()
