"""The adapter in PEFT's AdaLoRA format: `adapter_config.json` and `adapter_model.safetensors`.

In the file A is (r, in_features), E is (r, 1) and B is (out_features, r); after the final allocation only the kept
triplets are written and `rank_pattern` says which they were. Source: peft/tuners/adalora/model.py. PEFT's AdaLoRA has
linear layers only: for other types the file has the shapes that PEFT's LoRA gives them, and only this package reads it.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import FACTORS, adaptable_of, module_of_factor
from adalora_scale.adalora.base_digest import same_base
from adalora_scale.adalora.frozen import freeze
from adalora_scale.adalora.injection import (
    Injection,
    adapter_layers,
    attach_injection,
    digest_base,
    injection_of,
    replace_modules,
)
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.masters import keep_in_float32
from adalora_scale.adalora.matrices import Triplets, kept_columns, layer_among, matrix_names, stacked
from adalora_scale.adalora.targets import modules_to_save
from adalora_scale.config import AdaLoraConfig, adalora_config_from_dict
from adalora_scale.engines.full import full_parameter, settle
from adalora_scale.engines.ranks import rank_and_size, together
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.experts.names import split_name
from adalora_scale.export.adapter_file import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    peft_scale,
    read_adapter_config,
    weights_path,
)
from adalora_scale.export.adapter_file import PREFIX as _PREFIX
from adalora_scale.export.adapter_record import PEFT_SCALE, checked_record
from adalora_scale.export.base_copies import BASE_LAYER, require_own_copies
from adalora_scale.export.stock_saving import save_adapter_alone
from adalora_scale.export.switching import load_beside, refuse_trained_modules
from adalora_scale.export.tensor_files import TensorFile
from adalora_scale.export.tied import part_what_differs
from adalora_scale.export.whole_adapter import WholeAdapter, collected, unwrapped
from adalora_scale.tasks.vocabulary import fit_rows


@torch.no_grad()
def save_adapter(model: nn.Module, directory: str | Path, *, named: bool = True) -> None:
    """Write `model`'s adapter (and modules_to_save) to `directory` in PEFT's format.

    Before the final allocation, or without an allocator, every triplet is written, the file is marked as unfinished and
    one line says so; after it only the kept ones are written. Each file appears complete or not at all.

    With several processes every rank calls it, whatever the engine: parameters are gathered one by one (the fp32
    masters where an engine keeps such), and rank 0 writes. The files are there when any rank returns.

    Args:
        model: with adapters, wrapped or not.
        directory: where; it is made if it is not there.
        named: False leaves out the line about an unfinished adapter, for a caller that said so already.

    Raises:
        UserError: the model has no adapters, or, on all ranks, the disk is full or the folder cannot be written; an
            adapter that was there before stays then.
    """
    write_gathered(gather_adapter(model), directory, named=named)


def write_gathered(whole: WholeAdapter | None, directory: str | Path, *, named: bool = True) -> None:
    """Write what `gather_adapter` gave; as `save_adapter`, on every rank.

    Raises:
        UserError: on all ranks, the disk is full or the folder cannot be written.
    """
    together(partial(whole.write, directory) if whole is not None else lambda: None)
    if whole is not None and named:
        whole.name_state(directory)


def gather_adapter(model: nn.Module) -> WholeAdapter | None:
    """Put a model's adapter together on rank 0; None on the others. All ranks call it.

    Raises:
        UserError: the model has no adapters.
    """
    settle(model)
    return collected(model, partial(_gathered, model=model, keeps=rank_and_size()[0] == 0))


@torch.no_grad()
def load_adapter(
    model: nn.Module, directory: str | Path, *, adapter_name: str = "default", trainable: bool = False
) -> nn.Module:
    """Put the adapter in `directory` (written here or by PEFT) onto a base model, in place, and return the model.

    Layers are built at the ranks in the file, so pruned triplets cost nothing. On a model that has an adapter the new
    one is put beside it, and acts from `set_adapter(model, adapter_name)` on.

    Args:
        model: the base model the adapter was trained on.
        directory: where `adapter_config.json` and `adapter_model.safetensors` are.
        adapter_name: for `set_adapter`; one that the model does not have yet.
        trainable: leave the adapter's parameters trainable.

    Raises:
        UserError: files are missing or damaged, or the adapter belongs to another base model, or the name is taken.
        Unsupported: the adapter is of another method; or, beside another one, it or that one has modules that were
            trained in full.
    """
    if any(True for _ in adapter_layers(model)):
        load_beside(model, adapter_name, lambda base: _load_onto(base, Path(directory), trainable, beside=True))
        return model
    _load_onto(model, Path(directory), trainable)
    if (injection := injection_of(model)) is not None:
        injection.name = adapter_name
    return model


def _load_onto(model: nn.Module, directory: Path, trainable: bool, *, beside: bool = False) -> None:
    saved = read_adapter_config(directory)
    tensors, record = _read_weights(directory)
    split_all_experts(model)
    found = {key: module_of_factor(key.removeprefix(_PREFIX), "ADALORA") for key in tensors}
    modules = dict.fromkeys(module for module in found.values() if module is not None)
    if not modules:
        raise UserError(f"{directory / WEIGHTS_NAME} holds no AdaLoRA tensors (no key ends in .lora_E).")
    own = dict(model.named_modules())
    layers = dict.fromkeys(layer_among(own, name) for name in modules)
    checked = {name: _checked_layer(name, _base_of(model, name, directory), tensors, directory) for name in layers}
    there = {matrix for name, each in checked.items() for matrix in matrix_names(name, len(each))}
    if (lacking := next((name for name in modules if name not in there), None)) is not None:
        raise _no_such_module(lacking, directory)
    others = {split_name(model, k.removeprefix(_PREFIX)): v for k, v in tensors.items() if found[k] is None}
    copies = {name.replace(BASE_LAYER, "."): partial(others.pop, name) for name in list(others) if BASE_LAYER in name}
    require_own_copies(copies, dict(model.named_parameters(remove_duplicate=False)).get, directory)
    if beside and others:
        refuse_trained_modules(sorted({name.rpartition(".")[0] for name in others}))
    fit_rows(model, {name: tuple(value.shape) for name, value in others.items()})
    _check_others(model, others, directory)

    fields = {field.name for field in dataclasses.fields(AdaLoraConfig)}
    known = {key: value for key, value in saved.items() if key in fields and value is not None}
    if heads := saved.get("modules_to_save"):  # PEFT lists every usual name of a head, found in the model or not
        names = [name for name, _ in model.named_modules()]
        heads = [head for head in heads if any(name == head or name.endswith("." + head) for name in names)]
        known["modules_to_save"] = heads or None
    # PEFT's form scales by lora_alpha / init_r, whatever the adapter began as.
    config = adalora_config_from_dict({"init_weights": "adalora"} | known)
    digests = digest_base(model, layers, sorted({name.rpartition(".")[0] for name in others}))
    if not same_base(record.get("base") or {}, digests):
        raise UserError(
            f"the adapter in {directory} was trained on another base model (shapes agree, weights differ); load the "
            f"one it was trained on{f': {named}' if (named := saved.get('base_model_name_or_path')) else ''}."
        )

    part_what_differs(model, others, keeps_ties=bool(record) or bool(saved.get("ensure_weight_tying")))
    freeze(model, modules_to_save(model, config))
    pattern = saved.get("rank_pattern") or {}
    wrappers: dict[nn.Module, AdaLoraLayer] = {}
    scaling = saved["lora_alpha"] / saved["init_r"]
    lowered = 1 / peft_scale(saved["init_r"]) if record.get(PEFT_SCALE) else 1.0
    for name, triplets in checked.items():
        base, mask = model.get_submodule(name), pattern.get(f"{name}.lora_E")
        r = max(e.numel() for _, e, _ in triplets)
        columns = _columns(name, triplets, mask, r, directory)
        layer = AdaLoraLayer(base, r=r, scaling=scaling, dropout=saved.get("lora_dropout", 0.0))
        for factor, value in zip(FACTORS, stacked(triplets, r, columns), strict=True):
            parameter: nn.Parameter = getattr(layer, factor)
            parameter.copy_(value * lowered if factor == "lora_E" else value)
            parameter.requires_grad_(trainable)
        layer.keep_mask = mask
        wrappers[layer.base_layer] = layer
    replace_modules(model, wrappers)
    keep_in_float32(model, modules_to_save(model, config))
    parameters = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, value in others.items():
        parameters[name].copy_(value)
    for name in saved.get("modules_to_save") or []:
        for full, module in model.named_modules():
            if full == name or full.endswith("." + name):
                module.requires_grad_(trainable)
    attach_injection(model, Injection(config, record.get("base") or digests, total_step=saved.get("total_step")))
    save_adapter_alone(model)
    labels = record.get("labels")
    if isinstance(labels, list) and getattr(getattr(model, "config", None), "num_labels", None) == len(labels):
        model.config.id2label = dict(enumerate(labels))  # type: ignore[union-attr]
        model.config.label2id = {name: index for index, name in enumerate(labels)}  # type: ignore[union-attr]
        model.config.problem_type = record.get("problem_type")  # type: ignore[union-attr]


def saved_values(model: nn.Module, directory: str | Path) -> list[tuple[nn.Parameter, Tensor]]:
    """Return a live model's trainable parameters with the whole values that `save_adapter` wrote to `directory`.

    The inverse of saving, for a model in training: pruned triplets come back as zeros.

    Raises:
        UserError: files are missing or damaged, or are another model's.
        Unsupported: they were saved under another mask than the model's.
    """
    settle(model)
    directory = Path(directory)
    pattern = read_adapter_config(directory).get("rank_pattern") or {}
    tensors, _ = _read_weights(directory)
    values: list[tuple[nn.Parameter, Tensor]] = []
    for name, layer in adapter_layers(model):
        if pattern.get(f"{name}.lora_E") != layer.keep_mask:
            raise Unsupported(f"the adapter in {directory} was saved under another mask of '{name}' than the model's.")
        columns = kept_columns(layer.matrices, layer.r, layer.keep_mask)
        triplets = _checked_layer(name, layer.base_layer, tensors, directory)
        for matrix, (_, e, _), keep in zip(matrix_names(name, layer.matrices), triplets, columns, strict=True):
            if e.numel() != keep.numel():
                raise UserError(
                    f"{directory / WEIGHTS_NAME} holds {e.numel()} triplets of '{matrix}', not {keep.numel()}."
                )
            for factor in layer.form.adalora:
                del tensors[f"{_PREFIX}{matrix}.{factor}"]
        if layer.r:
            values += zip((getattr(layer, f) for f in FACTORS), stacked(triplets, layer.r, columns), strict=True)
    own = dict(unwrapped(model).named_parameters(remove_duplicate=False))
    seen: set[int] = set()
    for key, value in tensors.items():
        parameter = own.get(split_name(unwrapped(model), key.removeprefix(_PREFIX)))
        if parameter is not None and parameter.requires_grad and id(parameter) not in seen:
            seen.add(id(parameter))  # a tied one is there under each of its names
            values.append((parameter, value))
    return values


def _gathered(tensor: Tensor, model: nn.Module, keeps: bool) -> Tensor | None:
    """Gather a tensor over ranks; return it on the CPU, or nothing on ranks that do not write."""
    whole = full_parameter(tensor, model) if isinstance(tensor, nn.Parameter) else tensor.detach()
    return whole.cpu() if keeps else None


def _read_weights(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = TensorFile(weights_path(directory))
    record = checked_record(file)
    return {key: file.tensor(key) for key in file.entries}, record


def _base_of(model: nn.Module, name: str, directory: Path) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise _no_such_module(name, directory) from None


def _no_such_module(name: str, directory: Path) -> UserError:
    return UserError(
        f"the adapter in {directory} adapts '{name}', which this model does not have; load its own base model."
    )


def _columns(
    name: str, triplets: list[Triplets], mask: list[bool] | None, r: int, directory: Path
) -> list[Tensor] | None:
    """Return where a file's triplets go in the layer; None: in order.

    Raises:
        UserError: the mask is of others.
    """
    if mask is None:
        return None
    ranks = [e.numel() for _, e, _ in triplets]
    if len(mask) % len(ranks):
        raise UserError(f"{directory / CONFIG_NAME}: the mask of '{name}' does not fit its {len(ranks)} matrices.")
    columns = kept_columns(len(ranks), r, mask)
    for rank, kept in zip(ranks, columns, strict=True):
        if rank not in (len(mask) // len(ranks), kept.numel()):
            raise UserError(f"{directory / CONFIG_NAME}: the mask of '{name}' does not fit its {rank} triplets.")
    # A file may hold every triplet beside a mask, as PEFT's own do.
    return [kept if rank == kept.numel() else torch.arange(rank) for rank, kept in zip(ranks, columns, strict=True)]


def _checked_layer(name: str, base: nn.Module, tensors: dict[str, Tensor], directory: Path) -> list[Triplets]:
    """Return A (in, k), E (k,) and B (out, k) of every matrix of a layer.

    Raises:
        UserError: some are missing, or of other sides.
    """
    found = []
    for matrix in matrix_names(name, adaptable_of(base).matrices(base)):
        a, e, b = _checked_factors(matrix, base, tensors, directory)
        found.append((a.flatten(1).T, e.flatten(), b.flatten(1)))
    return found


def _checked_factors(
    name: str, base: nn.Module, tensors: dict[str, Tensor], directory: Path
) -> tuple[Tensor, Tensor, Tensor]:
    adaptable = adaptable_of(base)
    rows_a, rows_b = adaptable.sides(base)
    form = adaptable.form(base)
    a, e, b = (tensors.get(f"{_PREFIX}{name}.{factor}") for factor in form.adalora)
    if a is None or e is None or b is None:
        raise UserError(f"{directory / WEIGHTS_NAME} has no complete triplets for '{name}'.")
    needed = [tuple(part.shape) for part in form.stored(torch.empty(e.numel(), rows_a), torch.empty(rows_b, e.numel()))]
    if [tuple(a.shape), tuple(b.shape)] != needed:
        raise UserError(
            f"the adapter in {directory} has shapes {tuple(a.shape)} and {tuple(b.shape)} for '{name}', the model "
            f"needs {needed[0]} and {needed[1]}; load the base model it was trained on."
        )
    return a, e, b


def _check_others(model: nn.Module, others: dict[str, Tensor], directory: Path) -> None:
    """modules_to_save must exist with the same shapes before anything in the model is touched."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    for name, value in others.items():
        if name not in own:
            raise UserError(f"the adapter in {directory} holds '{name}', which this model does not have.")
        if own[name].shape != value.shape:
            raise UserError(
                f"the adapter in {directory} has shape {tuple(value.shape)} for '{name}', the model "
                f"{tuple(own[name].shape)}; load it onto a model with the same head (num_labels)."
            )
