"""Quantise and dequantise, over bitsandbytes' kernels, with every state tensor as plain uint8.

    packed  (blocks, blocksize / 2) uint8   two 4-bit codes a byte
    scales  (blocks,) uint8                 first-level absmax as 8-bit codes; (blocks, 4) without double quantisation:
                                            the bytes of float32
    nested  (4 · (⌈blocks / 256⌉ + 257),)   second level: the bytes of its float32 scales, of the mean absmax, and of
                                            the 256 values that the codes stand for; empty without double quantisation

Blocks run over the row-major (out_features, in_features) weight and are independent of each other, so any slice of
blocks can be quantised alone. The second level is not: bitsandbytes subtracts the mean absmax of the whole tensor.

Source: bitsandbytes 0.50 functional.quantize_4bit and dequantize_4bit, whose bytes these are.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora_scale.errors import Unsupported
from adalora_scale.finite import require_finite
from adalora_scale.quantization.spec import CODES, NESTED_BLOCK, QuantSpec


@functools.cache
def bitsandbytes() -> ModuleType:
    """Return bitsandbytes.functional; importing it registers the operators used here.

    Imported when first needed: models without 4-bit layers do without it. It recommends an optional CPU kernel then,
    which training has no use for.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes.functional as bnb

    return bnb


def quantize_blocks(weights: Tensor, spec: QuantSpec, name: str = "a layer") -> tuple[Tensor, Tensor]:
    """Quantise whole blocks.

    Args:
        weights: (n · blocksize,) float32, bfloat16 or float16: consecutive weights of a row-major matrix.
        spec: the options.
        name: of the matrix, for messages.

    Returns:
        packed (n, blocksize / 2) uint8 and absmax (n,) float32.

    Raises:
        UserError: a weight is not finite.
    """
    require_finite({name: weights}, "the base model")
    bitsandbytes()
    half = spec.blocksize // 2
    if weights.numel() == 0:  # a rank may own no block
        return weights.new_empty(0, half, dtype=torch.uint8), weights.new_empty(0, dtype=torch.float32)
    packed, absmax = torch.ops.bitsandbytes.quantize_4bit.default(
        weights.contiguous(), spec.blocksize, spec.quant_type, torch.uint8
    )
    return packed.view(-1, half), absmax.float()


def encode_scales(absmax: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Turn the float32 absmax of a whole matrix, (blocks,), into (scales, nested) as the layer keeps them."""
    if not spec.double_quant:
        return as_bytes(absmax).view(-1, 4), absmax.new_empty(0, dtype=torch.uint8)
    mean = absmax.mean()
    codes, state = bitsandbytes().quantize_blockwise(absmax - mean, blocksize=NESTED_BLOCK)
    return codes, join_nested(state.absmax, mean, state.code)


def quantize(weight: Tensor, spec: QuantSpec, name: str = "a layer") -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a whole (out_features, in_features) matrix into (packed, scales, nested)."""
    spec.blocks(weight.shape[1], weight.shape[0], name)
    packed, absmax = quantize_blocks(weight.reshape(-1), spec, name)
    return packed, *encode_scales(absmax, spec)


def dequantize(
    packed: Tensor, scales: Tensor, nested: Tensor, spec: QuantSpec, shape: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Return the (out_features, in_features) matrix in `dtype`."""
    bitsandbytes()
    return dequantize_blocks(packed, decode_scales(scales, nested), spec, dtype).view(shape)


def dequantize_blocks(packed: Tensor, absmax: Tensor, spec: QuantSpec, dtype: torch.dtype) -> Tensor:
    """Return whole blocks, (n, blocksize), in `dtype`, of packed (n, blocksize / 2) and absmax (n,) float32."""
    bitsandbytes()
    # One block a row: the CPU kernel of bitsandbytes 0.50 takes a wrong absmax where rows are no multiple of blocks.
    flat = (absmax.numel(), spec.blocksize)
    weights: Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed.reshape(-1, 1), absmax, spec.blocksize, spec.quant_type, flat, dtype
    )
    return weights


def decode_expert_scales(scales: Tensor, level: Tensor | None) -> Tensor:
    """Return the float32 absmax, (blocks,), of one expert's scales and its row of `ExpertLinear4bit.nested`."""
    bitsandbytes()
    if level is None:
        return scales.reshape(-1).clone().view(torch.float32)
    values = level.clone().view(torch.float32)  # of its own: engines may lay a row at an address of no float's
    code = nested_code(scales.device)
    decode = torch.ops.bitsandbytes.dequantize_blockwise.default
    return decode(scales, values[:-1], code, NESTED_BLOCK, torch.float32) + values[-1]


@functools.cache
def nested_code(device: torch.device) -> Tensor:
    """Return the (256,) float32 values that first-level codes stand for; bitsandbytes' constant."""
    code: Tensor = bitsandbytes().create_dynamic_map().to(device)
    return code


def decode_scales(scales: Tensor, nested: Tensor) -> Tensor:
    """Return the float32 absmax, (blocks,), of scales and nested."""
    if scales.dim() == 2:
        return scales.view(torch.float32).view(-1)
    second, mean, code = split_nested(nested)
    return torch.ops.bitsandbytes.dequantize_blockwise.default(scales, second, code, NESTED_BLOCK, torch.float32) + mean


def linear(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    spec: QuantSpec,
    shape: tuple[int, int],
    bias: Tensor | None,
) -> Tensor:
    """Return ``x Wᵀ + bias`` by the kernel that bitsandbytes' own Linear4bit uses; bit for bit the same output.

    On CPU that kernel dequantises and multiplies, which is done here in two steps (`dequantize` says why).

    Args:
        x: (..., in_features) float32, bfloat16 or float16.
        packed, scales, nested: the matrix.
        spec, shape: its options and (out_features, in_features).
        bias: (out_features,) in x's dtype.
    """
    if x.device.type == "cpu":
        return F.linear(x, dequantize(packed, scales, nested, spec, shape, x.dtype), bias)
    bitsandbytes()
    second: dict[str, Tensor] = {}
    if scales.dim() == 2:
        absmax = scales.view(torch.float32).view(-1)
    else:
        absmax, mean, code = split_nested(nested)
        second = {"absmax_8bit": scales, "absmax_code": code, "absmax_offset": mean}
    return torch.ops.bitsandbytes.gemm_4bit.default(
        x, packed.reshape(-1, 1), shape, absmax, spec.blocksize, spec.quant_type, bias=bias, **second
    )


def join_nested(second: Tensor, mean: Tensor, code: Tensor) -> Tensor:
    """Return the bytes of the second level; the inverse of `split_nested`."""
    return as_bytes(torch.cat([second, mean.view(1), code.to(second.device)]))


def split_nested(nested: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second level's (⌈blocks / 256⌉,) scales, the mean absmax as a scalar, and the (256,) code book."""
    values = nested.view(torch.float32)
    return values[: -CODES - 1], values[-CODES - 1], values[-CODES:]


def as_bytes(values: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes, (4 · numel,) uint8."""
    return values.contiguous().view(-1).view(torch.uint8)


def check_kernels(spec: QuantSpec, device: torch.device, dtype: torch.dtype) -> None:
    """Quantise and multiply one block on `device`, so that a missing kernel shows before memory fills.

    Raises:
        Unsupported: bitsandbytes has no kernel for this device, weight dtype and compute dtype.
    """
    try:
        shape = (1, spec.blocksize)
        packed, scales, nested = quantize(torch.ones(shape, device=device, dtype=dtype), spec)
        linear(torch.ones(shape, device=device, dtype=spec.compute_dtype), packed, scales, nested, spec, shape, None)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Unsupported(
            f"bitsandbytes has no 4-bit kernel on {device.type} for {dtype} weights and "
            f"model.bnb_4bit_compute_dtype={str(spec.compute_dtype).removeprefix('torch.')} "
            f"({str(error).splitlines()[0]}); use another dtype, or model.load_in_4bit=false."
        ) from None
