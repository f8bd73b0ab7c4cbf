"""One run an output_dir: `lease.json` says who holds it, and a second start is refused in one line.

The holder is rank 0's process. A thread of it renews the file's time of change every 15 seconds. Whoever finds a lease

- of a process of this machine looks whether that process lives,
- of another machine waits until it is renewed (held: refused) or has not been for two minutes (stale: taken over). Ages
  are told by the file system's clock, which all machines share, and where that is wrong by waiting it out;
- of its own SLURM job's earlier start takes it: SLURM starts a job again when the start before has ended.

A run that was stopped for longer than that (a suspended machine, a lost mount) may have lost its lease to another: it
looks before it writes, and ends.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.files import writing
from adalora_scale.messages import say

LEASE_NAME = "lease.json"
RENEWED_EVERY_S = 15.0
STALE_AFTER_S = 120.0
_SETTLES_S = 5.0
"""A lease is written within this time after it was made, and taken over within this time after it was found stale."""
_LOOK_EVERY_S = 0.5


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lease; all a stranger needs to find the process."""

    id: str
    host: str
    machine: str
    """Boot and process-id namespace: where `pid` means something."""
    pid: int
    birth: str
    """When the process began, in the kernel's words, so that another one with its number is not taken for it."""
    job: str
    restart: int
    """How often the job was started again."""
    since: str

    @classmethod
    def this_process(cls) -> Holder:
        """Return this process as a holder."""
        return cls(
            id=uuid.uuid4().hex,  # draws from no generator that training uses
            host=socket.gethostname(),
            machine=_machine(),
            pid=os.getpid(),
            birth=_birth(os.getpid()) or "",
            job=os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID") or "",
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
            since=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        )

    def __str__(self) -> str:
        job = f" (job {self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def lives(self, own: Holder) -> bool | None:
        """Whether the process lives; None where `own` cannot tell."""
        if "SLURM_JOB_ID" in os.environ and self.job == own.job and self.restart < own.restart:
            return False
        if self.machine != own.machine or not self.machine:
            return None
        if self.pid == own.pid:
            return False  # an earlier run of this very process, which left without a word
        birth = _birth(self.pid)
        if birth is None:
            try:
                os.kill(self.pid, 0)  # sends nothing
            except PermissionError:  # somebody else's, and /proc hides it
                return None
            except OSError:
                return False
        return birth is not None and birth == self.birth


class Lease:
    """A held lease; `take` makes one.

    Args:
        path: the file.
        holder: this process as the file names it.
    """

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path = path
        self._holder = holder
        self._released = threading.Event()
        threading.Thread(target=self._renew, name="lease", daemon=True).start()
        atexit.register(self.release)  # a callback in somebody's trainer is not told that training failed

    def require(self) -> None:
        """See that it is still held, before something is written.

        Raises:
            UserError: another run has taken it.
        """
        found = _look(self._path)
        if found is not None and found.holder == self._holder:
            return
        if found is None or found.holder is None:
            raise UserError(
                f"{self._path} is no longer this run's: somebody removed or changed it, and another run may have been "
                f"there since. Nothing more is written; start again with training.resume_from_checkpoint=auto."
            )
        raise UserError(
            f"training.output_dir={self._path.parent} was taken over by {found.holder}: this run was not seen for "
            f"{STALE_AFTER_S:.0f} s (suspended, or cut off from the file system) and ends before it writes there."
        )

    def release(self) -> None:
        """Give it back; a process forked from the holder does not."""
        self._released.set()
        atexit.unregister(self.release)
        if os.getpid() != self._holder.pid:
            return
        with contextlib.suppress(OSError, UserError):
            found = _look(self._path)
            if found is not None and found.holder == self._holder:
                self._path.unlink()

    def _renew(self) -> None:
        while not self._released.wait(RENEWED_EVERY_S):
            with contextlib.suppress(OSError, UserError):  # a mount that comes back; `require` says what is lost
                found = _look(self._path)
                if found is not None and found.holder == self._holder:
                    os.utime(self._path)


def take(directory: Path) -> Lease:
    """Take a folder's lease; made where it is not there. One process of a run does so, rank 0.

    Raises:
        UserError: another run holds it, or the folder cannot be written.
    """
    own, path = Holder.this_process(), directory / LEASE_NAME
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
    first: _Found | None = None
    begun = time.monotonic()
    while not _create(path, own):
        found = _look(path)
        if found is None:
            continue
        if first is None or first.holder != found.holder:
            first, begun = found, time.monotonic()
        lives = found.holder.lives(own) if found.holder else None
        if lives or (lives is None and found.changed != first.changed):
            raise UserError(_refusal(directory, found, certain=bool(lives)))
        if lives is False or found.age_s() > STALE_AFTER_S or time.monotonic() - begun > STALE_AFTER_S:
            _clear(found, own)
            continue
        if found is first and found.holder:
            say(f"{path} was left by {found.holder}: waiting up to {STALE_AFTER_S:.0f} s to see whether it is renewed")
        time.sleep(_LOOK_EVERY_S)
    return Lease(path, own)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[Lease]:
    """Hold a folder's lease while inside; see `take`."""
    lease = take(directory)
    try:
        yield lease
    finally:
        lease.release()


@dataclasses.dataclass(frozen=True)
class _Found:
    path: Path
    holder: Holder | None
    """None where the file is not (yet) a lease."""
    changed: int

    def age_s(self) -> float:
        """How long ago it was renewed, by the clock of the file system; negative where that clock went back."""
        probe = self.path.with_name(f".lease-{uuid.uuid4().hex}")
        with writing(self.path.parent):
            try:
                probe.touch()
                return (probe.stat().st_mtime_ns - self.changed) / 1e9
            finally:
                probe.unlink(missing_ok=True)


def _look(path: Path) -> _Found | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        changed = path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder, a mount that is gone
        raise UserError(f"{path} cannot be read: {error.strerror}; another run may hold the folder.") from None
    try:
        holder = Holder(**json.loads(text))
    except (TypeError, ValueError):
        holder = None
    return _Found(path, holder, changed)


def _create(path: Path, own: Holder) -> bool:
    """Make the lease; False where there is one."""
    with writing(path):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(own)) + "\n")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    return True


def _clear(found: _Found, own: Holder) -> None:
    """Take a dead lease away, one process at a time, so that nobody removes the lease that another has just made."""
    guard = found.path.with_name(".lease-clearing")
    with writing(guard):
        if not _create(guard, own):
            other = _look(guard)
            if other is not None and other.age_s() > _SETTLES_S:
                guard.unlink(missing_ok=True)  # of a process that died while it cleared
            time.sleep(_LOOK_EVERY_S)
            return
        try:
            if _look(found.path) == found and _held_by(guard, own):
                found.path.unlink(missing_ok=True)
        finally:
            if _held_by(guard, own):
                guard.unlink(missing_ok=True)


def _held_by(path: Path, own: Holder) -> bool:
    found = _look(path)
    return found is not None and found.holder == own


def _refusal(directory: Path, found: _Found, *, certain: bool) -> str:
    way_out = "" if certain else f" (if that is gone for certain, delete {found.path})"
    return (
        f"training.output_dir={directory} is in use by another run: {found.holder or LEASE_NAME}. Choose another "
        f"folder, or end that run{way_out}."
    )


def _machine() -> str:
    """Name this boot of this machine and the namespace that numbers its processes; empty where that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(pid: int) -> str | None:
    """Return when a process began, in clock ticks since the boot; None where it is not there or has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
