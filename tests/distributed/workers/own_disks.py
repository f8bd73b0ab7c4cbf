"""launch/train.py on every rank in a folder of its own, as on nodes whose disks hold other files under one name.

run_ranks(…, args=[FOLDER, arguments of launch/train.py])    rank N runs in FOLDER/nodeN and reports its exit code

A rank that has ended waits for the others to end by themselves: else the launcher would end them.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from tests.distributed.launcher import ROOT, report

os.environ["DS_ACCELERATOR"] = "cpu"

if __name__ == "__main__":
    node = Path(sys.argv[1]) / f"node{os.environ['RANK']}"
    os.chdir(node)
    os.environ["HF_DATASETS_CACHE"] = str(node / "cache")  # on that disk, too
    sys.argv = [str(ROOT / "launch" / "train.py"), *sys.argv[2:]]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        report(code=end.code)
        ended = [Path(os.environ["ADALORA_RANK_DIR"], f"rank{n}.json") for n in range(int(os.environ["WORLD_SIZE"]))]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(path.exists() for path in ended):
            time.sleep(0.1)
        raise
