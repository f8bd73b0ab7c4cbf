"""The adapter in the forms that PEFT and inference servers load: AdaLoRA as it is, or plain LoRA with λ folded in."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import MATRIX
from adalora_scale.adalora.matrices import layer_of_matrix
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.modules import lies_input_first
from adalora_scale.export.adapter_file import (
    PREFIX,
    WEIGHTS_NAME,
    AdapterFile,
    peft_scale,
)
from adalora_scale.export.adapter_record import PEFT_SCALE, RECORD_KEY, save_adapter_file
from adalora_scale.export.expert_forms import folded, peft_places, peft_stack, plain_loras
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
    _refuse_part_of_experts(adapter)
    of_experts = next(iter(adapter.stacks), None)
    if other := of_experts or next((name for name, shape in adapter.modules.items() if shape.form != MATRIX), None):
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
    own_tensors: Mapping[str, Mapping[int, Sequence[str]]] | None = None,
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
        own_tensors: tensor of experts → expert → names of the checkpoint's own tensors for it; with `uniform` they get
            a LoRA each, as servers read it.

    Raises:
        UserError: a matrix has a larger rank than `rank`, or no triplet is left in any.
    """
    _refuse_part_of_experts(adapter)
    every = kept_ranks(adapter)
    largest = max(every, key=lambda name: every[name])
    common = rank or every[largest]
    if common < every[largest]:
        raise UserError(f"--rank {common} is smaller than the rank of '{largest}' ({every[largest]}); raise it.")
    stacks = {layer: max(every.get(name, 0) for name in matrices) for layer, matrices in adapter.stacks.items()}
    stacks = {layer: common if uniform else r for layer, r in stacks.items() if r}
    stacked = {name for matrices in adapter.stacks.values() for name in matrices}
    ranks = {name: r for name, r in every.items() if name not in stacked}
    if uniform:  # padding gives a matrix of rank 0 a place too
        ranks = {name: shape.rank for name, shape in adapter.modules.items() if name not in stacked}
    tensors: dict[str, Tensor] = {}
    for name in ranks:
        a, b = folded(adapter.update(name))
        if uniform:
            a = torch.nn.functional.pad(a, (0, 0, 0, common - a.shape[0]))
            b = torch.nn.functional.pad(b, (0, common - b.shape[1]))
        form = adapter.modules[name].form
        for factor, value in zip(form.lora, form.stored(a, b), strict=True):
            tensors[f"{PREFIX}{name}.{factor}"] = value
    served = {layer: own_tensors[layer] for layer in stacks if uniform and own_tensors and layer in own_tensors}
    of_servers = [name for layer, each in served.items() for parts in each.values() for name in parts]
    for layer, each in served.items():
        for matrix in adapter.stacks[layer]:
            _, number = layer_of_matrix(matrix) or (layer, 0)
            for name, values in plain_loras(adapter.update(matrix), each[number], common).items():
                tensors |= {f"{PREFIX}{name}.{f}": v for f, v in zip(MATRIX.lora, values, strict=True)}
    for layer, place in peft_places(layer for layer in stacks if layer not in served).items():
        updates = [adapter.update(name) for name in adapter.stacks[layer]]
        values = peft_stack(updates, stacks[layer], turned=_is_turned(layer, model))
        for factor, value in zip(MATRIX.lora, values, strict=True):
            tensors[f"{PREFIX}{place}.{factor}"] = value
    for name in adapter.others:
        tensors[PREFIX + name] = adapter.other(name)
    tensors |= adapter.copied(ranks)
    held = ranks.keys() | {name for layer in stacks for name in adapter.stacks[layer]}
    left_out = [name for name in adapter.modules if name not in held]
    if uniform:
        ranks = dict.fromkeys(ranks, common)
    # With every alpha equal to its rank PEFT's alpha / r is 1, and so is what tools make of it that ignore patterns.
    scalings = dict.fromkeys([*ranks, *stacks, *of_servers], 1.0)
    in_peft = {layer: r for layer, r in stacks.items() if layer not in served}
    if served:  # a form of servers' own: PEFT is not asked whether it would do the same
        model, ranks = None, ranks | dict.fromkeys(of_servers, common)
    config = lora_config(adapter, ranks, scalings, base=base, names=names, model=model, experts=in_peft)
    save_adapter_file(tensors, folder / WEIGHTS_NAME, record_of_part(adapter, complete=not left_out))
    write_config(folder, config)
    copy_tokenizer(adapter.directory, folder)
    said = {"ranks": ranks | in_peft, "left_out": left_out, "as_parameters": parameter_targets(config)}
    return said | ({"experts": in_peft} if in_peft else {}) | ({"served": len(of_servers)} if served else {})


def _refuse_part_of_experts(adapter: AdapterFile) -> None:
    """PEFT trains modules in full; a projection of experts is a module here and a parameter of one there."""
    for named in adapter.config.get("modules_to_save") or []:
        if any(name == named or name.endswith(f".{named}") for name in adapter.others):
            raise Unsupported(
                f"modules_to_save names '{named}', which is a parameter to PEFT and no module, so it does not open it; "
                f"use --format merged, or train the module around it in full."
            )


def _is_turned(layer: str, model: nn.Module | None) -> bool:
    if model is None:
        raise UserError(
            f"'{layer}' is of experts, and PEFT's form of them depends on the base model; name it with --base."
        )
    module = model.get_submodule(layer.rpartition(".")[0])
    return lies_input_first(module) and not getattr(module, "is_transposed", False)


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
