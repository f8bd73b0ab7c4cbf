"""The `adapter_config.json` of plain LoRA in which every matrix has its own rank: exact names, ranks and alphas."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import CONFIG_NAME, AdapterFile
from adalora_scale.export.peft_targets import placed_config


def lora_config(
    adapter: AdapterFile,
    ranks: Mapping[str, int],
    scalings: Mapping[str, float],
    *,
    base: str | None,
    names: Collection[str] = (),
    model: nn.Module | None = None,
    experts: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Return PEFT's LoraConfig, as JSON values, that gives every matrix its rank and the scaling alpha / rank.

    PEFT takes a target of a list, and a key of rank_pattern or alpha_pattern, as the ending of a module's name. Where
    one name ends another the targets are a regular expression and the key is tied to the name's beginning.

    Args:
        adapter: gives the task, the heads and the dropout.
        ranks: matrix → rank, all positive; matrices that are not named get no adapter.
        scalings: matrix → s of ΔW = s · B A.
        base: the base model's name, if it shall differ from the adapter's.
        names: modules of the base, as far as they are known: none but those in `ranks` must be adapted.
        model: the base on the meta device, for PEFT to show that it adapts what the config names.
        experts: tensor of experts → rank, in `scalings` too.

    Raises:
        Unsupported: PEFT adapts something else.

    Source: peft/utils/other.py `get_pattern_key`, peft/tuners/tuners_utils.py `check_target_module_exists`.
    """
    stacks = dict(experts or {})
    all_ranks = dict(ranks) | stacks
    largest = max(all_ranks, key=lambda name: all_ranks[name])
    unclear = _endings({*adapter.modules, *names}) & ranks.keys()
    alphas = {name: _alpha(scalings[name], rank) for name, rank in all_ranks.items()}
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": base or adapter.base,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _target_modules(list(ranks), unclear),
        "modules_to_save": adapter.config.get("modules_to_save"),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "r": all_ranks[largest],
        "lora_alpha": alphas[largest],
        "lora_dropout": 0.0 if stacks else adapter.config.get("lora_dropout") or 0.0,  # PEFT has none for tensors
        "rank_pattern": {_exact(name, unclear): r for name, r in all_ranks.items() if r != all_ranks[largest]},
        "alpha_pattern": {_exact(name, unclear): a for name, a in alphas.items() if a != alphas[largest]},
        "use_rslora": False,
        "use_dora": False,
    } | ({"target_parameters": list(stacks)} if stacks else {})
    wanted = {name: (rank, scalings[name]) for name, rank in all_ranks.items()}
    return config if model is None else placed_config(config, wanted, model, adapter.others)


def kept_ranks(adapter: AdapterFile) -> dict[str, int]:
    """Return matrix → rank without those of rank 0, which PEFT's LoRA cannot have.

    Raises:
        UserError: no triplet is left in any.
    """
    ranks = {name: shape.rank for name, shape in adapter.modules.items() if shape.rank > 0}
    if not ranks:
        raise UserError(f"{adapter.directory} holds no triplet (every rank is 0): there is nothing to export.")
    return ranks


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write `adapter_config.json`."""
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _alpha(scaling: float, rank: int) -> int | float:
    """Return scaling · rank, as an integer where it is one but for rounding (PEFT's lora_alpha is an int)."""
    alpha = scaling * rank
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha


def _target_modules(targets: list[str], unclear: set[str]) -> list[str] | str:
    """Name the targets exactly: PEFT takes a list as name endings, so a name that ends another needs a regex."""
    return "|".join(name.replace(".", r"\.") for name in targets) if unclear else targets


def _exact(name: str, unclear: set[str]) -> str:
    return f"^{name}" if name in unclear else name


def _endings(names: Collection[str]) -> set[str]:
    """Return what follows any dot in any of the names."""
    return {name[place + 1 :] for name in names for place, letter in enumerate(name) if letter == "."}
