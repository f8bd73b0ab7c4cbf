"""Where this process stands among those a launcher started; without torch, so that it is known from the first line."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from adalora_scale.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands among those a launcher started."""

    rank: int
    world_size: int
    local_rank: int
    """Its number on this host."""
    local_world_size: int
    """Processes on this host."""


def launched() -> Place | None:
    """Return this process's place as torchrun, deepspeed or srun gave it, or None for a process started alone.

    torchrun and deepspeed set RANK and its companions. srun does not: its step's variables are translated into them,
    for torch reads nothing else.

    Raises:
        UserError: the launcher's variables are incomplete.
    """
    if "RANK" not in os.environ:
        if "SLURM_STEP_NUM_TASKS" not in os.environ:  # absent in an sbatch script that no srun started
            return None
        _translate_slurm()
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        # deepspeed's launcher says LOCAL_SIZE.
        local = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or local_rank + 1
        return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=int(local))
    except (KeyError, ValueError) as error:
        raise UserError(
            f"RANK={os.environ.get('RANK')} is set, but the launcher's other variables cannot be used ({error}); start "
            f"with torchrun, deepspeed or srun, or unset RANK."
        ) from None


def _translate_slurm() -> None:
    """Give torch the variables it reads, from those of an srun step."""
    variable = os.environ
    # "2(x3),1": two tasks on each of three nodes, then one.
    counts: list[int] = []
    for tasks, _, times in re.findall(r"(\d+)(\(x(\d+)\))?", variable.get("SLURM_STEP_TASKS_PER_NODE", "1")):
        counts += [int(tasks)] * int(times or 1)
    node = int(variable.get("SLURM_NODEID", "0"))
    if "MASTER_ADDR" not in variable:
        nodes = variable.get("SLURM_STEP_NODELIST", variable.get("SLURM_JOB_NODELIST", ""))
        try:
            first = _scontrol("hostnames", nodes).split()[0]
            # A node's name is SLURM's own; NodeAddr is what the network knows it by.
            address = re.search(r"\bNodeAddr=(\S+)", _scontrol("node", first, "--oneliner"))
            variable["MASTER_ADDR"] = address[1] if address else first
        except (OSError, subprocess.SubprocessError, IndexError):
            raise UserError(
                f"MASTER_ADDR is not set and scontrol cannot expand the node list '{nodes}'; export MASTER_ADDR (the "
                f"first node's address)."
            ) from None
    variable.setdefault("MASTER_PORT", str(20000 + int(variable.get("SLURM_JOB_ID", "0")) % 20000))
    variable["WORLD_SIZE"] = variable["SLURM_STEP_NUM_TASKS"]
    variable["LOCAL_RANK"] = variable.get("SLURM_LOCALID", "0")
    variable["LOCAL_WORLD_SIZE"] = str(counts[node] if node < len(counts) else 1)
    variable["RANK"] = variable.get("SLURM_PROCID", "0")


def _scontrol(*what: str) -> str:
    """Return what `scontrol show` prints."""
    return subprocess.run(["scontrol", "show", *what], capture_output=True, text=True, check=True, timeout=30).stdout
