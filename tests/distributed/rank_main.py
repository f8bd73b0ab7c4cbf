"""What every rank of a test runs first: redirects its output, arms the stack dump, then runs the test's script.

    rank_main.py [--local_rank=N] SCRIPT.py|package.module ARGS...

`--local_rank` is what the deepspeed launcher puts before a script's own arguments; the script sees it, as it would
without this file.
"""

import faulthandler
import os
import runpy
import signal
import sys
from pathlib import Path

STACK_SIGNAL = signal.SIGQUIT  # SIGUSR1 and SIGUSR2 are left to the code under test


def main() -> None:
    folder, rank = Path(os.environ["ADALORA_RANK_DIR"]), os.environ["RANK"]
    log = open(folder / f"rank{rank}.log", "ab", buffering=0)  # noqa: SIM115 (stays open as stdout and stderr)
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)
    faulthandler.enable(all_threads=True)
    faulthandler.register(STACK_SIGNAL, file=log, all_threads=True)
    if os.environ.get("ADALORA_HIDE_GPUS"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the deepspeed launcher sets it even with the CPU accelerator
    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))

    added = [argument for argument in sys.argv[1:2] if argument.startswith("--local_rank")]
    script, *arguments = sys.argv[1 + len(added) :]
    sys.argv = [script, *added, *arguments]
    if script.endswith(".py"):
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    if "torch.distributed" in sys.modules:  # else there is no group to leave
        from adalora_scale.cluster.leaving import leave_process_group

        leave_process_group()


if __name__ == "__main__":
    main()
