"""What is read off the source of a model: who calls its blocks, reads weights, or has a backward of its own."""

from types import SimpleNamespace

import pytest
from torch.distributed.fsdp import FSDPModule

from adalora_scale.engines.blocks import blocks_in_function, called_blocks, transformer_blocks
from adalora_scale.errors import UserError
from adalora_scale.quantization.called import weights_read
from adalora_scale.training.for_trl import has_own_backward, settle_router_loss
from tests.architectures.small import small_model


def test_blocks_in_lists_of_lists_are_found():
    """Else FSDP2 is asked to shard a list, which has no forward."""
    model = small_model("funnel", "encoder")
    assert {type(block).__name__ for block in transformer_blocks(model)} == {"FunnelLayer"}
    assert len(called_blocks(model)) == len(transformer_blocks(model)) > 3


def test_blocks_whose_forward_is_called_past_hooks_are_not_sharded_alone():
    """Else their weights are still pieces when they are multiplied by."""
    model = small_model("squeezebert", "encoder")
    assert transformer_blocks(model) and called_blocks(model) == []
    assert called_blocks(small_model("bert", "encoder"))


def test_weights_that_a_loop_over_blocks_changes_are_seen():
    """RWKV divides two weights of every block in evaluation: an adapter beside them would not be divided."""
    model = small_model("rwkv", "causal")
    read = [name.split(".", 3)[3] for name in weights_read(model)]
    assert sorted(set(read)) == ["attention.output", "feed_forward.value"] and len(read) == 4


def test_functions_with_a_backward_of_their_own_are_seen():
    """Else Reformer's adapters get no gradient: its blocks are one function, whose input needs none."""
    assert has_own_backward(small_model("reformer", "encoder"))
    assert not has_own_backward(small_model("llama", "causal"))


def test_blocks_inside_a_function_are_seen():
    """Else FSDP2 trains nothing of them; other functions of a model's own are no such."""
    assert blocks_in_function(small_model("reformer", "encoder")) == "_ReversibleFunction"
    assert blocks_in_function(small_model("rwkv", "causal")) is None
    assert blocks_in_function(small_model("yoso", "encoder")) is None


@pytest.mark.parametrize("model_type", ["granitemoe", "mixtral", "minimax"])
def test_routers_have_their_loss_under_fsdp2_too(model_type):
    """FSDP2 gives a model a class of torch's module: else its routers' loss was left out without a word."""
    model = small_model(model_type, "causal")
    model.__class__ = type(
        f"FSDP{type(model).__name__}", (FSDPModule, type(model)), {"__module__": "torch.distributed.fsdp"}
    )
    training = SimpleNamespace(router_aux_loss_coef=0.02)
    settle_router_loss(model, training)
    assert training.router_aux_loss_coef == 0.02
    dense = small_model("llama", "causal")
    dense.config.output_router_logits = False
    with pytest.raises(UserError, match="no loss for its routers"):
        settle_router_loss(dense, training)
