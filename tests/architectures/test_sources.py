"""What is read off a model's classes: who calls its blocks, reads weights, or has a backward of its own."""

from adalora_scale.engines.blocks import called_blocks, transformer_blocks
from adalora_scale.quantization.called import weights_read
from adalora_scale.training.for_trl import has_own_backward
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
