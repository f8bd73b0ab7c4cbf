"""The attacks, one class each. To add one, write a class here: `name`, and `attack(round)` with draws from `self.draw`.

An attack that starts the run says to `Round.ended` which endings it accepts; anything else fails the round.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

from benchmarks.chaos.folder import METRICS, checkpoints, inode
from benchmarks.chaos.rounds import AFTER_SIGNAL_S, DISK_BYTES, Round, resize
from benchmarks.chaos.starts import ENGINES, SAVE_STEPS, Ending, Start, stat_of
from benchmarks.chaos.verdict import Damage, Failed, require_reason

ACCEPTED = {
    signal.SIGTERM: {"checkpointed", "done"},
    signal.SIGUSR1: {"checkpointed", "done"},
    signal.SIGINT: {"interrupted", "done"},
}
"""Signal → how a start that got it may end."""
ONE_RANK_ASKED = {"stopped"}
"""Further ways after a SIGTERM to one of several ranks: outside the training loop it may be a launcher's, which ends
the ranks that are left when one has failed, so no `requeue` is written."""
INTERPRETER_S = 0.3
"""Seconds of CPU after which a process must have reached the program's first line; a signal may kill a younger one."""
_HOLDER = re.compile(r"pid \d+|process \d+|held by|is running", re.IGNORECASE)


class Attack:
    """One attack with its own draws."""

    name = ""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw

    def attack(self, round: Round) -> None:
        """Do it."""
        raise NotImplementedError

    def wait(self, round: Round, start: Start) -> str:
        """Wait for a random moment of a start, at most until its end, and say which."""
        kind = self.draw.choices(["any", "saving", "steps", "ending"], [4, 3, 2, 1])[0]
        share, saves = self.draw.random(), self.draw.randint(1, 3)
        begin, last = start.newest(), start.run.steps
        if kind == "any":
            while not start.over and start.age < share * round.undisturbed.seconds:
                time.sleep(0.005)
            return f"{start.age:.1f} s after the start"
        steps = last if kind == "ending" else min(last, begin + SAVE_STEPS * saves)
        while not start.over and (newest := start.newest()) < steps and start.age < start.run.timeout:
            soon = kind == "saving" and newest >= steps - SAVE_STEPS
            if soon and start.partial():
                break
            time.sleep(0.001 if soon else 0.02)
        round.require_progress(start)
        delay = share * {"saving": 0.02, "steps": 0.5, "ending": 1.5}[kind]
        time.sleep(delay)
        inside = start.partial()
        return f"inside saving {inside[0]}" if inside else f"{delay:.2f} s after checkpoint-{start.newest()}"


class Kill(Attack):
    """SIGKILL to all processes or one rank; the others then have until their own end, or none."""

    name = "kill"

    def attack(self, round: Round) -> None:
        """Kill a start."""
        start = round.start()
        alone, left = self.draw.random() < 0.4, self.draw.random() < 0.5
        when = self.wait(round, start)
        if start.over:
            round.ended(start, {"done"})
            return round.say("kill: it had ended")
        ranks = start.ranks()
        if not (alone and ranks):
            start.kill()
            round.ended(start, None)
            return round.say(f"kill: all, {when}")
        start.send([self.draw.choice(ranks)], signal.SIGKILL)
        if not left:
            time.sleep(0.3)  # the others notice, or are about to
            start.kill()
        round.ended(start, None, timeout=AFTER_SIGNAL_S)
        return round.say(f"kill: one rank{', the others end by themselves' if left else ''}, {when}")


class Signal(Attack):
    """A signal that asks for an orderly end."""

    name = "signal"

    def attack(self, round: Round) -> None:
        """Signal a start and see that it ends as it should."""
        number = self.draw.choice(list(ACCEPTED))
        target = self.draw.choice(["all ranks", "one rank", "the launcher"])
        start = round.start()
        when = self.wait(round, start)
        if target == "the launcher" and number == signal.SIGUSR1:  # torchrun takes none; launch/torchrun.sh hands it on
            target = "all ranks"
        alone = ENGINES[round.run.engine].ranks == 1
        while not (ranks := start.ranks()) and not start.over and start.age < round.run.timeout:
            time.sleep(0.01)
        pids = {"all ranks": ranks, "one rank": ranks[:1], "the launcher": [start.process.pid]}[target]
        ready = all(start.catches(pid, number) for pid in (ranks if not alone else [start.process.pid]))
        used = _used(ranks)
        start.send(pids, number)
        further = number == signal.SIGTERM and target == "one rank" and not alone
        accepted = ACCEPTED[number] | (ONE_RANK_ASKED if further else set())
        if used < INTERPRETER_S and (number == signal.SIGINT or not ready):  # Python itself takes SIGINT
            accepted = accepted | {"killed", "broken"}
        what = f"signal: {signal.Signals(number).name} to {'the process' if alone else target}, {when}"
        round.say(what)
        try:
            ending = round.ended(start, accepted, timeout=AFTER_SIGNAL_S)
        except Failed as error:
            raise Failed(f"{what}: {error}{'' if ready else '; there was no handler yet'}") from None
        round.result.said[-1] += f": {ending.kind}"


def _used(pids: list[int]) -> float:
    """Return the seconds of CPU that the youngest of some processes has used; infinity where none is left."""
    used = [float("inf")]
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = stat_of(pid)
            used.append((int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))
    return min(used)


class _Damaging(Attack):
    """Damages a file of the newest checkpoint, mostly where an older one is there to fall back to."""

    def attack(self, round: Round) -> None:
        """Choose a file and damage it."""
        round.require_checkpoints(self.draw.choices([1, 2, 3], [1, 4, 2])[0])
        step = round.whole()[0]
        folder = checkpoints(round.run.folder)[step]
        path = self.draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
        round.damaged[inode(folder)] = Damage(step, path.name, self.damage(path))
        round.words.append(folder.name)
        round.say(f"{self.name}: {folder.name}/{path.name} {round.damaged[inode(folder)].how}")

    def damage(self, path: Path) -> str:
        """Damage a file and return what was done, as a participle."""
        raise NotImplementedError


class Flip(_Damaging):
    """One byte becomes another."""

    name = "flip"

    def damage(self, path: Path) -> str:
        """Change a byte."""
        return _flip(path, self.draw, 0)


class Truncate(_Damaging):
    """The end of a file is missing, as after a crash of a machine."""

    name = "truncate"

    def damage(self, path: Path) -> str:
        """Cut a file."""
        size = self.draw.randrange(path.stat().st_size)
        os.truncate(path, size)
        return f"cut to {size} bytes"


class Delete(_Damaging):
    """A file is missing."""

    name = "delete"

    def damage(self, path: Path) -> str:
        """Remove a file."""
        path.unlink()
        return "removed"


class Metrics(Attack):
    """The run's record is missing; the lines cannot come back, but somebody must say so."""

    name = "metrics"

    def attack(self, round: Round) -> None:
        """Remove metrics.jsonl."""
        round.require_checkpoints(2)  # by then it has a line
        (round.run.folder / METRICS).unlink(missing_ok=True)
        round.words.append(METRICS)
        round.say(f"metrics: {METRICS} removed")


class Base(Attack):
    """The frozen base is not what it was; afterwards it is again."""

    name = "base"

    def attack(self, round: Round) -> None:
        """Change a byte of the base's weights, start, and put it back."""
        round.require_checkpoints(1)
        weights = round.run.base / "model.safetensors"
        before = weights.read_bytes()
        header = 8 + int.from_bytes(before[:8], "little")
        how = _flip(weights, self.draw, header)
        round.words += ["base", "model.safetensors"]
        round.say(f"base: model.safetensors {how}")
        try:
            start = round.start()
            ending = round.ended(start, {"done", "refused"})
        finally:
            weights.write_bytes(before)
        line = require_reason(ending, ["base", weights.name]) if ending.kind == "refused" else "trained"
        round.result.said[-1] += f": {line}"


class Disk(Attack):
    """The disk of output_dir is full after some more bytes."""

    name = "disk"

    def attack(self, round: Round) -> None:
        """Start with little room, then with much."""
        home = round.run.folder.parent
        usage = shutil.disk_usage(home)
        room = int(2 ** self.draw.uniform(12, 23))
        resize(home, usage.used + room)
        round.say(f"disk: {room} bytes free")
        try:
            start = round.start()
            ending = round.ended(start, {"done", "refused"})
        finally:
            resize(home, DISK_BYTES)
        line = _line(ending, "enough")
        round.result.said[-1] += f": {line}"
        if ending.kind == "refused" and os.strerror(errno.ENOSPC) not in line:
            raise Failed("the line does not say that the disk is full")


class Second(Attack):
    """Two starts on one folder."""

    name = "second"

    def attack(self, round: Round) -> None:
        """Start a second one beside the first and see that only one of them trains."""
        delay = self.draw.uniform(0, 0.3) * round.undisturbed.seconds
        first = round.start()
        while not first.over and first.age < delay:
            time.sleep(0.01)
        if first.over:
            round.ended(first, {"done"})
            return round.say("second: the first had ended")
        second = round.started()
        both = False
        while not (first.over or second.over) and second.age < 2 * round.run.timeout:
            texts = [start.text() for start in (first, second)]
            both = both or all("AdaLoRA on " in text and "\ndone: " not in text for text in texts)
            time.sleep(0.05)
        if both:
            first.kill()
            second.kill()
            raise Failed("second: both starts trained in one folder at once")
        loser, winner = (second, first) if second.over else (first, second)
        ending = round.ended(loser, {"done", "refused"})
        if ending.kind == "refused" and not _HOLDER.search(ending.errors[0]):
            raise Failed(f"second: the line does not say who holds the folder: {ending.errors[0]}")
        round.ended(winner, {"done"})
        return round.say(f"second: {_line(ending, 'it trained when the other had ended')}")


def _line(ending: Ending, otherwise: str) -> str:
    return ending.errors[0] if ending.kind == "refused" else otherwise


def _flip(path: Path, draw: random.Random, first: int) -> str:
    """Change one byte of a file at or after `first` to another value."""
    place, change = draw.randrange(first, path.stat().st_size), draw.randrange(1, 256)
    with path.open("r+b") as file:
        file.seek(place)
        value = file.read(1)[0]
        file.seek(place)
        file.write(bytes([value ^ change]))
    return f"changed at byte {place}"


ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (Kill, Signal, Flip, Truncate, Delete, Metrics, Base, Disk, Second)
}
