"""Rounds: which engine and which attacks the seed draws, and one run that goes through them."""

from __future__ import annotations

import contextlib
import random
import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.chaos.folder import METRICS, checkpoints, inode, newest_whole, records
from benchmarks.chaos.starts import MANY, ROOT, Ending, Run, Start
from benchmarks.chaos.verdict import Damage, Failed, differences, require_named, require_reason, require_whole

AFTER_SIGNAL_S = 90.0
"""What a run may take to end after it was asked to."""
DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Plan:
    """One round as the seed draws it."""

    number: int
    engine: str
    attacks: tuple[str, ...]


@dataclass
class Result:
    """One round as it went."""

    plan: Plan
    verdict: str = "failed"
    """equal, refused or failed."""
    reason: str = ""
    said: list[str] = field(default_factory=list)
    """What happened, one line a start."""
    at: int | None = None
    """Place in the chain of the attack during which it was refused or failed; None after the last one."""
    log: str = ""
    """Of the start that decided."""
    seconds: float = 0.0


class Refused(Exception):
    """A start was refused for a reason: the round ends."""


def plans(seed: int, rounds: int, engines: Sequence[str], attacks: Sequence[str], chain: int | None) -> list[Plan]:
    """Draw the rounds: engines and attacks come up equally often, as from decks of cards, in random order."""
    draw = random.Random(seed)
    engine_deck, attack_deck = _deck(draw, engines), _deck(draw, attacks)
    found = []
    for number in range(1, rounds + 1):
        length = draw.randint(1, 3) if chain is None else chain
        found.append(Plan(number, next(engine_deck), tuple(next(attack_deck) for _ in range(length))))
    return found


def _deck(draw: random.Random, cards: Sequence[str]) -> Iterator[str]:
    while True:
        yield from draw.sample(cards, len(cards))


class Undisturbed:
    """An engine's run that nobody disturbs; it keeps all its checkpoints.

    Args:
        run: its folder does not exist yet.

    Raises:
        Failed: it does not end as it should.
    """

    def __init__(self, run: Run) -> None:
        self.run = replace(run, keep=MANY)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        start = Start(self.run, run.folder.parent / "start.log")
        try:
            ending = start.end(run.timeout + 600)  # DeepSpeed compiles its operators at the first
        finally:
            start.kill()
        self.seconds = start.age
        if ending.kind != "done":
            raise Failed(f"the undisturbed run of {run.engine} ended as '{ending.kind}', see {start.log}")

    @property
    def folder(self) -> Path:
        """Its output_dir."""
        return self.run.folder


class Round:
    """One run under attack; attacks call `start` and `ended`."""

    def __init__(self, run: Run, undisturbed: Undisturbed, plan: Plan, seed: int) -> None:
        self.run, self.undisturbed, self.plan = run, undisturbed, plan
        self.seed = seed
        self.damaged: dict[int, Damage] = {}
        """Inode of a checkpoint's folder → what was done to it."""
        self.words: list[str] = []
        """What a refusal may name: files that the attacks damaged."""
        self.result = Result(plan)
        self._starts: list[Start] = []
        self._present: dict[int, int] = {}
        self._floor = 0

    def draw(self, place: int) -> random.Random:
        """Return what the attack at a place of the chain draws from; how many draws others made does not matter."""
        return random.Random(f"{self.seed}, round {self.plan.number} on {self.plan.engine}, attack {place}")

    # ---- what attacks use ---------------------------------------------------------------------------------------

    def start(self) -> Start:
        """Start the run once more."""
        self._look()
        return self.started()

    def started(self) -> Start:
        """Start it beside another start."""
        log = self.run.folder.parent / f"start-{len(self._starts) + 1}.log"
        if not self.run.folder.parent.is_dir():
            log.parent.mkdir(parents=True)
        self._starts.append(Start(self.run, log))
        self.result.log = str(log)
        return self._starts[-1]

    def ended(self, start: Start, accepted: Collection[str] | None, *, timeout: float | None = None) -> Ending:
        """Wait for a start's end and look at it: is it accepted, is what lies there whole, was what was damaged named?

        Args:
            start: the start.
            accepted: kinds of `Ending`; None of one that was killed.
            timeout: seconds from now.

        Raises:
            Refused: it was refused for what attacks did, and that was not what was tried.
            Failed: anything else.
        """
        ending = start.end(timeout)
        self.result.log = str(start.log)
        if ending.hung:
            raise Failed(f"it hung, {start.age:.0f} s after its start; the stacks are in the log")
        require_named(ending, self.damaged, present=self._present)
        if any(not other.over for other in self._starts):  # it writes, and deletes old checkpoints
            return self._accepted(ending, accepted)
        require_whole(self.undisturbed.folder, self.run.folder, self.damaged)
        if (newest := newest_whole(self.run.folder, self.damaged)) < self._floor:
            raise Failed(f"checkpoint-{self._floor} is gone; the newest whole one is of step {newest}")
        return self._accepted(ending, accepted)

    def _accepted(self, ending: Ending, accepted: Collection[str] | None) -> Ending:
        if accepted is not None and ending.kind not in accepted:
            if ending.kind == "refused":
                raise Refused(require_reason(ending, self.words))
            raise Failed(f"it ended as '{ending.kind}' (exit code {ending.code}, ranks {list(ending.codes)})")
        return ending

    def say(self, line: str) -> None:
        """Note what happened."""
        self.result.said.append(line)

    def whole(self) -> list[int]:
        """Return the steps of the checkpoints that no attack damaged, the newest first."""
        return [step for step, path in checkpoints(self.run.folder).items() if inode(path) not in self.damaged]

    def require_checkpoints(self, count: int) -> None:
        """See that so many whole checkpoints lie there: train until they do, then kill."""
        if len(self.whole()) >= count:
            return
        start = self.start()
        while not start.over and len(self.whole()) < count and start.age < self.run.timeout:
            time.sleep(0.02)
        self.require_progress(start)
        start.kill()
        self.ended(start, None)
        if not self.whole():
            raise Failed("it wrote no checkpoint to attack")

    def require_progress(self, start: Start) -> None:
        """See that a start that was waited for has not used up its time.

        Raises:
            Failed: it has.
        """
        if not start.over and start.age >= self.run.timeout:
            self.ended(start, None)

    # ---- the round ----------------------------------------------------------------------------------------------

    def play(self, attacks: dict[str, type]) -> Result:
        """Run the chain of attacks, let the run end, and judge it."""
        began = time.time()
        try:
            with small_disk(self.run.folder.parent, wanted="disk" in self.plan.attacks):
                try:
                    for place, name in enumerate(self.plan.attacks):
                        self.result.at = place
                        attacks[name](self.draw(place)).attack(self)
                    self.result.at = None
                    self._finish()
                finally:
                    for start in self._starts:
                        start.kill()
        except Refused as error:
            self.result.verdict, self.result.reason = "refused", str(error)
        except Failed as error:
            self.result.verdict, self.result.reason = "failed", str(error)
        self.result.seconds = time.time() - began
        return self.result

    def _finish(self) -> None:
        self.ended(self.start(), {"done"})
        found = differences(self.undisturbed.folder, self.run.folder)
        if found == [f"{METRICS} differs"] and self._rest_of_metrics():
            self.say(f"{METRICS} holds the lines after its loss, which was named")
            found = []
        if found:
            raise Failed("; ".join(found))
        self.result.verdict = "equal"

    def _rest_of_metrics(self) -> bool:
        """Return whether what was lost with the file was named, and the rest is the undisturbed run's."""
        mine, others = records(self.run.folder / METRICS), records(self.undisturbed.folder / METRICS)
        named = any(METRICS in start.text() for start in self._starts)
        return METRICS in self.words and named and bool(mine) and others[-len(mine) :] == mine

    def _look(self) -> None:
        """Remember what lies there before a start."""
        folders = {path.name.removeprefix("checkpoint-"): path for path in self.run.folder.glob("checkpoint-*")}
        self._present = {int(number): inode(path) for number, path in folders.items() if number.isdigit()}
        self._floor = newest_whole(self.run.folder, self.damaged)
        lying = {inode(path) for path in self.run.folder.glob("checkpoint-*")}
        self.damaged = {number: damage for number, damage in self.damaged.items() if number in lying}


def round_run(plan: Plan, work: Path, *, steps: int, timeout: float, script: str = "launch/train.py") -> Run:
    """Return the run of a round, with a base of its own that an attack may damage."""
    home = work / f"round-{plan.number}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    return Run(engine=plan.engine, folder=home / "out" / "run", base=copied_base(home), steps=steps, timeout=timeout,
               script=script)  # fmt: skip


def copied_base(home: Path) -> Path:
    """Copy the quickstart's base model into a folder."""
    return Path(shutil.copytree(ROOT / "launch/quickstart/base_model", home / "base"))


def undisturbed_run(engine: str, work: Path, *, steps: int, timeout: float) -> Undisturbed:
    """Run an engine undisturbed."""
    home = work / f"undisturbed-{engine}"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    return Undisturbed(Run(engine=engine, folder=home / "run", base=copied_base(home), steps=steps, timeout=timeout))


# ---- disks ------------------------------------------------------------------------------------------------------


def can_mount(folder: Path) -> bool:
    """Return whether a small disk can be mounted here."""
    folder.mkdir(parents=True, exist_ok=True)
    if not _mount("-t", "tmpfs", "-o", "size=1m", "none", str(folder)):
        return False
    _unmount(folder)
    return True


@contextlib.contextmanager
def small_disk(folder: Path, *, wanted: bool) -> Iterator[None]:
    """Mount a disk of its own at `folder`, whose size can change, and copy what was written back at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    if not wanted:
        yield
        return
    if not _mount("-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(folder)):
        raise Failed(f"no disk can be mounted at {folder}")
    try:
        yield
    finally:
        kept = folder.with_name("kept")
        shutil.copytree(folder, kept, symlinks=True)
        _unmount(folder)
        folder.rmdir()
        kept.rename(folder)


def resize(folder: Path, size: int) -> None:
    """Give the disk at `folder` another size in bytes, not below what lies on it."""
    if not _mount("-o", f"remount,size={size}", str(folder)):
        raise Failed(f"the disk at {folder} cannot be made {size} bytes large")


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
