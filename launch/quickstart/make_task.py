"""Make the quickstart's task: a request in plain English, answered with the name in Python that does it.

    python launch/quickstart/make_task.py --output launch/quickstart/data

writes `train.jsonl` and `test.jsonl` with rows `{"prompt": "Q: How do I sort my list in place?\\nA:", "completion":
" list.sort"}`. The same wordings and seed give the same bytes.

Held out for the test split are, all three at once: the wordings (the sentences under a target's `test` key), the
fillers ("my tasks", "summary.txt") and the frames ("Help me to ..."). So no test request is a training request with a
part exchanged: the fine-tune has to recognise what is asked for. The 50 names are the same in both splits.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path
from typing import Any, Literal

import yaml

Split = Literal["train", "test"]

_HERE = Path(__file__).parent
_ALTERNATIVES = re.compile(r"\(([^()]*\|[^()]*)\)")
_SLOT = re.compile(r"\{(\w+)\}")
_PATIENCE = 1000
"""Draws without a new request after which a target is said to have too few wordings."""


def render(wording: str, frame: str, fillers: dict[str, list[str]], rng: random.Random) -> str:
    """One request: alternatives and fillers drawn, put into its frame, with a capital letter unless it is bare."""
    text = _SLOT.sub(lambda found: rng.choice(fillers[found[1]]), wording)
    text = _ALTERNATIVES.sub(lambda found: rng.choice(found[1].split("|")), text)
    request = frame.replace("{}", text)
    return request if frame == "{}" else request[0].upper() + request[1:]


def make_split(wordings: dict[str, Any], split: Split, rows_per_target: int, seed: int) -> list[dict[str, str]]:
    """The rows of one split, shuffled: the same number for each target, no request twice.

    Raises:
        ValueError: a target's wordings cannot give so many different requests.
    """
    rng = random.Random(f"{seed} {split}")
    fillers = {slot: members[split] for slot, members in wordings["slots"].items()}
    frames = wordings["frames"][split]
    rows = []
    for name, by_split in wordings["targets"].items():
        requests: dict[str, None] = {}  # a dict keeps the order, a set would not
        draws = 0
        while len(requests) < rows_per_target:
            wording = by_split[split][draws % len(by_split[split])]
            requests[render(wording, rng.choice(frames), fillers, rng)] = None
            draws += 1
            if draws > rows_per_target + _PATIENCE:
                raise ValueError(
                    f"{name} has only {len(requests)} different {split} requests, {rows_per_target} are wanted: "
                    f"add wordings to wordings.yaml or ask for fewer rows."
                )
        rows += [{"prompt": f"Q: {request}\nA:", "completion": f" {name}"} for request in requests]
    rng.shuffle(rows)
    return rows


def every_reading(wording: str) -> set[str]:
    """All sentences a wording's alternatives give, slots unfilled."""
    found = _ALTERNATIVES.search(wording)
    if found is None:
        return {wording}
    rests = every_reading(wording[found.end() :])
    return {wording[: found.start()] + choice + rest for choice in found[1].split("|") for rest in rests}


def check_held_out(wordings: dict[str, Any]) -> None:
    """Refuse a wording, filler or frame that both splits use.

    Raises:
        ValueError: with the first thing that is in both.
    """
    used: dict[Split, set[str]] = {"train": set(), "test": set()}
    for split, members in used.items():
        for by_split in (*wordings["slots"].values(), wordings["frames"], *wordings["targets"].values()):
            members.update(reading for entry in by_split[split] for reading in every_reading(entry))
    if shared := sorted(used["train"] & used["test"]):
        raise ValueError(f"{shared[0]!r} is in both splits of wordings.yaml ({len(shared)} such entries).")


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """Write one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def main() -> None:
    """Make both splits."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=_HERE / "data", help="folder of train.jsonl and test.jsonl")
    parser.add_argument("--wordings", type=Path, default=_HERE / "wordings.yaml", help="targets, wordings and fillers")
    parser.add_argument("--train-rows", type=int, default=80, help="training rows for each target")
    parser.add_argument("--test-rows", type=int, default=6, help="test rows for each target")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws")
    arguments = parser.parse_args()
    wordings = yaml.safe_load(arguments.wordings.read_text(encoding="utf-8"))
    check_held_out(wordings)
    train = make_split(wordings, "train", arguments.train_rows, arguments.seed)
    test = make_split(wordings, "test", arguments.test_rows, arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_rows(arguments.output / "train.jsonl", train)
    write_rows(arguments.output / "test.jsonl", test)


if __name__ == "__main__":
    main()
