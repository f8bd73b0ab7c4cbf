"""A small model of every architecture: its config's own defaults, with every size made small.

    kinds()                       # {"llama": "causal", "bert": "encoder", …}
    small_model("llama", "causal")

Names of sizes are those of transformers' configs. Whole kinds of layers stay: a hybrid model keeps one layer of each
kind that its default has, a mixture of experts has four of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCABULARY = 2112  # 2048 of the quickstart's tokenizer, and room for the tokens that a tokenizer's class adds (Qwen2)
LABELS = 3
_BY_VALUE: dict[int, str] = {
    VOCABULARY: "vocab_size n_vocab encoder_hash_byte_group_vocab",
    512: "max_position_embeddings n_positions max_seq_len n_ctx max_sequence_length seq_length context_length "
    "max_target_positions max_source_positions",
    64: "intermediate_size ffn_dim n_inner d_ff d_inner ffn_hidden_size hidden_dim encoder_ffn_dim decoder_ffn_dim "
    "feed_forward_size moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp block_ff_dim "
    "expert_intermediate_size mlp_hidden_size feedforward_size shared_intermediate_size d_ffn "
    "moe_shared_expert_intermediate_size mamba_d_ssm lru_width kv_channels_total dense_intermediate_size",
    32: "hidden_size d_model n_embd dim embedding_size emb_dim embedding_dim word_embed_proj_dim "
    "hidden_size_per_layer_input decoder_hidden_size d_embed attention_hidden_size true_hidden_size "
    "intra_bottleneck_size embed_dim hidden_size_global",
    16: "q_lora_rank kv_lora_rank state_size ssm_state_size mamba_d_state d_state mamba_chunk_size chunk_size "
    "index_head_dim qk_head_dim conv_dim num_ln_in_parallel o_lora_rank",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim mamba_head_dim mamba_headdim attention_head_dim d_kv "
    "kv_channels global_head_dim swa_head_dim swa_v_head_dim linear_key_head_dim linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_local_experts "
    "num_experts n_routed_experts moe_num_experts num_moe_experts time_step_rank mamba_n_heads mamba_num_heads "
    "linear_num_value_heads linear_num_key_heads swa_num_attention_heads index_n_heads num_routed_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads n_head_kv "
    "num_kv_heads num_experts_per_tok moe_topk top_k num_experts_per_token moe_k experts_per_token "
    "swa_num_key_value_heads num_global_key_value_heads n_kv_heads num_decoder_layers num_encoder_layers "
    "type_vocab_size num_selected_experts",
    1: "n_group num_expert_group topk_group mamba_n_groups n_groups mamba_ngroups first_k_dense_replace "
    "num_nextn_predict_layers num_hidden_groups moe_layer_start_index mlp_only_layers_count",
}  # fmt: skip
_SIZES = {name: value for value, names in _BY_VALUE.items() for name in names.split()}
_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "decoder_start_token_id": 0}

_HYBRID = {"num_hidden_layers": 3}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": _HYBRID | {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},  # routers that give no logits alone give no loss
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "flint": {"mlp_only_layers": [0]},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": VOCABULARY, "altup_num_inputs": 2},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 2, "mask_token_id": 3, "hidden_size": 32,
            "emb_layer_norm_before": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"], "mamba_n_heads": 8, "mamba_d_head": 8,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lilt": {"channel_shrink_ratio": 4, "hidden_size": 48, "num_attention_heads": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "nemotron": {"num_key_value_heads": 2},
    "mistral4": {"head_dim": 16},
    "qwen4_exp_text": {"indexer_n_heads": 4, "indexer_kv_heads": 2, "indexer_head_dim": 8},
    "recurrent_gemma": _HYBRID,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "is_decoder": False},
    "xlstm": {"num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "num_hidden_layers": 3,
               "mamba_headdim": 16, "n_mamba_heads": 4, "attention_head_dim": 16, "adapter_rank": 4,
               "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a family needs beside small sizes."""


def kinds() -> dict[str, str]:
    """Return every architecture by its `model_type`, and as what it is tried: `causal` or `encoder`."""
    masked, classified = set(MODEL_FOR_MASKED_LM_MAPPING_NAMES), set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    causal = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    encoders = (classified & masked) | (classified - causal)
    return dict.fromkeys(sorted(encoders | causal), "causal") | dict.fromkeys(sorted(encoders), "encoder")


def small_config(model_type: str) -> PretrainedConfig:
    """Return the default config of an architecture with small sizes."""
    return _small(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def small_model(model_type: str, kind: str) -> nn.Module:
    """Build it with random weights, in float32."""
    torch.manual_seed(0)
    config = small_config(model_type)
    if kind == "encoder":
        config.num_labels = LABELS
        return AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _small(cls: type[PretrainedConfig], own: dict[str, Any]) -> PretrainedConfig:
    default = cls()
    sizes: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            sizes[name] = _small(type(value), {})
        elif name in _SIZES and isinstance(value, int | type(None)) and not isinstance(value, bool):
            if value is not None:
                sizes[name] = _SIZES[name]
        elif isinstance(value, float) and "drop" in name:
            sizes[name] = 0.0  # two ranks draw other numbers than one
        elif name in _TOKENS:
            sizes[name] = _TOKENS[name] if value is not None else None
    if default.is_encoder_decoder:
        sizes["decoder_start_token_id"] = 0

    if _of(default, "num_key_value_heads") == _of(default, "num_attention_heads") and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = _SIZES["num_attention_heads"]  # as many as queries, as the default has it
    kinds_of_layers = vars(default).get("layer_types")
    if kinds_of_layers:
        one_of_each = list(dict.fromkeys(kinds_of_layers))
        sizes["layer_types"] = one_of_each if len(one_of_each) > 1 else one_of_each * 2
        sizes["num_hidden_layers"] = len(sizes["layer_types"])
    return cls(**sizes | own)


def _of(config: PretrainedConfig, name: str) -> Any:
    return vars(config).get(name)
