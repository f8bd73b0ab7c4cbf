"""Tiny transformers models, built from configurations on the spot."""

import torch
from torch import nn
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


class Mixed(nn.Module):
    """Every type of base layer that is not quantised."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(32, 6, padding_idx=0)
        self.along = nn.Conv1d(6, 8, 3, padding=1)
        self.wide = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=1)
        self.pointwise = nn.Conv2d(4, 5, 1)
        self.out = nn.Linear(5, 3)

    def forward(self, ids):
        x = self.along(self.words(ids).transpose(1, 2)).unsqueeze(1)
        return self.out(self.pointwise(self.wide(x).relu()).flatten(2).mean(-1))


def mixed():
    """Three classes from token ids, in float32."""
    torch.manual_seed(0)
    return Mixed().eval()


def randomise(model, std=0.3, seed=5):
    """Give every triplet a λ, so that an adapter that does nothing cannot pass for one that works."""
    from adalora_scale.adalora.injection import adapter_layers

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model
