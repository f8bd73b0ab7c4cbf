"""The adapter in the forms that PEFT and inference servers load: AdaLoRA as it is, or plain LoRA with λ folded in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.adaptables import MATRIX
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import (
    CONFIG_NAME,
    PEFT_SCALE,
    PREFIX,
    RECORD_KEY,
    WEIGHTS_NAME,
    AdapterFile,
    Update,
    peft_scale,
)
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.tensor_files import save_file


def write_peft_adalora(adapter: AdapterFile, folder: Path, *, base: str | None) -> dict[str, Any]:
    """Write the adapter as PEFT's AdaLoRA, with λ raised by the 1e-5 / init_r that PEFT lowers the scaling by.

    Raises:
        Unsupported: the adapter is plain LoRA, or adapts layers that PEFT's AdaLoRA does not know.
    """
    if adapter.method != "ADALORA":
        raise Unsupported(f"{adapter.directory} holds plain LoRA, which has no λ; export it with --format peft-lora.")
    if other := next((name for name, shape in adapter.modules.items() if shape.form != MATRIX), None):
        raise Unsupported(
            f"PEFT's AdaLoRA has linear layers only, and {adapter.directory} adapts '{other}'; export it with --format "
            f"peft-lora, or merged."
        )
    tensors, record = adapter.tensors(), dict(adapter.record)
    if not record.get(PEFT_SCALE):
        factor = peft_scale(adapter.config["init_r"])
        tensors |= {key: value.float() * factor for key, value in tensors.items() if key.endswith(".lora_E")}
        record[PEFT_SCALE] = True
    save_file(tensors, folder / WEIGHTS_NAME, {RECORD_KEY: json.dumps(record, sort_keys=True)})
    _write_config(folder, adapter.config | {"base_model_name_or_path": base or adapter.base})
    copy_tokenizer(adapter.directory, folder)
    return {"ranks": {name: shape.rank for name, shape in adapter.modules.items()}}


def write_peft_lora(
    adapter: AdapterFile, folder: Path, *, base: str | None, uniform: bool = False, rank: int | None = None
) -> dict[str, Any]:
    """Write the adapter as plain LoRA whose scaling is 1: ΔW = B' A' with A' = √|s λ| Aᵀ and B' = B sign(λ) √|s λ|.

    Splitting λ evenly keeps both factors in range for servers that load them in float16.

    Args:
        adapter: what to write.
        folder: where.
        base: the base model's name, if it shall differ from the adapter's.
        uniform: pad every matrix with zeros to one rank, for servers that know no `rank_pattern`.
        rank: that rank; the largest one by default.

    Raises:
        UserError: a matrix has a larger rank than `rank`, or no triplet is left in any.
    """
    ranks = {name: shape.rank for name, shape in adapter.modules.items()}
    largest = max(ranks, key=lambda name: ranks[name])
    if ranks[largest] == 0:
        raise UserError(f"{adapter.directory} holds no triplet (every rank is 0): there is nothing to export.")
    common = rank or ranks[largest]
    if common < ranks[largest]:
        raise UserError(f"--rank {common} is smaller than the rank of '{largest}' ({ranks[largest]}); raise it.")
    if not uniform:  # PEFT knows no LoRA of rank 0
        ranks = {name: r for name, r in ranks.items() if r > 0}
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        a, b = folded(adapter.update(name))
        if uniform:
            a = torch.nn.functional.pad(a, (0, 0, 0, common - a.shape[0]))
            b = torch.nn.functional.pad(b, (0, common - b.shape[1]))
        form = adapter.modules[name].form
        for factor, value in zip(form.lora, form.stored(a, b), strict=True):
            tensors[f"{PREFIX}{name}.{factor}"] = value
    for name in adapter.others:
        tensors[PREFIX + name] = adapter.other(name)
    pattern = {} if uniform else {_exact(name, adapter): r for name, r in ranks.items() if r != common}
    # With every alpha equal to its rank PEFT's alpha / r is 1, and so is what tools make of it that ignore patterns.
    config = {
        "peft_type": "LORA",
        "task_type": adapter.task_type,
        "base_model_name_or_path": base or adapter.base,
        "inference_mode": True,
        "bias": "none",
        "target_modules": _target_modules(adapter, list(ranks)),
        "modules_to_save": adapter.config.get("modules_to_save"),
        "fan_in_fan_out": adapter.fan_in_fan_out,
        "r": common,
        "lora_alpha": common,
        "lora_dropout": adapter.config.get("lora_dropout") or 0.0,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "use_rslora": False,
        "use_dora": False,
    }
    left_out = [name for name in adapter.modules if name not in ranks]
    save_file(tensors, folder / WEIGHTS_NAME, _record(adapter, complete=not left_out))
    _write_config(folder, config)
    copy_tokenizer(adapter.directory, folder)
    return {"ranks": {name: common if uniform else r for name, r in ranks.items()}, "left_out": left_out}


def folded(update: Update) -> tuple[Tensor, Tensor]:
    """Return (A', B') of shapes (r, in_features) and (out_features, r) with B' A' = ΔW."""
    root = update.e.abs().sqrt()
    return update.a * root[:, None], update.b * (update.e.sign() * root)


def _record(adapter: AdapterFile, *, complete: bool) -> dict[str, str] | None:
    record = dict(adapter.record)
    if not record:
        return None
    if not complete:  # the digest covers every adapted module, which the new file no longer names
        record["base"] = {part: value for part, value in record.get("base", {}).items() if part != "adapted"}
    return {RECORD_KEY: json.dumps(record, sort_keys=True)}


def _write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _target_modules(adapter: AdapterFile, targets: list[str]) -> list[str] | str:
    """Name the targets exactly: PEFT takes a list as name endings, so a name that ends another needs a regex."""
    if any(_ends_another(name, adapter) for name in targets):
        return "|".join(name.replace(".", r"\.") for name in targets)
    return targets


def _exact(name: str, adapter: AdapterFile) -> str:
    return f"^{name}" if _ends_another(name, adapter) else name


def _ends_another(name: str, adapter: AdapterFile) -> bool:
    return any(other.endswith("." + name) for other in adapter.modules)
