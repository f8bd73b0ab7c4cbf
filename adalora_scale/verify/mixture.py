"""Tiny mixtures of experts whose routing does not depend on rounding, one of every kind of experts and routers.

Engines add up in different orders, and a token near a tie between two experts would go to another one. Here routers
read a few features that hold nothing but the class of the token, which no frozen layer writes to: every class has
experts far ahead of the others, and the last expert is never one of them. `verify/margins.py` says how far.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from adalora_scale.experts.routers import routers

EXPERTS = 5
"""Of most kinds: an odd number, so that two ranks cut a tensor of them inside one."""
CLASSES = EXPERTS - 1
_CODE = 2.0
"""Size of a token's class beside its other features, which are about 0.1: training may write into the class's features
too, and must stay far below it."""
_HEADS, _HEAD_DIM = 4, 12
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": _HEADS * _HEAD_DIM,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class _Kind:
    """A family's config beside `_SIZES`, and what its routers are to choose."""

    sizes: dict[str, Any] = field(default_factory=dict)
    experts: int = EXPERTS
    pairs: tuple[tuple[int, int], ...] = tuple((number, (number + 1) % CLASSES) for number in range(CLASSES))
    """The two best experts of each class; the last expert is in none."""
    second: float = 0.95
    """Logit of the second one, of the first one's: nearer where both are taken anyway."""
    size: float = 1.0
    """Of the logits: smaller where a sigmoid would be flat."""
    apart: float = 0.0
    """Between the others of one group of experts, whose order decides nothing, but is measured."""


_KINDS = {
    "mixtral": _Kind({"num_local_experts": EXPERTS}),
    "qwen3_moe": _Kind(
        {"num_experts": EXPERTS, "moe_intermediate_size": 40, "head_dim": _HEAD_DIM, "decoder_sparse_step": 1}
    ),
    "gpt_oss": _Kind(
        {
            "num_local_experts": EXPERTS,
            "head_dim": _HEAD_DIM,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    ),
    "deepseek_v3": _Kind(  # a dense first layer, a shared expert, and the best two of the best two groups
        {
            "n_routed_experts": 9,
            "n_shared_experts": 1,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_group": 3,
            "topk_group": 2,
            "num_key_value_heads": _HEADS,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": _HEAD_DIM,
        },
        experts=9,
        pairs=((0, 3), (4, 6), (7, 1), (2, 5)),
        size=0.3,
        apart=0.2,
    ),
    "granitemoe": _Kind({"num_local_experts": EXPERTS}),
    "llama4_text": _Kind(  # every expert computes every token, all but one times zero
        {
            "num_local_experts": EXPERTS,
            "intermediate_size_mlp": 40,
            "head_dim": _HEAD_DIM,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
        },
        second=0.4,
        size=0.3,
    ),
    # Its routers draw at random among experts that are within 2 % of the best one, while training.
    "phimoe": _Kind({"num_local_experts": EXPERTS}, second=0.6),
}
KINDS = tuple(_KINDS)
"""transformers' model types."""
LEARNING_RATES = {"deepseek_v3": 0.1, "phimoe": 0.1}
"""Of another problem's learning rate, where 0.3 brings a choice near a tie within 60 steps."""


def mixture(kind: str = "mixtral") -> nn.Module:
    """Return a random model of one of `KINDS` of 2 layers, float32, drawn from torch's generator."""
    from transformers import AutoConfig, AutoModelForCausalLM

    own = _KINDS[kind]
    shape = AutoConfig.for_model(kind, **(_SIZES | own.sizes))
    # The plain loop over experts, which the reference goes on with; the others' experts are split.
    model = AutoModelForCausalLM.from_config(shape, experts_implementation="eager").float()
    code = slice(shape.hidden_size - CLASSES, None)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # biases, and what a family begins with zeros
                parameter.normal_(0, 0.1)
        classes = torch.arange(shape.vocab_size) % CLASSES
        model.get_input_embeddings().weight[:, code] = _CODE * torch.eye(CLASSES)[classes]
        for name, parameter in model.named_parameters():
            module, _, leaf = name.rpartition(".")
            if module.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
                is_weight, sees = leaf == "weight", module.endswith("post_attention_layernorm")
                if is_weight:
                    parameter[: code.start] = 2.0
                parameter[code] = float(is_weight and sees)  # attention and head see no class
            elif name.removesuffix(".weight").removesuffix("bias").rstrip("._").endswith(("o_proj", "down_proj")):
                _written(name, parameter, shape.hidden_size)[code] = 0
        for name in routers(model):
            router = model.get_submodule(name)
            router.weight.copy_(_router(own, shape.hidden_size))
            if isinstance(bias := getattr(router, "e_score_correction_bias", None), Tensor):
                bias.normal_(0, 0.02)
    return cast(nn.Module, model)


def _written(name: str, parameter: Tensor, hidden: int) -> Tensor:
    """Return a view with the side that is added to the hidden state first."""
    last = name.endswith("bias") or (parameter.dim() == 3 and parameter.shape[-1] == hidden)
    return parameter.movedim(-1 if last else -2, 0)


def _router(kind: _Kind, hidden: int) -> Tensor:
    """Return (experts, hidden): every class goes to its pair, and none to the last expert."""
    scores = torch.zeros(kind.experts, CLASSES)
    groups = kind.sizes.get("n_group", 1)
    scores -= kind.apart * (torch.arange(kind.experts) % (kind.experts // groups)).unsqueeze(1)
    for number, (first, second) in enumerate(kind.pairs):
        scores[first, number], scores[second, number] = 1.0, kind.second
    scores[-1] = -1
    return torch.cat([torch.zeros(kind.experts, hidden - CLASSES), kind.size * scores], dim=1)
