"""launch/train.py that waits before its model is placed: rank 0 in Python, the others in a collective with it."""

import sys
import time
from pathlib import Path

from adalora_scale.training.stopping import SIGNALS, stopping

if __name__ == "__main__":
    with stopping.listening(SIGNALS):
        import torch.distributed as dist

        from adalora_scale.cli import train_main
        from adalora_scale.training import run

        marks, placing = Path(sys.argv[1]), run.place_model

        def place_model(*args, **kwargs):
            (marks / f"rank-{dist.get_rank()}").touch()
            if dist.get_rank() == 0:
                for _ in range(3000):
                    time.sleep(0.02)
            dist.barrier()
            return placing(*args, **kwargs)

        run.place_model = place_model
        sys.exit(train_main(sys.argv[2:]))
