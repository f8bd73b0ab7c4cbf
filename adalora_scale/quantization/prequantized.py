"""4-bit checkpoints as transformers and bitsandbytes write them: reading by slices, and the same form for writing.

For a weight ``w``: ``w`` (bytes, 1) with two codes a byte, ``w.absmax``, ``w.quant_map``, with double quantisation
``w.nested_absmax`` and ``w.nested_quant_map``, and ``w.quant_state.bitsandbytes__nf4`` (JSON as uint8).

bitsandbytes has no form for a tensor over experts. Ours is that of a matrix with everything expert by expert: ``shape``
has three sides, ``w.nested_absmax`` is (experts, ⌈blocks of one / 256⌉), and ``w.nested_offset`` (experts,) stands for
the state's entry of that name. Only this package reads it.

Source: bitsandbytes 0.50 functional.QuantState.as_dict(packed=True).
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.quantization import functional
from adalora_scale.quantization.base_files import BaseFiles
from adalora_scale.quantization.memory import PIECE, block_pieces
from adalora_scale.quantization.spec import CODES, NESTED_BLOCK, QuantSpec
from adalora_scale.reading.json_text import parse_json
from adalora_scale.reading.schemas import QuantState, checked

_SECOND_LEVEL = {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32"}

_STORAGE = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}
"""Bytes an element of the dtypes that packed codes are stored in."""
_MAX_STATE = 65_536
"""Bytes of one weight's state; bitsandbytes writes some 200."""


def stored_dtype(checkpoint: BaseFiles, weight: str, parts: dict[str, str]) -> str:
    """Return the name of the dtype that a weight was quantised from.

    Raises:
        UserError: the state is unreadable.
    """
    return str(_state(checkpoint, weight, parts)["dtype"])


def stored_spec(
    checkpoint: BaseFiles, weight: str, parts: dict[str, str], compute_dtype: torch.dtype
) -> tuple[QuantSpec, tuple[int, ...]]:
    """Read one weight's options and its shape, (out_features, in_features) or (experts, out_features, in_features).

    Raises:
        UserError: the state is incomplete or unreadable.
        Unsupported: it was quantised with a code book or second level that bitsandbytes' kernels do not have.
    """
    state = _state(checkpoint, weight, parts)
    try:
        spec = QuantSpec(
            quant_type=state["quant_type"],
            blocksize=int(state["blocksize"]),
            double_quant="nested_offset" in state or "nested_offset" in parts,
            compute_dtype=compute_dtype,
        )
        shape = tuple(int(side) for side in state["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the 4-bit state of '{weight}' is damaged ({error!r}); download the checkpoint again."
        ) from None
    needed = {"absmax", "quant_map"} | ({"nested_absmax", "nested_quant_map"} if spec.double_quant else set())
    needed |= {"nested_offset"} if spec.double_quant and len(shape) == 3 else set()
    if missing := sorted(needed - parts.keys()):
        raise UserError(f"the checkpoint lacks '{weight}.{missing[0]}' of a 4-bit weight; download it again.")
    table = checkpoint.tensors[parts["quant_map"]]
    if (table.dtype, table.shape) != ("F32", (16,)):
        raise UserError(f"'{parts['quant_map']}' in {table.file} is no code book; download the checkpoint again.")
    code = checkpoint.whole(parts["quant_map"])
    if not torch.equal(code, functional.bitsandbytes().get_4bit_type(spec.quant_type, device="cpu")):
        raise Unsupported(f"'{weight}' was quantised with a {spec.quant_type} code book of its own; quantise it again.")
    if spec.double_quant and state.get("nested_blocksize") != NESTED_BLOCK:
        raise Unsupported(
            f"'{weight}' has a second level of blocks of {state.get('nested_blocksize')}; bitsandbytes' kernels know "
            f"{NESTED_BLOCK}. Quantise it again."
        )
    return spec, shape


def check_stored(
    checkpoint: BaseFiles, tensor: str, parts: dict[str, str], spec: QuantSpec, blocks: int, experts: int | None = None
) -> None:
    """Compare the sizes of a 4-bit weight's tensors with its number of blocks, from headers alone.

    Args:
        checkpoint: the files.
        tensor, parts: the weight's packed codes and its state.
        spec: its options.
        blocks: of the matrix, or of all experts.
        experts: how many matrices the tensor holds; None for one that is no tensor over experts.

    Raises:
        UserError: one has another size or dtype.
    """
    stored = checkpoint.tensors[tensor]
    width = _STORAGE.get(stored.dtype, 0)
    sizes = {tensor: (math.prod(stored.shape) * width, blocks * spec.blocksize // 2)}
    expected = {"absmax": (blocks, "U8" if spec.double_quant else "F32")}
    if spec.double_quant:
        of = experts or 1
        expected |= {
            "nested_absmax": (of * -(-blocks // of // NESTED_BLOCK), "F32"),
            "nested_quant_map": (CODES, "F32"),
        }
        expected |= {"nested_offset": (of, "F32")} if experts is not None else {}
    for part, (count, dtype) in expected.items():
        own = checkpoint.tensors[parts[part]]
        sizes[parts[part]] = (math.prod(own.shape) if own.dtype == dtype else -1, count)
    for name, (found, needed) in sizes.items():
        if found != needed:
            raise UserError(
                f"'{name}' in {checkpoint.tensors[name].file.name} does not hold the {needed} values of {blocks} "
                f"blocks; download the checkpoint again."
            )


def stored_blocks(
    checkpoint: BaseFiles, tensor: str, parts: dict[str, str], spec: QuantSpec, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """Read blocks start to stop: packed (stop - start, blocksize / 2) and their scales, both uint8."""
    half = spec.blocksize // 2
    # Other storage dtypes hold the same bytes, several an element.
    width = checkpoint.rows(tensor, 0, 1).element_size()
    packed = checkpoint.rows(tensor, start * half // width, stop * half // width).contiguous()
    scales = checkpoint.rows(parts["absmax"], start, stop)
    if not spec.double_quant:
        scales = functional.as_bytes(scales.float()).view(-1, 4)
    return packed.view(torch.uint8).view(-1, half), scales


def copy_stored(
    checkpoint: BaseFiles,
    weight: str,
    parts: dict[str, str],
    spec: QuantSpec,
    packed: Tensor,
    scales: Tensor,
    start: int,
    in_features: int,
) -> None:
    """Read packed codes and first-level scales into this rank's own, a piece at a time.

    Args:
        checkpoint, weight, parts, spec: as of `stored_blocks`.
        packed, scales: (blocks, blocksize / 2) and (blocks, …) uint8, written.
        start: the first of these blocks among the whole weight's.
        in_features: of the matrix, which says how large a piece may be.
    """
    stop = start + packed.shape[0]
    for first, last in block_pieces(start, stop, spec.blocksize, in_features, PIECE):
        codes, absmax = stored_blocks(checkpoint, weight, parts, spec, first, last)
        packed[first - start : last - start].copy_(codes)
        scales[first - start : last - start].copy_(absmax)


def stored_nested(checkpoint: BaseFiles, weight: str, parts: dict[str, str], spec: QuantSpec) -> Tensor:
    """Read the second level's bytes."""
    if not spec.double_quant:
        return torch.empty(0, dtype=torch.uint8)
    mean = torch.tensor(float(_state(checkpoint, weight, parts)["nested_offset"]), dtype=torch.float32)
    second, code = checkpoint.whole(parts["nested_absmax"]), checkpoint.whole(parts["nested_quant_map"])
    return functional.join_nested(second.float(), mean, code.float())


def stored_levels(checkpoint: BaseFiles, parts: dict[str, str], first: int, last: int) -> Tensor:
    """Read experts first to last's rows of `ExpertLinear4bit.nested`.

    Raises:
        Unsupported: codes stand for other values than bitsandbytes'.
    """
    code = checkpoint.whole(parts["nested_quant_map"])
    if not torch.equal(code, functional.nested_code(code.device)):
        raise Unsupported(f"'{parts['nested_quant_map']}' is a code book of its own; quantise the checkpoint again.")
    second = checkpoint.rows(parts["nested_absmax"], first, last)
    mean = checkpoint.rows(parts["nested_offset"], first, last)
    return torch.cat([second, mean.unsqueeze(1)], dim=1).view(torch.uint8)


def stored_form(
    weight: str, packed: Tensor, scales: Tensor, nested: Tensor, spec: QuantSpec, shape: tuple[int, int], dtype: str
) -> dict[str, Tensor]:
    """Return the tensors that a checkpoint holds of a 4-bit weight, by name.

    Args:
        weight: name of the weight.
        packed, scales, nested: its bytes on the CPU.
        spec, shape: options and (out_features, in_features).
        dtype: name of the dtype it was quantised from, "bfloat16" for example.
    """
    if not spec.double_quant:
        return _form(weight, packed, spec, shape, dtype, {"absmax": scales.view(torch.float32).view(-1)}, {})
    second, mean, code = functional.split_nested(nested)
    levels = {"absmax": scales, "nested_absmax": second.clone(), "nested_quant_map": code.clone()}
    return _form(weight, packed, spec, shape, dtype, levels, _SECOND_LEVEL | {"nested_offset": mean.item()})


def stored_experts_form(
    weight: str,
    packed: Tensor,
    scales: Tensor,
    levels: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int, int],
    dtype: str,
) -> dict[str, Tensor]:
    """Do what `stored_form` does, of a tensor over experts; `levels` as `ExpertLinear4bit.nested`."""
    if levels is None:
        return _form(weight, packed, spec, shape, dtype, {"absmax": scales.view(torch.float32).view(-1)}, {})
    values = levels.view(torch.float32)
    of_experts = {
        "absmax": scales,
        "nested_absmax": values[:, :-1].contiguous(),
        "nested_offset": values[:, -1].contiguous(),
        "nested_quant_map": functional.nested_code(torch.device("cpu")).clone(),
    }
    return _form(weight, packed, spec, shape, dtype, of_experts, _SECOND_LEVEL)


def _form(
    weight: str,
    packed: Tensor,
    spec: QuantSpec,
    shape: tuple[int, ...],
    dtype: str,
    scales: dict[str, Tensor],
    more: dict[str, Any],
) -> dict[str, Tensor]:
    """Return a 4-bit weight's tensors by name, given those of its scales by the parts' names."""
    state = {"quant_type": spec.quant_type, "blocksize": spec.blocksize, "dtype": dtype, "shape": list(shape)} | more
    tensors = {
        weight: packed.reshape(-1, 1),
        f"{weight}.quant_map": functional.bitsandbytes().get_4bit_type(spec.quant_type, device="cpu"),
    }
    tensors |= {f"{weight}.{part}": value for part, value in scales.items()}
    return tensors | {f"{weight}.quant_state.bitsandbytes__{spec.quant_type}": _as_tensor(state)}


def _as_tensor(state: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def _state(checkpoint: BaseFiles, weight: str, parts: dict[str, str]) -> dict[str, Any]:
    packed = [key for suffix, key in parts.items() if suffix.startswith("quant_state.")]
    if len(packed) != 1:
        raise UserError(f"the checkpoint has no quant_state of '{weight}'; download it again.")
    stored, name = checkpoint.tensors[packed[0]], f"'{packed[0]}' in {checkpoint.tensors[packed[0]].file}"
    if stored.dtype != "U8" or len(stored.shape) != 1 or stored.shape[0] > _MAX_STATE:
        raise UserError(f"{name} is damaged (it is no text of bytes); download the checkpoint again.")
    tree = parse_json(bytes(checkpoint.whole(packed[0]).tolist()), name)
    checked(QuantState, tree, name, way_out="download the checkpoint again")
    return dict(tree)
