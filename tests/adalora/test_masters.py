"""What is trained beside the adapters is float32 in a 16-bit model: it moves, is saved, and its neighbours run."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers import LlamaForSequenceClassification as LlamaClassifier

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from tests.adalora.tiny import bert

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64,
    "num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip


def llama(kind=LlamaForCausalLM, **options):
    torch.manual_seed(0)
    return kind(LlamaConfig(**SIZES, **options))


def adapted(model, saved, dtype=torch.bfloat16):
    config = AdaLoraConfig(
        target_modules=r".*(query|value|q_proj|v_proj)", init_r=4, target_r=2, tinit=1, tfinal=1, modules_to_save=saved
    )
    return inject_adalora(model.to(dtype).eval(), config)


def batch(model):
    ids = torch.randint(1, 64, (4, 10), generator=torch.Generator().manual_seed(1))
    labels = ids if "Causal" in type(model).__name__ else torch.arange(4) % 3
    return {"input_ids": ids, "labels": labels}


MODELS = {
    "a linear head": (bert, ["classifier"]),
    "a head without bias": (lambda: llama(LlamaClassifier, num_labels=3), ["score"]),
    "a module in the middle": (bert, ["pooler", "classifier"]),
    "a norm": (llama, ["model.norm"]),
    "the output head": (llama, ["lm_head"]),
    "the embedding": (llama, ["embed_tokens"]),
    "all of a BERT's embeddings": (bert, ["embeddings"]),
    "a head tied to the embedding": (lambda: llama(tie_word_embeddings=True), ["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_it_moves_at_a_small_learning_rate(name):
    """Else most of a head never leaves its first values: 2e-5 is less than half a step of bfloat16."""
    make, saved = MODELS[name]
    model = adapted(make(), saved)
    inside = [model.get_submodule(n) for n, _ in model.named_modules() if any(n.endswith(s) for s in saved)]
    watched = {id(p): p for module in inside for p in module.parameters()}.values()
    assert all(parameter.dtype == torch.float32 and parameter.requires_grad for parameter in watched)
    before = [parameter.detach().clone() for parameter in watched]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5, weight_decay=0.0)
    model(**batch(model)).loss.backward()
    optimizer.step()
    for parameter, old in zip(watched, before, strict=True):
        reached = parameter.grad != 0  # rows of tokens that are not in the batch get none
        assert bool(reached.any()) and torch.equal(parameter != old, reached)


@pytest.mark.parametrize("name", MODELS)
def test_what_comes_after_it_stays_in_the_base_s_dtype(name):
    """Else a float32 embedding makes the whole model float32, or the next frozen layer refuses its input."""
    make, saved = MODELS[name]
    model = adapted(make(), saved)
    seen = {}
    for part, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.requires_grad:
            module.register_forward_hook(lambda m, args, out, part=part: seen.update({part: args[0].dtype}))
    logits = model(**batch(model)).logits
    assert seen and set(seen.values()) == {torch.bfloat16}
    ends = saved[-1] in ("classifier", "score", "lm_head")
    assert logits.dtype == (torch.float32 if ends else torch.bfloat16)


def test_the_same_logits_as_a_float32_head_by_hand():
    """Else a cast rounds the hidden states or the logits where it need not."""
    model = adapted(llama(LlamaClassifier, num_labels=3), ["score"])
    given = batch(model)
    hidden = model.model(given["input_ids"]).last_hidden_state
    assert hidden.dtype == torch.bfloat16
    expected = (hidden.float() @ model.score.weight.T)[:, -1]
    assert torch.equal(model(**given).logits, expected)


def test_a_tied_weight_stays_tied():
    """Else the head is trained and the embedding, which is the same weight, is left behind."""
    model = adapted(llama(tie_word_embeddings=True), ["lm_head"])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_adapter_with_such_a_head_loads_to_the_same_logits(dtype, tmp_path):
    """Else what was learnt below bfloat16's steps is lost when the adapter is loaded, here or in PEFT."""
    base = bert().to(dtype)
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, ["classifier"], dtype)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.03)
    expected = model(**batch(model)).logits
    save_adapter(model, tmp_path / "adapter")

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", dtype=dtype).eval()

    loaded = load_adapter(fresh(), tmp_path / "adapter")
    assert torch.equal(loaded(**batch(model)).logits, expected)
    theirs = PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    torch.testing.assert_close(
        theirs(input_ids=batch(model)["input_ids"]).logits.float(), expected.float(), rtol=0.05, atol=0.02
    )


def test_a_float32_base_gets_no_hooks():
    """Else every forward of the usual case pays for a cast that does nothing."""
    model = adapted(bert(), ["classifier"], torch.float32)
    assert not model.classifier._forward_pre_hooks and not model.classifier._forward_hooks
