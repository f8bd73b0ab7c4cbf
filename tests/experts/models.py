"""Tiny random mixtures of experts, one of every kind that this package tells apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
EXPERTS = 5
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen3_moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8, "decoder_sparse_step": 1},
    "gpt_oss": {"num_local_experts": EXPERTS, "head_dim": 8, "sliding_window": 16},  # transposed, biased, interleaved
    "deepseek_v3": {  # a shared expert, a dense first layer
        "n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
        "n_group": 2, "topk_group": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8,
    },
    "granitemoe": {"num_local_experts": EXPERTS},
    "llama4_text": {  # every expert is given every token
        "num_local_experts": EXPERTS, "intermediate_size_mlp": 24, "head_dim": 8, "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
    },
    "phimoe": {"num_local_experts": EXPERTS},
    "nemotron_h": {  # no gate
        "n_routed_experts": 4, "moe_intermediate_size": 12, "hybrid_override_pattern": "*E", "head_dim": 8,
        "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 12,
    },
}  # fmt: skip
KINDS = tuple(_OWN)


def tiny(kind: str, *, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> nn.Module:
    """Build a model of one kind with weights of a size at which experts differ, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **(_SIZES | _OWN[kind] | options))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").to(
        dtype
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
    return model.eval()


def experts_of(model: nn.Module, found: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    """Return name → module of a model's experts, by the predicate under test."""
    return {name: module for name, module in model.named_modules() if found(module)}
