"""A frozen linear layer with a 4-bit weight whose every byte is an ordinary parameter.

FSDP2 and ZeRO-3 shard `weight` and `scales` like any parameter: both are uint8, which no mixed-precision policy and no
`.half()` touches, and their first dimension counts blocks, so a row shard always cuts between blocks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.errors import UserError, nearest
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.experts.routers import routers
from adalora_scale.quantization import functional
from adalora_scale.quantization.called import computes_linear, weights_read
from adalora_scale.quantization.experts import ExpertLinear4bit, empty_4bit, in_16bit
from adalora_scale.quantization.operators import matmul_4bit
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.quantization.torch_2_11 import let_fsdp2_shard_bytes

let_fsdp2_shard_bytes()


class Linear4bit(nn.Module):
    """``y = x Wᵀ + b`` with W in 4 bits; neither W nor b is trained.

    Args:
        in_features, out_features: the matrix's sides.
        spec: code book, block size, double quantisation, compute dtype.
        bias: whether there is one.
        dtype: of the bias.
        device: of all tensors; they are uninitialised, see `quantize_`.
        transposed: the checkpoint holds the weight as (in_features, out_features), as transformers' Conv1D does.
        name: of the layer, for errors.

    Attributes:
        weight: (blocks, blocksize / 2) uint8, two codes a byte.
        scales: (blocks,) uint8, or (blocks, 4) without double quantisation.
        nested: the second level's bytes; a buffer that is replicated and not saved.

    The dequantised weight lives only during the product; the backward pass dequantises again.

    Raises:
        UserError: the block size does not divide the number of weights.

    Source: bitsandbytes.nn.Linear4bit, whose bytes and outputs are the same.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transposed: bool = False,
        name: str = "a layer",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.spec = spec
        self.transposed = transposed
        blocks = spec.blocks(in_features, out_features, name)
        options: dict[str, Any] = {"dtype": torch.uint8, "device": device}
        self.weight = nn.Parameter(torch.empty(blocks, spec.blocksize // 2, **options), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(spec.scales_shape(blocks), **options), requires_grad=False)
        self.register_buffer("nested", torch.empty(spec.nested_bytes(blocks), **options), persistent=False)
        self.nested: Tensor
        self.bias = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )

    @torch.no_grad()
    def quantize_(self, weight: Tensor, bias: Tensor | None = None, name: str = "a layer") -> None:
        """Take an (out_features, in_features) weight, and a bias, into this layer's own tensors.

        Raises:
            UserError: a weight is not finite; `name` says whose.
        """
        packed, scales, nested = functional.quantize(weight, self.spec, name)
        self.weight.copy_(packed)
        self.scales.copy_(scales)
        self.nested.copy_(nested)
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weight, (out_features, in_features), in `dtype` (default: the compute dtype)."""
        shape = (self.out_features, self.in_features)
        return functional.dequantize(
            self.weight, self.scales, self.nested, self.spec, shape, dtype or self.spec.compute_dtype
        )

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features), in x's dtype
        dtype = self.spec.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        y = matmul_4bit(
            x.to(dtype), self.weight, self.scales, self.nested, bias, self.spec.blocksize, self.spec.quant_type,
            (self.out_features, self.in_features),
        )  # fmt: skip
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{s.quant_type}, blocksize={s.blocksize}, double_quant={s.double_quant}"
        )


def is_quantizable(module: nn.Module) -> bool:
    """Whether a layer's weight can be kept in 4 bits: nn.Linear, Conv1D, what computes as they do, and experts."""
    return isinstance(module, ExpertLinear) or computes_linear(module)


def quantization_targets(model: nn.Module, skip_modules: list[str] | None = None) -> list[str]:
    """Return the names of the layers to quantise: all linear ones and experts, but the output head and what is skipped.

    Routers stay as they are, since rounding would send tokens to other experts, and so do layers that are not called as
    linear ones, those whose weight a module reads itself.

    Args:
        model: a transformers model, on any device, its experts split (`split_all_experts`).
        skip_modules: names (endings) of modules that stay in 16 or 32 bits, with all that is in them.

    Raises:
        UserError: an entry of `skip_modules` matches nothing, or there is nothing to quantise.
    """
    names = [name for name, _ in model.named_modules() if name]
    skipped = set(_existing(getattr(model, "_keep_in_fp32_modules", None), names))
    skipped |= set(_existing(getattr(model, "_keep_in_fp32_modules_strict", None), names))
    for entry in skip_modules or []:
        found = _existing([entry], names)
        if not found:
            endings = {name.split(".")[-1] for name in names}
            raise UserError(f"model.bnb_4bit_skip_modules: '{entry}' matches no module.{nearest(entry, endings)}")
        skipped |= set(found)
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    skipped |= weights_read(model).keys() | routers(model)
    targets = []
    for name in names:
        module = model.get_submodule(name)
        if module is head or any(name == parent or name.startswith(parent + ".") for parent in skipped):
            continue
        if is_quantizable(module):
            targets.append(name)
    if not targets:
        raise UserError("model.load_in_4bit finds no linear layer to quantise after model.bnb_4bit_skip_modules.")
    return targets


def replace_linears(model: nn.Module, spec: QuantSpec, targets: list[str]) -> None:
    """Put uninitialised `Linear4bit` layers in the place of `targets`, in place, on the device of their weights.

    Experts become `ExpertLinear4bit` layers.
    """
    replacements: dict[nn.Module, nn.Module] = {}
    for name in targets:
        old = model.get_submodule(name)
        if isinstance(old, ExpertLinear):
            replacements[old] = empty_4bit(old, spec, name)
            continue
        transposed = isinstance(old, Conv1D)
        sides = (old.nx, old.nf) if isinstance(old, Conv1D) else (old.in_features, old.out_features)
        bias = old.bias if isinstance(old.bias, Tensor) else None
        replacements[old] = Linear4bit(
            *cast(tuple[int, int], sides),
            spec=spec,
            bias=bias is not None,
            dtype=None if bias is None else bias.dtype,
            device=cast(Tensor, old.weight).device,
            transposed=transposed,
            name=name,
        )
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, leaf, replacements[child])


@torch.no_grad()
def quantize_model(model: nn.Module, spec: QuantSpec, skip_modules: list[str] | None = None) -> nn.Module:
    """Quantise a model that is already in memory, in place, and return it; large ones are streamed instead.

    Experts modules are split first.

    Raises:
        UserError: as `quantization_targets`, or the block size does not divide a weight.
    """
    split_all_experts(model)
    targets = quantization_targets(model, skip_modules)
    old = {name: model.get_submodule(name) for name in targets}
    replace_linears(model, spec, targets)
    for name, layer in old.items():
        new = model.get_submodule(name)
        if isinstance(new, ExpertLinear4bit) and isinstance(layer, ExpertLinear):
            new.quantize_(layer.weight, layer.bias, name)
        elif isinstance(new, Linear4bit) and isinstance(layer.weight, Tensor):
            weight = layer.weight.T if new.transposed else layer.weight
            new.quantize_(weight, layer.bias if isinstance(layer.bias, Tensor) else None, name)
    return model


@torch.no_grad()
def dequantize_model(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Put layers with the dequantised weights in the place of 4-bit ones, in place, and return the model."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if isinstance(child, ExpertLinear4bit):
                setattr(parent, leaf, in_16bit(child, dtype))
            elif isinstance(child, Linear4bit):
                biased = child.bias is not None
                new = nn.Linear(child.in_features, child.out_features, bias=biased, device="meta").requires_grad_(False)
                new.weight = nn.Parameter(child.dequantize(dtype), requires_grad=False)
                if child.bias is not None:
                    new.bias = nn.Parameter(child.bias.to(dtype), requires_grad=False)
                setattr(parent, leaf, new)
    return model


def quantized_share(model: nn.Module) -> tuple[int, int]:
    """Return (weights kept in 4 bits, all linear weights), counted in elements."""
    quantized = others = 0
    for module in model.modules():
        if isinstance(module, Linear4bit):
            quantized += module.in_features * module.out_features
        elif isinstance(module, ExpertLinear4bit):
            quantized += module.experts * module.in_features * module.out_features
        elif isinstance(module, ExpertLinear):
            others += module.experts * module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            others += module.in_features * module.out_features
        elif isinstance(module, Conv1D):
            others += module.nx * module.nf
    return quantized, quantized + others


def _existing(entries: Any, names: list[str]) -> list[str]:
    return [name for entry in entries or [] for name in names if name == entry or name.endswith("." + entry)]
