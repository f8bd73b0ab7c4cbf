"""A plan of a mixture: memory has all experts, arithmetic those that a token meets."""

import json

import pytest
import torch
from torch import nn

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cli import main
from adalora_scale.cluster.plan.memory import describe
from adalora_scale.cluster.plan.model import build
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.speed import flops_per_token
from adalora_scale.cluster.plan.trace import trace_step
from adalora_scale.cluster.plan.weights import largest_matrix, sharded_weights
from adalora_scale.config import load_config
from adalora_scale.engines.fsdp2_place import Fsdp2
from tests.conftest import ROOT

RECIPE = ROOT / "configs" / "recipes" / "gsm8k_qwen3_30b_a3b_80gb.yaml"
EXPERTS, EACH, HIDDEN, INSIDE, LAYERS = 32, 4, 256, 128, 3
PROJECTIONS = 3 * HIDDEN * INSIDE  # weights of an expert
SIDES = (HIDDEN + 2 * INSIDE) + (INSIDE + HIDDEN)
ATTENTION = 2 * HIDDEN * 256 + 2 * HIDDEN * 128
ATTENTION_SIDES = 2 * (HIDDEN + 256) + 2 * (HIDDEN + 128)
VOCABULARY = 1000


@pytest.fixture
def asked(tmp_path):
    def ask(*overrides, gpus=1, **shape):
        tree = {"model_type": "qwen3_moe", "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_experts": EXPERTS}
        tree |= {"num_experts_per_tok": EACH, "moe_intermediate_size": INSIDE, "num_hidden_layers": LAYERS}
        tree |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "torch_dtype": "bfloat16"}
        path = tmp_path / "shape.json"
        path.write_text(json.dumps(tree | {"tie_word_embeddings": False} | shape))
        options = [f"model.model_name_or_path={path}", "data.max_length=128", *overrides]
        return Request(config=load_config(RECIPE, options), gpus=gpus)

    return ask


def bytes_of(model, kind):
    return sum(piece.bytes for piece in describe(model).held if piece.kind == kind)


def test_all_experts_take_memory_and_a_token_meets_its_own(asked):
    """Else a mixture is planned as a dense model: eight times the arithmetic, or a fraction of the memory."""
    asked = asked()
    model = build(asked)
    linear = LAYERS * (EXPERTS * PROJECTIONS + ATTENTION)
    assert bytes_of(model, "4-bit weights") == linear // 2
    second = LAYERS * EXPERTS * 4 * ((4 + 1) + (2 + 1))  # 1024 and 512 blocks an expert, and a mean each
    assert bytes_of(model, "4-bit scales") == linear // 64 + second
    r = asked.config.adalora.init_r
    assert sum(layer.matrices for _, layer in adapter_layers(model)) == LAYERS * (2 * EXPERTS + 4)
    triplets = LAYERS * (EXPERTS * (SIDES + 2) + ATTENTION_SIDES + 4)
    assert bytes_of(model, "adapters") == 4 * r * triplets
    active = LAYERS * (EACH * PROJECTIONS + ATTENTION) + VOCABULARY * HIDDEN
    adapters = r * LAYERS * (EACH * SIDES + ATTENTION_SIDES)
    flops = flops_per_token(model, length=128, checkpointing=False)
    attention = 2 * 128 * 256 * LAYERS
    assert flops.forward == pytest.approx(2 * active + attention + 2 * adapters)
    assert largest_matrix(model) == 2 * INSIDE * HIDDEN * 2 + 4 * 1024  # one expert's


def test_a_step_is_traced_and_shards_are_weighed(asked):
    """Experts' products depend on values where they are loops; a plan has sizes alone."""
    few, many = (
        trace_step(asked(num_experts=count), sequences=2, checkpointing=True, autocast=True) for count in (8, 32)
    )
    assert few.per_block > 0 and many.forward_peak < 2 * few.forward_peak  # rows, not experts
    request = asked(gpus=3)
    whole = build(request)
    weights = sharded_weights(request, Fsdp2().sharder(device_type="cpu", bf16=True))
    for kind in ("4-bit weights", "4-bit scales", "adapters"):
        assert weights.local[kind] == pytest.approx(bytes_of(whole, kind) / 3, rel=0.02), kind


def test_the_command_plans_it_in_16_bits_too(asked, capsys):
    """The experts of a base that is not quantised are trained over as they are."""
    options = asked().config.model.model_name_or_path
    arguments = [f"model.model_name_or_path={options}", "model.load_in_4bit=false", "data.max_length=128"]
    assert main(["plan", "--config", str(RECIPE), *arguments, "--gpus", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part["bytes"] for part in found["engines"]["ddp"]["parts"]}
    assert parts["linear weights"] >= 2 * LAYERS * (EXPERTS * PROJECTIONS + ATTENTION)


def test_qwen3_30b_a3b_has_the_published_number_of_active_parameters():
    """30.5 B in all and 3.3 B for a token, the embedding among them: what its name and its card say."""
    model = build(Request(config=load_config(RECIPE, []), gpus=1))
    adapters = sum(layer.r * (layer.in_features + layer.out_features) * (8 / 128 if layer.matrices > 1 else 1) * 2
                   * layer.matrices for _, layer in adapter_layers(model))  # fmt: skip
    flops = flops_per_token(model, length=0, checkpointing=False)
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding) and embedding.weight.dtype == torch.bfloat16
    active = (flops.forward - adapters) / 2 + embedding.weight.numel()
    assert active == pytest.approx(3.3e9, rel=0.02)


def test_a_mixture_whose_loss_has_the_routers_is_planned(asked):
    """Their loss takes no mask of four dimensions, which the plan's batch has."""
    request = asked("data.packing=true", output_router_logits=True)
    assert trace_step(request, sequences=2, checkpointing=False, autocast=True) is not None
