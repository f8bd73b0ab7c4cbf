"""launch/train.py as it would be if a checkpoint's checksums were not looked at."""

import sys

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.cli import train_main

if __name__ == "__main__":
    Checkpoint.verify = lambda self, names=None: None
    sys.exit(train_main())
