"""The adapter in the forms that PEFT and inference servers load: AdaLoRA as it is, or plain LoRA with λ folded in."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import MATRIX
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import (
    PREFIX,
    WEIGHTS_NAME,
    AdapterFile,
    Update,
    peft_scale,
)
from adalora_scale.export.adapter_record import PEFT_SCALE, RECORD_KEY, save_adapter_file
from adalora_scale.export.lora_config import kept_ranks, lora_config, write_config
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.peft_targets import parameter_targets

_SELECTS = {"exclude_modules", "layers_to_transform", "layers_pattern"}
"""Keys of PEFT's config that choose modules beside target_modules."""


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
    save_adapter_file(tensors, folder / WEIGHTS_NAME, {RECORD_KEY: json.dumps(record, sort_keys=True)})
    # Exact names: a stranger's regular expression would be run by PEFT, which does not bound it.
    targets = {"target_modules": list(adapter.modules), **dict.fromkeys(_SELECTS & adapter.config.keys())}
    write_config(folder, adapter.config | targets | {"base_model_name_or_path": base or adapter.base})
    copy_tokenizer(adapter.directory, folder)
    return {"ranks": {name: shape.rank for name, shape in adapter.modules.items()}}


def write_peft_lora(
    adapter: AdapterFile,
    folder: Path,
    *,
    base: str | None,
    uniform: bool = False,
    rank: int | None = None,
    names: Collection[str] = (),
    model: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the adapter as plain LoRA whose scaling is 1: ΔW = B' A' with A' = √|s λ| Aᵀ and B' = B sign(λ) √|s λ|.

    Splitting λ evenly keeps both factors in range for servers that load them in float16.

    Args:
        adapter: what to write.
        folder: where.
        base: the base model's name, if it shall differ from the adapter's.
        uniform: pad every matrix with zeros to one rank, for servers that know no `rank_pattern`.
        rank: that rank; the largest one by default.
        names: modules of the base, as far as they are known.
        model: the base on the meta device, if it is at hand.

    Raises:
        UserError: a matrix has a larger rank than `rank`, or no triplet is left in any.
    """
    ranks = kept_ranks(adapter)
    largest = max(ranks, key=lambda name: ranks[name])
    common = rank or ranks[largest]
    if common < ranks[largest]:
        raise UserError(f"--rank {common} is smaller than the rank of '{largest}' ({ranks[largest]}); raise it.")
    if uniform:  # padding gives a matrix of rank 0 a place too
        ranks = {name: shape.rank for name, shape in adapter.modules.items()}
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
    tensors |= adapter.copied(ranks)
    left_out = [name for name in adapter.modules if name not in ranks]
    if uniform:
        ranks = dict.fromkeys(ranks, common)
    # With every alpha equal to its rank PEFT's alpha / r is 1, and so is what tools make of it that ignore patterns.
    config = lora_config(adapter, ranks, dict.fromkeys(ranks, 1.0), base=base, names=names, model=model)
    save_adapter_file(tensors, folder / WEIGHTS_NAME, record_of_part(adapter, complete=not left_out))
    write_config(folder, config)
    copy_tokenizer(adapter.directory, folder)
    return {"ranks": ranks, "left_out": left_out, "as_parameters": parameter_targets(config)}


def folded(update: Update) -> tuple[Tensor, Tensor]:
    """Return (A', B') of shapes (r, in_features) and (out_features, r) with B' A' = ΔW."""
    root = update.e.abs().sqrt()
    return update.a * root[:, None], update.b * (update.e.sign() * root)


def record_of_part(adapter: AdapterFile, *, complete: bool, settled: bool = False) -> dict[str, str] | None:
    """Return the metadata of a file that holds all of the adapter's matrices (`complete`), or some.

    `settled`: its ranks were chosen just now, whatever the training had come to.
    """
    record = {key: value for key, value in adapter.record.items() if not (settled and key == "unfinished")}
    if not record:
        return None
    if not complete:  # the digest covers every adapted module, which the new file no longer names
        record["base"] = {part: value for part, value in record.get("base", {}).items() if part != "adapted"}
    return {RECORD_KEY: json.dumps(record, sort_keys=True)}
