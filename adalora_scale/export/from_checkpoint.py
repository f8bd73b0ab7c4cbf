"""A checkpoint-N folder as an adapter: what `export` reads of a run that has not ended, or ended badly."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from adalora_scale.adalora.adaptables import FACTORS, MATRIX, FileForm
from adalora_scale.adalora.matrices import kept_columns, matrix_names, parts
from adalora_scale.checkpoint.format import MANIFEST_NAME, Checkpoint
from adalora_scale.checkpoint.identity import saved_identity
from adalora_scale.config import AdaLoraConfig, adalora_config_from_dict
from adalora_scale.errors import UserError
from adalora_scale.experts.names import joined_name
from adalora_scale.export.adapter_file import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from adalora_scale.export.adapter_record import BEFORE_FINAL, RECORD_KEY, save_adapter_file
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.whole_adapter import stored_matrix
from adalora_scale.files import writing
from adalora_scale.tasks.registry import TASKS


@contextlib.contextmanager
def adapter_folder(directory: Path) -> Iterator[Path]:
    """Give a folder with an adapter in PEFT's format: the one named, or a temporary one made of a checkpoint.

    Raises:
        UserError: the checkpoint is damaged, or not of a run.
    """
    if (directory / CONFIG_NAME).is_file() or not (directory / MANIFEST_NAME).is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="adalora_checkpoint_") as name:
        folder = Path(name)
        checkpoint = Checkpoint(directory)
        checkpoint.verify()
        with writing(folder):
            write_adapter(checkpoint, folder)
        for tokenizer in (directory.parent, directory):
            copy_tokenizer(tokenizer, folder)
        yield folder


def adalora_options(checkpoint: Checkpoint) -> AdaLoraConfig:
    """Return the method's options of the run that wrote a checkpoint.

    Raises:
        UserError: the manifest does not say.
    """
    known = {field.name for field in dataclasses.fields(AdaLoraConfig)}
    for part in ("identity", "allocator"):
        _part(checkpoint, part)
    saved = {key.removeprefix("adalora."): value for key, value in saved_identity(checkpoint).items()}
    return adalora_config_from_dict({key: value for key, value in saved.items() if key in known})


def masks(checkpoint: Checkpoint) -> dict[str, list[bool]]:
    """Return module → which triplets are in the current mask."""
    return {module: [bit == "1" for bit in bits] for module, bits in _part(checkpoint, "allocator")["mask"].items()}


def write_adapter(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's adapter in PEFT's format; after the final allocation only the kept triplets."""
    position, options = _part(checkpoint, "allocator"), adalora_options(checkpoint)
    tensors: dict[str, Tensor] = {}
    # Adapters that were built at their pruned ranks are not there where no triplet is left.
    held = checkpoint.shapes("adapter")
    kept = {
        module: mask
        for module, mask in masks(checkpoint).items()
        if any(mask) or not position["frozen"] or f"{module}.{FACTORS[0]}" in held
    }
    forms: dict[str, Any] = checkpoint.manifest.get("forms", {})
    for module, mask in kept.items():
        a, e, b = (_whole(checkpoint, "adapter", f"{module}.{factor}") for factor in FACTORS)
        matrices = e.shape[0] if e.dim() > 1 else 1
        columns = kept_columns(matrices, e.shape[-1], mask if position["frozen"] else None)
        form = FileForm.of_record(forms[module]) if module in forms else MATRIX
        for name, keep, own in zip(matrix_names(module, matrices), columns, parts(a, e, b, matrices), strict=True):
            tensors |= stored_matrix(name, form, *(factor[..., keep] for factor in own))
    saved: dict[str, None] = {}
    for key, shape in checkpoint.shapes("other").items():
        name = joined_name(key, len(shape))
        saved[name] = None
        tensors[PREFIX + name] = _whole(checkpoint, "other", key)
        for twin in (checkpoint.manifest.get("ties") or {}).get(key, []):  # a head tied to its embedding
            tensors[PREFIX + twin] = tensors[PREFIX + name].clone()
            saved[twin] = None
    task = TASKS.get(str(_part(checkpoint, "identity").get("task")))
    config: dict[str, Any] = {
        "peft_type": "ADALORA",
        "task_type": task.peft_type if task else None,
        "base_model_name_or_path": checkpoint.manifest.get("base_model"),
        "inference_mode": True,
        "bias": "none",
        "target_modules": list(kept),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in saved}) or None,
        "fan_in_fan_out": False,
        **options.peft_fields(position["total_step"]),
        "rank_pattern": {f"{module}.lora_E": mask for module, mask in kept.items()} if position["frozen"] else None,
    }
    record = {} if position["frozen"] else {"unfinished": BEFORE_FINAL}
    save_adapter_file(tensors, folder / WEIGHTS_NAME, {RECORD_KEY: json.dumps(record)})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _whole(checkpoint: Checkpoint, group: str, name: str) -> Tensor:
    if name not in checkpoint.shapes(group):
        raise UserError(f"the checkpoint {checkpoint.directory} holds no '{name}'; its files do not belong together.")
    tensor = checkpoint.read_whole(group, "weight", name)
    if tensor is None:
        raise UserError(f"the checkpoint {checkpoint.directory} holds no weight of '{name}'; take another one.")
    return tensor


def _part(checkpoint: Checkpoint, key: str) -> dict[str, Any]:
    part = checkpoint.manifest.get(key)
    if not isinstance(part, dict):
        raise UserError(f"{checkpoint.directory / MANIFEST_NAME} has no '{key}'; it is not a training checkpoint.")
    return part
