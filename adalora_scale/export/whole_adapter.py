"""A model's adapter, put together in memory as the files hold it, and how far its training had come.

What is written after the final allocation has the ranks that the budget pays for. Anything else is marked in the weight
file's record, so that `inspect` and `export` can name it, and said when it is written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import FACTORS, FileForm
from adalora_scale.adalora.injection import Injection, adapter_layers, injected_module, injection_of
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.matrices import kept_columns, matrix_names, parts
from adalora_scale.adalora.targets import modules_to_save
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.experts.names import joined_name
from adalora_scale.export.adapter_file import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from adalora_scale.export.adapter_record import BEFORE_FINAL, NO_ALLOCATOR, RECORD_KEY, UNFINISHED, save_adapter_file
from adalora_scale.export.dequantise import quantised_base
from adalora_scale.files import replacing
from adalora_scale.messages import say
from adalora_scale.tasks.registry import task_of_model


@dataclass(frozen=True)
class WholeAdapter:
    """One adapter, on the CPU, under the names of its file."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    """Of `adapter_config.json`."""
    record: dict[str, Any]
    """What PEFT's config has no key for."""

    @property
    def unfinished(self) -> str | None:
        """A key of `UNFINISHED`; None after the final allocation."""
        return self.record.get("unfinished")

    def write(self, directory: str | Path) -> None:
        """Write both files, complete or not at all.

        Raises:
            UserError: values are not finite, the disk is full or the folder cannot be written.
        """
        text = json.dumps(self.config, indent=2) + "\n"
        metadata = {RECORD_KEY: json.dumps(self.record, sort_keys=True)}
        with replacing(Path(directory)) as folder:
            save_adapter_file(self.tensors, folder / WEIGHTS_NAME, metadata=metadata)
            (folder / CONFIG_NAME).write_text(text, encoding="utf-8")

    def name_state(self, directory: str | Path) -> None:
        """Say in one line what a reader of the folder must know, if the adapter is not finished."""
        if self.unfinished is not None:
            said = f"note: the adapter in {directory} is marked unfinished: {UNFINISHED[self.unfinished]}"
            say(said, to=sys.stderr)


@torch.no_grad()
def collected(model: nn.Module, whole: Callable[[Tensor], Tensor | None]) -> WholeAdapter | None:
    """Put a model's adapter together, and its modules_to_save.

    Args:
        model: with adapters, wrapped or not.
        whole: returns a parameter's or buffer's whole value on the CPU, or None on ranks that do not write. It is
            asked for the same tensors in the same order on every rank.

    Returns:
        The adapter; None where `whole` gives nothing.

    Raises:
        UserError: the model has no adapters.
    """
    layers, injection = dict(adapter_layers(model)), injection_of(model)
    if not layers or injection is None:
        raise UserError("the model has no AdaLoRA layers to save; call inject_adalora(model, config) first.")
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for name, layer in layers.items():
        a, e, b = (whole(getattr(layer, factor)) for factor in FACTORS)
        if a is None or e is None or b is None:
            continue
        if layer.keep_mask is not None:
            pattern[f"{name}.lora_E"] = layer.keep_mask
        columns = kept_columns(layer.matrices, layer.r, layer.keep_mask)
        each = parts(a, e, b, layer.matrices)
        for matrix, keep, own in zip(matrix_names(name, layer.matrices), columns, each, strict=True):
            tensors |= stored_matrix(matrix, layer.form, *(factor[..., keep] for factor in own))
    base = unwrapped(model)
    for name in modules_to_save(base, injection.config):
        for key, tensor in _whole_tensors(base.get_submodule(name)):
            if (value := whole(tensor)) is not None:
                tensors[PREFIX + joined_name(f"{name}.{key}", value.dim())] = value
    if not tensors:
        return None
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    record = _record(base, injection, pattern)
    return WholeAdapter(tensors, _peft_config(base, injection, layers, pattern), record)


def stored_matrix(name: str, form: FileForm, a: Tensor, e: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return one matrix's tensors by their keys in a file.

    Args:
        name: of the matrix.
        form: of its layer.
        a, e, b: A (in, k), E (k,) and B (out, k).
    """
    stored_a, stored_b = form.stored(a.T, b)
    factors = zip(form.adalora, (stored_a, e.unsqueeze(1).contiguous(), stored_b), strict=True)
    return {f"{PREFIX}{name}.{factor}": part for factor, part in factors}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DDP and torch.compile wrappers."""
    if (injected := injected_module(model)) is not None:
        return injected
    while True:
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _whole_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Name what `state_dict` would hold; under ZeRO-3 that would be empty tensors."""
    kept = module.state_dict().keys()  # leaves out buffers that are not persistent
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if name in kept]


def _peft_config(
    model: nn.Module, injection: Injection, layers: dict[str, AdaLoraLayer], pattern: dict[str, list[bool]]
) -> dict[str, Any]:
    config = injection.config
    task = task_of_model(model)
    return {
        "peft_type": "ADALORA",
        "task_type": task.peft_type if task else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "bias": "none",
        "target_modules": list(layers),
        "modules_to_save": _saved_names(model, config),
        "fan_in_fan_out": any(_fan_in_fan_out(layer) for layer in layers.values()),
        **config.peft_fields(injection.total_step),
        "rank_pattern": pattern or None,
    }


def _saved_names(model: nn.Module, config: AdaLoraConfig) -> list[str] | None:
    """Return modules_to_save as PEFT must know it: with the modules that share a weight with one that was named."""
    named = config.modules_to_save
    if not named:
        return None
    tied = set(modules_to_save(model, config)) - set(modules_to_save(model, config, tied=False))
    return [*named, *sorted(tied)]


def _fan_in_fan_out(layer: AdaLoraLayer) -> bool:
    # Of experts PEFT knows how their tensor lies.
    return layer.matrices == 1 and layer.adaptable.linear and layer.adaptable.is_transposed(layer.base_layer)


def _record(base: nn.Module, injection: Injection, pattern: dict[str, list[bool]]) -> dict[str, Any]:
    """Return the metadata that says what PEFT's config has no key for: which base this is, and the classes' names."""
    record: dict[str, Any] = {"base": injection.base_digests}
    if not pattern:
        record["unfinished"] = NO_ALLOCATOR if injection.total_step is None else BEFORE_FINAL
    task = task_of_model(base)
    if task is not None and task.has_labels:
        labels: dict[int, str] = base.config.id2label  # type: ignore[union-attr, assignment]
        record["labels"] = [labels[index] for index in sorted(labels)]
        if problem := getattr(base.config, "problem_type", None):
            record["problem_type"] = problem
    if quantisation := quantised_base(base):
        record["quantisation"] = quantisation
    return record
