"""What an export is asked for, and which options do not go together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.export.model_folder import shard_bytes
from adalora_scale.export.pruned_adapter import CRITERIA
from adalora_scale.export.pruning import Size


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    adapter: Path
    output: Path
    format: str
    uniform: bool = False
    rank: int | None = None
    base: str | None = None
    dequantise: bool = False
    max_shard_size: str = "5GB"
    overwrite: bool = False
    fidelity: bool | None = None
    text: Path | None = None
    trust_remote_code: bool = False
    prune_to: str | None = None
    by: str | None = None

    def __post_init__(self) -> None:
        if self.uniform and self.format != "peft-lora":
            raise UserError(f"--uniform belongs to --format peft-lora, not to {self.format}.")
        if self.rank is not None and not self.uniform:
            raise UserError("--rank belongs to --uniform; add it, or leave --rank out.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank is {self.rank}; it must be at least 1.")
        if self.dequantise and self.format != "merged":
            raise UserError(f"--dequantise belongs to --format merged, not to {self.format}.")
        if self.fidelity and self.format == "rank-pattern":
            raise UserError("--fidelity compares logits, and --format rank-pattern writes no weights; leave it out.")
        if self.by is not None and self.prune_to is None:
            raise UserError("--by belongs to --prune-to; add it, or leave --by out.")
        if self.by not in (None, *CRITERIA):
            raise UserError(f"--by is '{self.by}'; choose {' or '.join(CRITERIA)}.")
        _ = self.size
        shard_bytes(self.max_shard_size)

    @property
    def size(self) -> Size | None:
        """How many parameters may stay; None: all."""
        return None if self.prune_to is None else Size(self.prune_to)
