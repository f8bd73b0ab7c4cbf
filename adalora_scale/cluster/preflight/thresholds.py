"""The limits between healthy and broken, read from a YAML file."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from adalora_scale.config import check_value, read_yaml
from adalora_scale.errors import UserError, nearest

SHIPPED = Path(__file__).with_name("thresholds.yaml")


@dataclass(frozen=True, kw_only=True)
class FabricLimits:
    """Limits of one backend's links; GB/s are 10⁹ bytes a second, latencies one way."""

    link_min_share: float
    latency_max_times: float
    latency_noise_us: float
    within_host_min_gb_s: float
    between_hosts_min_gb_s: float
    within_host_max_us: float
    between_hosts_max_us: float
    all_reduce_min_gb_s: float
    all_gather_min_gb_s: float


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """All limits; thresholds.yaml explains each."""

    shared_memory_min_gib: float
    open_files_min: int
    open_files_per_rank: int
    disk_read_min_mb_s: float
    disk_write_min_mb_s: float
    gpu_temperature_max_c: float
    gpu_free_memory_min_share: float
    nccl: FabricLimits
    gloo: FabricLimits

    def fabric(self, backend: str) -> FabricLimits:
        """Return the limits of "nccl" or "gloo"."""
        return self.nccl if backend == "nccl" else self.gloo

    def open_files(self, world_size: int) -> int:
        """Return the open-file limit a rank of a job of this size needs."""
        return max(self.open_files_min, 512 + self.open_files_per_rank * world_size)


def load_thresholds(path: Path | None = None) -> Thresholds:
    """Read the shipped limits, and let those of `path` replace them key by key.

    Raises:
        UserError: the file cannot be read, a key is unknown, or a value is not a number of zero or more.
    """
    tree = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    if path is not None:
        _merge(tree, _read(path), path)
    nccl, gloo = FabricLimits(**tree.pop("nccl")), FabricLimits(**tree.pop("gloo"))
    return Thresholds(nccl=nccl, gloo=gloo, **tree)


def _read(path: Path) -> dict[str, Any]:
    tree = read_yaml(path, "--thresholds:")
    if not isinstance(tree, dict):
        raise UserError(f"--thresholds: {path} must hold keys and numbers; copy {SHIPPED}.")
    return tree


def _merge(known: dict[str, Any], given: dict[str, Any], path: Path, cls: type = Thresholds, prefix: str = "") -> None:
    types = {field.name: field.type for field in dataclasses.fields(cls)}
    for key, value in given.items():
        name = f"{prefix}{key}"
        if key not in known:
            raise UserError(f"--thresholds: {path}: unknown key '{name}'.{nearest(str(key), known)}")
        if isinstance(known[key], dict):
            if not isinstance(value, dict):
                raise UserError(f"--thresholds: {path}: '{name}' must hold keys and numbers.")
            _merge(known[key], value, path, FabricLimits, f"{name}.")
            continue
        number = check_value(f"--thresholds: {path}: {name}", value, int if types[key] == "int" else float)
        if not 0 <= number < math.inf:
            raise UserError(f"--thresholds: {path}: {name} is {number}; it must be zero or more.")
        known[key] = number
