"""What TRL's trainer asks of a model with routers, where the model has none of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers as hf

from adalora_scale.errors import UserError
from adalora_scale.training.for_trl import name_backbone, settle_router_loss
from tests.adalora.test_called import HEADS, SIZES, llama4


def test_a_model_without_a_router_loss_gets_none():
    """Else TRL reads router logits of Llama 4 that its own loss does not use, and ends in an AttributeError."""
    training = SimpleNamespace(router_aux_loss_coef=None)
    settle_router_loss(llama4(), training)
    assert training.router_aux_loss_coef == 0.0
    with pytest.raises(UserError, match=r"router_aux_loss_coef is 0\.1, but Llama4ForCausalLM has no loss"):
        settle_router_loss(llama4(), SimpleNamespace(router_aux_loss_coef=0.1))


def test_a_router_loss_stays_and_finds_its_number_of_experts():
    """Else Phi's and Granite's mixtures, which name their experts otherwise, end in an AttributeError."""
    training = SimpleNamespace(router_aux_loss_coef=None)
    model = hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, **HEADS, num_local_experts=3, sliding_window=8))
    settle_router_loss(model, training)
    assert training.router_aux_loss_coef is None and model.config.num_experts == 3


def test_the_backbone_is_below_the_head():
    """Else TRL takes the logits of Llama 4 for its hidden states."""
    model = llama4()
    name_backbone(model)
    assert model.base_model is model.model
