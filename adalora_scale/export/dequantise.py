"""4-bit bases at export: what an adapter records of the one it was trained on, and the values that base stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.dequantised_experts import (
    StoredExperts,
    copy_without_memory,
    projections_of,
    requantised_experts,
    stored_experts,
)
from adalora_scale.export.tensor_files import DTYPE_NAMES, DTYPES
from adalora_scale.quantization import functional
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.fill import fill
from adalora_scale.quantization.linear import Linear4bit, is_quantizable
from adalora_scale.quantization.materialize import materialize
from adalora_scale.quantization.naming import match_names
from adalora_scale.quantization.plan import make_plan
from adalora_scale.quantization.prequantized import (
    check_stored,
    stored_blocks,
    stored_dtype,
    stored_nested,
    stored_spec,
)
from adalora_scale.quantization.spec import QuantSpec


@dataclass(frozen=True)
class Stored:
    """A weight that the base keeps in 4 bits, by its values."""

    dtype: str
    """Dtype of the merged weight, the format's name: the one it had before it was quantised."""
    shape: tuple[int, int]
    """As plain transformers stores it: (in, out) for Conv1D, else (out, in)."""
    load: Callable[[], Tensor]
    """Returns the dequantised weight, float32."""


@dataclass
class Dequantised:
    """The 4-bit side of a base."""

    weights: dict[str, Stored]
    """Key of the checkpoint → its dequantised weight."""
    experts: dict[str, StoredExperts]
    """The same of tensors that hold experts."""
    companions: set[str]
    """Keys of scales and code books, which the merged model no longer has."""
    load_model: Callable[[], nn.Module]
    """Loads the 4-bit base, computing in float32."""
    said: str
    """What was dequantised, in words."""

    def dtypes(self) -> list[str]:
        """Return the dtypes of the merged weights, the format's names."""
        return [stored.dtype for stored in self.weights.values()] + [stored.dtype for stored in self.experts.values()]


def quantised_base(model: nn.Module) -> dict[str, Any] | None:
    """Return what an adapter records of a 4-bit base: options, and which linear layers are not quantised.

    `experts`, where there are some in 4 bits, names a tensor of them.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit | ExpertLinear4bit)]
    if not layers:
        return None
    spec = layers[0].spec
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    experts = (name for name, module in model.named_modules() if isinstance(module, ExpertLinear4bit))
    named = {"experts": first.replace(".base_layer", "")} if (first := next(experts, None)) else {}
    return named | {
        "quant_type": spec.quant_type,
        "blocksize": spec.blocksize,
        "double_quant": spec.double_quant,
        "compute_dtype": str(spec.compute_dtype).removeprefix("torch."),
        "weight_dtype": str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else None,
        "kept": [name.replace(".base_layer", "") for name, m in model.named_modules() if is_quantizable(m)],
    }


def dequantised_weights(adapter: AdapterFile, base: BaseCheckpoint) -> Dequantised:
    """Return the values of the 4-bit base: of a checkpoint in 4 bits, or of one that is quantised as training did it.

    Raises:
        UserError: neither is the checkpoint in 4 bits, nor does the adapter say how its base was quantised.
    """
    if base.quantization is not None:
        return _prequantised(base, adapter.saved)
    record = adapter.record.get("quantisation")
    if not isinstance(record, dict):
        raise UserError(
            f"--dequantise: {base.directory} is not in 4 bits, and the adapter in {adapter.directory} does not say "
            f"that it was trained on a 4-bit base; leave it out."
        )
    return _requantised(record, base, adapter.saved)


def refuse_quantised(base: BaseCheckpoint) -> None:
    """Refuse to merge into stored bytes that are not the weights themselves.

    Raises:
        UserError: the checkpoint is in bitsandbytes' 4 bits.
        Unsupported: it is quantised in another way.
    """
    if base.quantization is None:
        return
    if base.quantization.get("load_in_4bit") or base.quantization.get("_load_in_4bit"):
        raise UserError(
            f"{base.directory} is stored in 4 bits; pass --dequantise to merge into its dequantised values, or the "
            f"original 16-bit model to --base."
        )
    method = base.quantization.get("quant_method", "unknown")
    raise Unsupported(f"{base.directory} is quantised with '{method}'; pass the original 16-bit model to --base.")


def experts_in_4_bits(base: BaseCheckpoint) -> str | None:
    """Return the name of a tensor of experts that a checkpoint stores in 4 bits, which transformers does not load."""
    if base.quantization is None:
        return None
    stored = match_names(base.model, base.checkpoint.tensors).states
    return next((name for name in stored if len(base.parameters.get(name, ())) == 3), None)


def _prequantised(base: BaseCheckpoint, heads: list[str]) -> Dequantised:
    if not (base.quantization or {}).get("load_in_4bit") and not (base.quantization or {}).get("_load_in_4bit"):
        refuse_quantised(base)
    checkpoint = base.checkpoint
    names = match_names(base.model, checkpoint.tensors)
    weights: dict[str, Stored] = {}
    experts: dict[str, StoredExperts] = {}
    companions: set[str] = set()
    projections = projections_of(base)
    for parameter, parts in names.states.items():
        if parameter not in names.tensors or parameter not in base.parameters:
            raise UserError(f"{base.directory} holds a 4-bit state of '{parameter}' but not its weight; get it again.")
        key = names.tensors[parameter]
        companions |= set(parts.values())
        if (layer := projections.get(parameter)) is not None:
            experts[key] = stored_experts(base, parameter, key, parts, transposed=layer.transposed)
            continue
        spec, sides = stored_spec(checkpoint, parameter, parts, torch.float32)
        if len(sides) != 2:
            raise Unsupported(f"--dequantise: '{parameter}' is {sides} in 4 bits, no matrix; pass the 16-bit model.")
        shape = (sides[0], sides[1])
        dtype = stored_dtype(checkpoint, parameter, parts)
        check_stored(checkpoint, key, parts, spec, spec.blocks(shape[1], shape[0], parameter))
        transposed = base.transposed(parameter.removesuffix(".weight"))

        def load(
            key: str = key,
            parameter: str = parameter,
            parts: dict[str, str] = parts,
            spec: QuantSpec = spec,
            shape: tuple[int, int] = shape,
            transposed: bool = transposed,
        ) -> Tensor:
            blocks = spec.blocks(shape[1], shape[0], parameter)
            packed, scales = stored_blocks(checkpoint, key, parts, spec, 0, blocks)
            nested = stored_nested(checkpoint, parameter, parts, spec)
            values = functional.dequantize(packed, scales, nested, spec, shape, torch.float32)
            return values.T if transposed else values

        weights[key] = Stored(DTYPE_NAMES[getattr(torch, dtype)], shape[::-1] if transposed else shape, load)
    count = len(weights) + len(experts)
    said = f"the dequantised values of the {count} weights that {base.directory} stores in 4 bits"
    spec, split = QuantSpec(compute_dtype=torch.float32), bool(experts)
    return Dequantised(
        weights, experts, companions, lambda: _load_4bit(base, spec, torch.float32, [], heads, split=split), said
    )


def _requantised(record: dict[str, Any], base: BaseCheckpoint, heads: list[str]) -> Dequantised:
    try:
        spec = QuantSpec(
            quant_type=record["quant_type"],
            blocksize=record["blocksize"],
            double_quant=record["double_quant"],
            compute_dtype=torch.float32,
        )
        split = "experts" in record  # some in 4 bits; else a base's experts are no layers
        model = copy_without_memory(base.model, split=True) if split else base.model
        layers = {name for name, _ in model.named_modules()}
        kept = [str(name) for name in record["kept"] if name in layers]
        name = record["weight_dtype"]
        if name is not None and not isinstance(name, str):
            raise TypeError(name)
    except (KeyError, TypeError) as error:
        raise UserError(f"the adapter's record of its 4-bit base is damaged ({error!r}); export it again.") from None
    dtype = getattr(torch, name) if name in ("float32", "bfloat16", "float16") else DTYPES[base.dtype()]
    weights: dict[str, Stored] = {}
    for source in base.sources:
        module = (source.parameter or "").removesuffix(".weight")
        if source.parameter is None or module == source.parameter or module in kept:
            continue
        layer = base.model.get_submodule(module)
        if not is_quantizable(layer):
            continue
        entry = source.file.entries[source.key]
        transposed = base.transposed(module)

        def load(key: str = source.key, module: str = module, transposed: bool = transposed) -> Tensor:
            weight = base.checkpoint.whole(key)
            weight = (weight.T if transposed else weight).to(dtype)
            shape = (weight.shape[0], weight.shape[1])
            packed, scales, nested = functional.quantize(weight.contiguous(), spec, module)
            values = functional.dequantize(packed, scales, nested, spec, shape, torch.float32)
            return values.T if transposed else values

        weights[source.key] = Stored(entry.dtype, (entry.shape[0], entry.shape[1]), load)
    experts = requantised_experts(base, model, spec, dtype, kept) if split else {}
    count = len(weights) + len(experts)
    said = (
        f"the values that the {count} weights of {base.directory} have after {spec.quant_type} quantisation "
        f"(block size {spec.blocksize}, double quantisation {'on' if spec.double_quant else 'off'}), as in training"
    )
    return Dequantised(weights, experts, set(), lambda: _load_4bit(base, spec, dtype, kept, heads, split=split), said)


def _load_4bit(
    base: BaseCheckpoint, spec: QuantSpec, dtype: torch.dtype, kept: list[str], heads: list[str], *, split: bool
) -> nn.Module:
    """Load the base in 4 bits, experts too where they are `split`; what is not quantised is computed in float32."""
    model = copy_without_memory(base.model, split=split)
    requantises = base.quantization is None
    skipped = kept if requantises else None
    plan = make_plan(
        model,
        base.checkpoint,
        dtype=dtype,
        spec=spec,
        compute_dtype=spec.compute_dtype,
        skip_modules=skipped,
        new_heads=heads,
    )
    materialize(model.modules(), torch.device("cpu"), plan.ties)
    fill(plan, plan.slots, device=torch.device("cpu"))
    for head, _ in plan.fresh:  # the adapter brings their values
        for parameter in head.parameters():
            nn.init.zeros_(parameter)
    return model.eval()
