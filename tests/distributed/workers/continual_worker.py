"""One run of the whole program on ranks: continual_worker.py CONFIG [section.key=value …]."""

import sys

from adalora_scale.config import load_config
from adalora_scale.training.run import train
from tests.distributed.launcher import report

if __name__ == "__main__":
    summary = train(load_config(sys.argv[1], sys.argv[2:]))
    report(
        eval_loss=summary["final"]["eval_loss"],
        engine=summary["engine"],
        ranks=summary["ranks"],
        budget=summary["budget"],
    )
