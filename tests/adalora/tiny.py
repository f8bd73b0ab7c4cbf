"""Tiny transformers models, built from configurations on the spot."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
)


def gpt2():
    """Conv1D in every projection; the output head is tied to the embedding."""
    torch.manual_seed(0)
    dropouts = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=32, **dropouts))


def bert(num_labels=3):
    """A sequence classifier with a new head."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, vocab_size=64,
        max_position_embeddings=32, num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def mixtral():
    """Experts are two 3-D tensors a layer, the router a bare 2-D parameter."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    return MixtralForCausalLM(config)


def randomise(model, std=0.3, seed=5):
    """Give every triplet a λ, so that an adapter that does nothing cannot pass for one that works."""
    from adalora_scale.adalora.injection import adapter_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
