"""The learnt ranks without the weights: what a plain PEFT LoRA run needs to train that pattern from scratch."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import nn

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.adapter_record import UNFINISHED
from adalora_scale.export.lora_config import kept_ranks, lora_config, write_config
from adalora_scale.export.peft_targets import parameter_targets


def write_rank_pattern(
    adapter: AdapterFile, folder: Path, *, base: str | None, names: Collection[str] = (), model: nn.Module | None = None
) -> dict[str, Any]:
    """Write an `adapter_config.json` alone, for `peft.LoraConfig.from_pretrained(folder)` and `get_peft_model`.

    Every alpha is the run's own scale times the matrix's rank, so that alpha / r is the same everywhere.

    Args:
        adapter: whose ranks.
        folder: where.
        base: the base model's name, if it shall differ from the adapter's.
        names: modules of the base, as far as they are known.
        model: the base on the meta device, if it is at hand.

    Returns:
        Entries of the report: ranks, matrices of rank 0 that are left out, scalings, parameters that will be trained.

    Raises:
        UserError: the ranks are not settled yet, or no triplet is left in any matrix.
        Unsupported: experts have ranks of their own.
    """
    if (state := adapter.unfinished) is not None:
        raise UserError(
            f"{adapter.directory}: the ranks are not settled, {UNFINISHED[state]}. Export one from after the final "
            f"allocation, or settle them with --prune-to."
        )
    if (layer := next(iter(adapter.stacks), None)) is not None:
        raise Unsupported(
            f"PEFT has one rank for all experts of '{layer}', so it cannot train their ranks; export the adapter with "
            f"--format peft-lora, or leave experts out with adalora.exclude_modules."
        )
    ranks = kept_ranks(adapter)
    scalings = {name: _own_scaling(adapter, name) for name in ranks}
    # PEFT's default would freeze what is made of a config that was saved for inference.
    config = lora_config(adapter, ranks, scalings, base=base, names=names, model=model) | {"inference_mode": False}
    write_config(folder, config)
    return {
        "ranks": ranks,
        "left_out": [name for name in adapter.modules if name not in ranks],
        "as_parameters": parameter_targets(config),
        "scalings": scalings,
        "parameters": sum(adapter.modules[name].parameters for name in ranks),
    }


def _own_scaling(adapter: AdapterFile, name: str) -> float:
    """Return the scale that the run trained with; the file's may make up for PEFT's (init_r + 1e-5)."""
    if adapter.method == "ADALORA":
        return float(adapter.config["lora_alpha"] / adapter.config["init_r"])
    return adapter.scaling(name)
