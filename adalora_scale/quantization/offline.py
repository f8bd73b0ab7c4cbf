"""Quantising a checkpoint once: tensor by tensor, in little memory, into a form that transformers reads too.

The result is a folder as `save_pretrained` of a bitsandbytes model writes it: `AutoModelForCausalLM.from_pretrained`
loads it, and the streaming loader here reads it by slices at any number of ranks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from adalora_scale.errors import UserError
from adalora_scale.finite import require_finite
from adalora_scale.quantization import functional
from adalora_scale.quantization.base_files import FLOATS, INDEX_NAME, SINGLE_NAME
from adalora_scale.quantization.experts import ExpertLinear4bit, own_level
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.quantization.naming import stored_name
from adalora_scale.quantization.plan import LoadingPlan, Slot
from adalora_scale.quantization.prequantized import stored_experts_form, stored_form
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.reading.folders import own_file

COPIED = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py")
"""Small files that go with the weights: tokenizer, generation config, model code."""
_NOT_COPIED = {"config.json", INDEX_NAME, "export.json", "run.json", "trainer_state.json"}


@dataclass(frozen=True)
class Quantized:
    """What was written."""

    tensors_in_4bit: int
    bytes_read: int
    bytes_written: int
    files: int


def quantize_checkpoint(
    plan: LoadingPlan,
    config: dict[str, Any],
    source: Path,
    target: Path,
    *,
    device: torch.device,
    skip_modules: list[str],
    shard_bytes: int = 2 * 2**30,
    on_slot: Callable[[Slot], None] = lambda _: None,
) -> Quantized:
    """Write the 4-bit checkpoint of a plan's model.

    Args:
        plan: from `make_plan`, of a model on the meta device; weights that are 4-bit already are refused.
        config: the model's config.json.
        source: folder whose tokenizer and other small files are copied.
        target: an existing folder that is empty.
        device: where weights are quantised.
        skip_modules: names of the linear layers that stayed in 16 bits, for transformers.
        shard_bytes: largest size of one file; what is held in memory is one file and one tensor.
        on_slot: called after each tensor.

    Raises:
        UserError: the checkpoint is 4-bit already.
    """
    if any(slot.parts for slot in plan.slots):
        raise UserError("the checkpoint is in 4 bits already; it loads as it is.")
    spec = next(slot.module.spec for slot in plan.slots if isinstance(slot.module, Linear4bit | ExpertLinear4bit))
    names: list[list[str]] = []
    written = 0
    for shard in _shards(plan, device, shard_bytes, on_slot):
        file = target / f"part-{len(names)}.safetensors"
        file.touch()
        mode = file.stat().st_mode  # safetensors would leave it readable for its owner alone
        save_file(shard, file, metadata={"format": "pt"})
        file.chmod(mode)
        names.append(list(shard))
        written += _size(shard)
    _rename(target, names, written)
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in _NOT_COPIED:
                own_file(file, source)
                shutil.copyfile(file, target / file.name)
    stated = config | {"quantization_config": quantization_config(spec, skip_modules)}
    stated["dtype"] = _dtype_name(plan.dtype)
    (target / "config.json").write_text(json.dumps(stated, indent=2) + "\n", encoding="utf-8")
    quantized = sum(slot.quantized for slot in plan.slots)
    return Quantized(quantized, plan.checkpoint.bytes_read, written, len(names))


def quantization_config(spec: QuantSpec, skip_modules: list[str]) -> dict[str, Any]:
    """Return what config.json says of a 4-bit checkpoint; transformers' BitsAndBytesConfig reads it."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.quant_type,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": _dtype_name(spec.compute_dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skip_modules,
    }


def _shards(
    plan: LoadingPlan, device: torch.device, limit: int, on_slot: Callable[[Slot], None]
) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of one file after the other."""
    shard: dict[str, Tensor] = {}
    for slot in plan.slots:
        part = _stored(plan, slot, device)
        if shard and _size(shard) + _size(part) > limit:
            yield shard
            shard = {}
        shard |= part
        on_slot(slot)
    if shard:
        yield shard


@torch.no_grad()
def _stored(plan: LoadingPlan, slot: Slot, device: torch.device) -> dict[str, Tensor]:
    layer, checkpoint = slot.module, plan.checkpoint
    name = stored_name(slot.module, slot.leaf, slot.name)
    if slot.quantized and isinstance(layer, ExpertLinear4bit):
        return _stored_experts(plan, slot, layer, name, device)
    if not (slot.quantized and isinstance(layer, Linear4bit)):
        tensor = checkpoint.whole(slot.source)
        kept = {name: tensor.to(plan.dtype) if _follows_dtype(slot) else tensor}
        require_finite(kept, "the base model")
        return kept
    count = layer.in_features * layer.out_features
    flat = checkpoint.weights(
        slot.source, 0, count, in_features=layer.in_features, transposed=layer.transposed
    )  # (out_features · in_features,)
    shape = (layer.out_features, layer.in_features)
    packed, scales, nested = functional.quantize(flat.to(device, plan.dtype).view(shape), layer.spec, slot.name)
    dtype = _dtype_name(plan.dtype)
    return stored_form(slot.name, packed.cpu(), scales.cpu(), nested.cpu(), layer.spec, shape, dtype)


def _stored_experts(
    plan: LoadingPlan, slot: Slot, layer: ExpertLinear4bit, name: str, device: torch.device
) -> dict[str, Tensor]:
    """Quantise one expert after another; what is held is one in 16 bits and all in 4."""
    shape = (layer.out_features, layer.in_features)
    packed, scales, levels = [], [], []
    for expert in range(layer.experts):
        flat = plan.checkpoint.expert_weights(
            slot.source, expert, 0, shape[0] * shape[1], in_features=shape[1], transposed=layer.transposed
        )
        codes, first, nested = functional.quantize(flat.to(device, plan.dtype).view(shape), layer.spec, slot.name)
        packed.append(codes.cpu())
        scales.append(first.cpu())
        levels.append(own_level(nested.cpu()))
    level = torch.stack(levels) if layer.spec.double_quant else None
    sides, dtype = (layer.experts, *shape), _dtype_name(plan.dtype)
    return stored_experts_form(name, torch.cat(packed), torch.cat(scales), level, layer.spec, sides, dtype)


def _follows_dtype(slot: Slot) -> bool:
    """Whether a tensor takes the model's dtype: all floats but those that the model itself keeps in another."""
    tensor = getattr(slot.module, slot.leaf)
    return isinstance(tensor, nn.Parameter) and tensor.dtype in FLOATS.values() and tensor.dtype != torch.float32


def _rename(target: Path, names: list[list[str]], size: int) -> None:
    """Give the files the names that transformers expects, and write the index."""
    if len(names) == 1:
        (target / "part-0.safetensors").rename(target / SINGLE_NAME)
        return
    files = [f"model-{number + 1:05d}-of-{len(names):05d}.safetensors" for number in range(len(names))]
    for number, file in enumerate(files):
        (target / f"part-{number}.safetensors").rename(target / file)
    weight_map = {name: file for file, own in zip(files, names, strict=True) for name in own}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
