"""Train an adapter. This is the file that python, torchrun, srun and deepspeed start.

python launch/train.py --config configs/recipes/quickstart.yaml
torchrun --nproc-per-node 2 launch/train.py --config FILE training.learning_rate=2e-3
"""

import sys

from adalora_scale.cli import train_main

if __name__ == "__main__":
    sys.exit(train_main())
