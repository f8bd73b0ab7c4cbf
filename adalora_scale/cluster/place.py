"""Where this process stands among those a launcher started; without torch, so that it is known from the first line."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass

from adalora_scale.errors import UserError

_ALONE = {"WORLD_SIZE": "1", "OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1", "LOCAL_RANK": "-1"}
"""What variables may say without RANK: mpirun's, which torch does not read, too; accelerate takes -1 for no rank."""
_WAY_OUT = "start with torchrun, deepspeed or srun, or unset the variables of the launcher"


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
        UserError: the launcher's variables are incomplete, contradict one another, or are those of another launcher.
    """
    if "RANK" not in os.environ:
        if "SLURM_STEP_NUM_TASKS" not in os.environ:  # absent in an sbatch script that no srun started
            _require_alone()
            return None
        _translate_slurm()
    rank, world_size, _ = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    local_rank = _number("LOCAL_RANK", 0)
    # deepspeed's launcher says LOCAL_SIZE.
    local_size = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_world_size = _number(local_size, local_rank + 1)
    if not os.environ.get("MASTER_ADDR"):
        raise _missing("MASTER_ADDR")
    for name, part, whole_name, whole in (
        ("RANK", rank, "WORLD_SIZE", world_size),
        ("LOCAL_RANK", local_rank, local_size, local_world_size),
    ):
        if part >= whole:
            raise UserError(f"{name}={part} is not below {whole_name}={whole}; {_WAY_OUT}.")
    return Place(rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size)


def _require_alone() -> None:
    """Refuse what would start as one process, or as many that know nothing of each other, and was meant as a rank."""
    for name, alone in _ALONE.items():
        if (value := os.environ.get(name, alone)) != alone:
            raise UserError(f"{name}={value} is set, but RANK is not; {_WAY_OUT}.")


def _number(variable: str, default: int | None = None) -> int:
    value = os.environ.get(variable)
    if value is None:
        if default is None:
            raise _missing(variable)
        return default
    if not value.isdecimal():
        raise UserError(f"{variable}={value} is no number; {_WAY_OUT}.")
    return int(value)


def _missing(variable: str) -> UserError:
    return UserError(f"{variable} is not set, but RANK={os.environ['RANK']} is; {_WAY_OUT}.")


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
