"""Updates of experts in the forms that others read: PEFT's `target_parameters`, a stack of all experts' factors.

PEFT has one rank for all experts of a tensor, so every expert is padded with zeros to the largest rank among them; λ is
folded in. For a tensor of E experts that PEFT takes for (E, out, in) the file holds

    lora_A   (E · r, in)    row e · r + k is the right vector of triplet k of expert e
    lora_B   (out, r · E)   column k · E + e the left one

Source: peft/tuners/lora/layer.py, ParamWrapper (0.21). Where a module has two such tensors PEFT nests its wrappers, the
one that comes first in the module innermost, under `base_layer`.

vLLM reads the same stack for models whose experts lie in one tensor in the checkpoint, and else a LoRA of one rank for
each tensor that the checkpoint has, under that tensor's name: `….experts.5.gate_proj.lora_A.weight` (r, in) and
`….lora_B.weight` (out, r). Gate and up are rows of one matrix here, so they have the same A and each its rows of B.
Source: vllm/lora/model_manager.py `_create_merged_loras_inplace`, `_stack_moe_lora_weights` and
`_convert_3d_to_2d_moe_lora`; vllm/lora/lora_weights.py `pack_moe`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora_scale.experts.modules import PROJECTIONS
from adalora_scale.export.adapter_file import Update


def folded(update: Update) -> tuple[Tensor, Tensor]:
    """Return (A', B') of shapes (r, in_features) and (out_features, r) with B' A' = ΔW."""
    root = update.e.abs().sqrt()
    return update.a * root[:, None], update.b * (update.e.sign() * root)


def peft_stack(updates: Sequence[Update], r: int, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Return lora_A and lora_B of a tensor of experts.

    Args:
        updates: of every expert, of ranks up to r.
        r: PEFT's rank.
        turned: PEFT takes the tensor for (E, out, in), and it is (E, in, out): it gets ΔWᵀ.
    """
    each = [folded(update) for update in updates]
    if turned:
        each = [(b.T, a.T) for a, b in each]
    a = torch.cat([F.pad(a, (0, 0, 0, r - a.shape[0])) for a, _ in each])
    b = torch.stack([F.pad(b, (0, r - b.shape[1])) for _, b in each], dim=-1)
    return a.contiguous(), b.flatten(1).contiguous()


def plain_loras(update: Update, names: Sequence[str], r: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the checkpoint's tensor → (lora_A (r, in), lora_B (rows, r)) of one expert.

    Args:
        update: of the expert's matrix.
        names: of the checkpoint's tensors that its rows are, in equal parts.
        r: the rank, at least the update's.
    """
    a, b = folded(update)
    a, b = F.pad(a, (0, 0, 0, r - a.shape[0])), F.pad(b, (0, r - b.shape[1]))
    return {name: (a.clone(), rows.contiguous()) for name, rows in zip(names, b.chunk(len(names)), strict=True)}


def peft_places(parameters: Iterable[str]) -> Mapping[str, str]:
    """Return parameter → the module under whose name PEFT's file holds its factors.

    Args:
        parameters: all that are adapted, such as `model.layers.0.mlp.experts.down_proj`.
    """
    of_module: dict[str, list[str]] = {}
    for name in parameters:
        module, _, leaf = name.rpartition(".")
        of_module.setdefault(module, []).append(leaf)
    return {
        f"{module}.{leaf}": module + ".base_layer" * (len(leaves) - 1 - place)
        for module, leaves in of_module.items()
        for place, leaf in enumerate(sorted(leaves, key=PROJECTIONS.index))
    }
