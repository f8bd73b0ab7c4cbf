"""A tiny mixture of experts whose routing does not depend on rounding.

Engines add up in different orders, and a token near a tie between two experts would go to another one. Here routers
read a few features that hold nothing but the class of the token, which no frozen layer writes to: every class has two
experts far ahead of the others, and the last expert is never one of them. `Margins` says how far.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn

EXPERTS = 5
"""An odd number, so that two ranks cut a tensor of them inside one."""
CLASSES = EXPERTS - 1
_CODE = 2.0
"""Size of a token's class beside its other features, which are about 0.1: training may write into the class's features
too, and must stay far below it."""


def mixture() -> nn.Module:
    """Return a random Mixtral of 2 layers, 5 experts each, 2 a token, float32, drawn from torch's generator."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    shape = MixtralConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    # The plain loop over experts, which the reference goes on with; the others' experts are split.
    model = AutoModelForCausalLM.from_config(shape, experts_implementation="eager").float()
    code = slice(shape.hidden_size - CLASSES, None)
    with torch.no_grad():
        classes = torch.arange(shape.vocab_size) % CLASSES
        model.get_input_embeddings().weight[:, code] = _CODE * torch.eye(CLASSES)[classes]
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter[: code.start] = 2.0
                parameter[code] = float(name.endswith("post_attention_layernorm.weight"))  # attention and head see none
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[code] = 0
            layer.mlp.experts.down_proj[:, code] = 0
            layer.mlp.gate.weight.copy_(_router(shape.hidden_size))
    return cast(nn.Module, model)


def _router(hidden: int) -> Tensor:
    """Return (experts, hidden): class c goes to the experts c and c + 1, and nothing to the last."""
    scores = torch.zeros(EXPERTS, CLASSES)
    for number in range(CLASSES):
        scores[number, number], scores[(number + 1) % CLASSES, number] = 1.0, 0.85
    scores[-1] = -1
    return torch.cat([torch.zeros(EXPERTS, hidden - CLASSES), scores], dim=1)


class Margins(AbstractContextManager["Margins"]):
    """While it is open, how far apart the last expert that is taken and the first that is not are.

    Args:
        model: with routers, before anything wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.smallest = float("inf")
        """Smallest (taken − left out) / largest |logit| of all tokens so far."""
        self.reached: set[int] = set()
        """Experts that a token went to."""
        gates = [module for name, module in model.named_modules() if name.endswith(".mlp.gate")]
        self._hooks = [gate.register_forward_hook(self._look) for gate in gates]

    def _look(self, gate: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits = output[0].detach().double()
        best = logits.sort(dim=-1, descending=True).values
        k = output[2].shape[-1]
        relative = (best[:, k - 1] - best[:, k]) / logits.abs().amax(-1)
        self.smallest = min(self.smallest, relative.min().item())
        self.reached |= set(output[2].unique().tolist())

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
