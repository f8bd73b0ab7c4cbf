"""Train an adapter. This is the file that python, torchrun, srun and deepspeed start.

python launch/train.py --config configs/recipes/quickstart.yaml
torchrun --nproc-per-node 2 launch/train.py --config FILE training.learning_rate=2e-3

With ADALORA_LOG_DIR set (the launch scripts set it) every rank keeps its log and status there, see docs/cluster.md.
"""

import sys

from adalora_scale.training.stopping import SIGNALS, stopping

if __name__ == "__main__":
    with stopping.listening(SIGNALS, until_exit=True):  # from the first line on
        from adalora_scale.cli import train_main
        from adalora_scale.cluster.evidence.rank_log import rank_log

        with rank_log():
            sys.exit(train_main())
