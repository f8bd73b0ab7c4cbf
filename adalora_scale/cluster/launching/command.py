"""`adalora-scale launch-check`: what can be known to be wrong before any rank starts, in one line.

The launch scripts run it first and read its answer, lines of `name=value` for a shell.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_scale.cluster.launching.endpoint import check_endpoint, split_endpoint
from adalora_scale.cluster.launching.hostfile import Host, check_reachable, read_hostfile
from adalora_scale.cluster.launching.sbatch import check_sbatch
from adalora_scale.config import RunConfig, load_config
from adalora_scale.errors import UserError

if TYPE_CHECKING:
    _Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def add_launch_check(verbs: _Verbs) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "launch-check",
        help="are hosts, port and batch sizes fit for a launch?",
        description="Check what the launch scripts are given, and print it as name=value lines for a shell.\n"
        "Exit code 2 and one line if something is wrong.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "train", nargs="*", metavar="-- ARGUMENT", help="after `--`: what launch/train.py will be given"
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="lines `name slots=8`; every host must answer to ssh"
    )
    parser.add_argument("--nodes", metavar="N|MIN:MAX", help="number of nodes, when there is no hostfile")
    parser.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks on each node")
    parser.add_argument(
        "--endpoint", metavar="HOST:PORT", help="the rendezvous; without HOST the hostfile's first host"
    )
    parser.add_argument("--patience", type=float, default=0, metavar="S", help="seconds to wait for HOST's address")
    parser.add_argument("--sbatch", type=Path, metavar="FILE", help="a job script whose #SBATCH lines to check")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    for name, value in check(arguments).items():
        print(f"{name}={shlex.quote(str(value))}")
    return 0


def check(arguments: argparse.Namespace) -> dict[str, object]:
    """Check what was given and return what the scripts need: output_dir, hosts, slots, nodes, master, port, endpoint.

    Raises:
        UserError: the first thing that is wrong.
    """
    found: dict[str, object] = {}
    if arguments.sbatch is not None:
        check_sbatch(arguments.sbatch)
    hosts = read_hostfile(arguments.hostfile) if arguments.hostfile is not None else []
    world_sizes = list(_world_sizes(arguments, hosts))
    if arguments.train:
        config = _load(arguments.train)
        found["output_dir"] = config.training["output_dir"]
        _check_training(config, world_sizes)
    if hosts:
        _check_hosts(hosts, arguments.endpoint, found)
    else:
        endpoint = check_endpoint(arguments.endpoint or "localhost:0", patience_s=arguments.patience)
        found |= {"endpoint": endpoint, "master": endpoint.host, "port": endpoint.port}
        found["local_address"] = "" if endpoint.local_address.startswith("127.") else endpoint.local_address
        if arguments.endpoint is None and arguments.nodes not in (None, "1"):
            raise UserError(f"NODES={arguments.nodes} need a rendezvous that all of them know: RDZV=host:port.")
    return found


def _load(train: list[str]) -> RunConfig:
    parser = argparse.ArgumentParser(prog="launch/train.py", add_help=False)
    parser.add_argument("--config", required=True)
    parser.add_argument("--deepspeed")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(train)
    config = load_config(arguments.config, arguments.overrides)
    return config.under_deepspeed(arguments.deepspeed) if arguments.deepspeed else config


def _check_hosts(hosts: list[Host], endpoint: str | None, found: dict[str, object]) -> None:
    name, port = split_endpoint(endpoint or ":29400")
    check_reachable(hosts, os.environ.get("ADALORA_SSH_OPTIONS", ""), port=None if name else port)
    master = name or hosts[0].name
    found |= {"hosts": " ".join(host.name for host in hosts), "slots": hosts[0].slots, "nodes": len(hosts)}
    found |= {"master": master, "port": port, "endpoint": f"{master}:{port}"}


def _world_sizes(arguments: argparse.Namespace, hosts: list[Host]) -> Iterator[int]:
    """Yield every number of ranks the run may have."""
    if hosts:
        yield sum(host.slots for host in hosts)
        return
    if arguments.nodes is None:
        return
    low, _, high = arguments.nodes.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal() and 1 <= int(low) <= int(high or low)):
        raise UserError(f"NODES={arguments.nodes}; write a number of nodes, or MIN:MAX for an elastic run.")
    ranks = 1 if arguments.ranks_per_node is None else arguments.ranks_per_node
    if ranks < 1:
        raise UserError(f"{ranks} ranks a node; there must be at least 1.")
    yield from (nodes * ranks for nodes in range(int(low), int(high or low) + 1))


def _check_training(config: RunConfig, world_sizes: list[int]) -> None:
    """Check the training section's keys, and that the batch can be divided over every number of ranks."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends an optional kernel at import
    from adalora_scale.engines.registry import fixed_global_batch
    from adalora_scale.training.arguments import convert_training_section
    from adalora_scale.training.batch import batch_sizes

    section, fixed = convert_training_section(config), fixed_global_batch(config.engine)
    for world_size in world_sizes:
        batch_sizes(section, world_size)
        if fixed is not None and fixed % world_size:
            raise UserError(
                f'DeepSpeed\'s train_batch_size={fixed} cannot be divided over {world_size} ranks; write "auto" there '
                f"and set training.global_batch_size."
            )
