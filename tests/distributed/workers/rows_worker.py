"""One training run through launch/train.py's trainer that reports which rows each step saw.

run_ranks(…, args=[CONFIG, STEP, "section.key=value", …])

At STEP rank 0 is killed, and with it the run; -1: never.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys

from adalora_scale.config import load_config
from adalora_scale.training.run import make_trainer, prepare
from tests.distributed.launcher import report


def rows_of(inputs):
    """One short name a row, padding aside; a packed batch has one for each sequence's first example."""
    rows = inputs["input_ids"].tolist()
    masks = inputs["attention_mask"].tolist() if "attention_mask" in inputs else [[1] * len(row) for row in rows]
    kept = [[token for token, bit in zip(*pair, strict=True) if bit] for pair in zip(rows, masks, strict=True)]
    return [hashlib.blake2b(repr(row).encode(), digest_size=8).hexdigest() for row in kept]


def main(path, end, *overrides):
    config = load_config(path, list(overrides))
    trainer = make_trainer(config, prepare(config))
    seen: dict[int, list[str]] = {}
    step = trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        seen.setdefault(trainer.state.global_step, []).extend(rows_of(inputs))
        report(seen=seen)
        if trainer.state.global_step == int(end) and trainer.args.process_index == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    report(steps=trainer.state.max_steps)


if __name__ == "__main__":
    main(*sys.argv[1:])
