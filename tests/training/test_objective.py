"""What is trained and evaluated is the model's own loss, a mean over tokens however they are spread over batches."""

import datasets
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, JetMoeConfig
from trl import SFTConfig

from adalora_scale.config import AdaLoraConfig
from adalora_scale.tasks.registry import find_task
from adalora_scale.training.trainers import AdaLoraSFTTrainer

SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
ROUTED = {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
SMALL_HEAD = {"cls_token_id": 3, "sep_token_id": 4}

MODELS = {
    # heads that TRL's fused one leaves out
    "modernbert-decoder": ({**SMALL_HEAD, "layer_types": ["sliding_attention", "full_attention"]}, True),
    "bert": ({"is_decoder": True}, True),
    "recurrent_gemma": ({"num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 8}, True),
    "electra": ({"is_decoder": True}, True),
    # routers' losses that it cannot compute, or does not know of
    "jetmoe": ({**ROUTED, "kv_channels": 8}, True),
    # what it does know
    "llama": (GROUPED, False),
    "gemma2": ({**GROUPED, "head_dim": 8}, False),
    "granite": ({**GROUPED, "logits_scaling": 8.0}, False),
    "cohere": (GROUPED, False),
    "phi": ({}, False),
    "mixtral": (ROUTED, False),
    "granitemoe": (ROUTED, False),
    "phimoe": ({**ROUTED, "sliding_window": 32}, False),
}


def model_of(kind, size=1.0):
    torch.manual_seed(0)
    options, _ = MODELS[kind]
    classes = {"bert": BertConfig, "jetmoe": JetMoeConfig}
    config = classes[kind](**SHAPE, **options) if kind in classes else AutoConfig.for_model(kind, **SHAPE, **options)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(size)
    return model


def rows_of(count, *, longest=12):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(count):
        ids = torch.randint(5, 96, (3 + index * 5 % longest,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return datasets.Dataset.from_list(rows)


@pytest.fixture
def make(stories260k, tmp_path):
    """Return a function that builds a trainer over rows that are tokens already."""

    def make(model, *, train=8, evaluated=7, **options):
        tokenizer = AutoTokenizer.from_pretrained(stories260k)
        tokenizer.pad_token = tokenizer.eos_token
        options = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3} | options
        arguments = SFTConfig(
            str(tmp_path / "out"), report_to="none", save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True}, activation_checkpointing=False,
            **{"max_length": 32} | options,
        )  # fmt: skip
        linear = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and ".0." in name]
        target = sorted(name for name in linear if not {"router", "gate", "encoder_attn"} & set(name.split(".")))[:2]
        config = AdaLoraConfig(init_r=2, target_r=1, target_modules=target, tinit=0, tfinal=0, deltaT=1)
        return AdaLoraSFTTrainer(
            model, args=arguments, train_dataset=rows_of(train), eval_dataset=rows_of(evaluated),
            processing_class=tokenizer, adalora_config=config,
        )  # fmt: skip

    return make


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_that_is_trained_is_the_models_own(make, capsys, kind, size):
    """Else another function is trained than the adapter serves, and every figure looks sound."""
    trainer = make(model_of(kind, size), max_steps=1)
    trainer.train()
    said = [line for line in capsys.readouterr().out.splitlines() if "own output head" in line]
    assert len(said) == MODELS[kind][1], said
    model = trainer.model.eval()
    batch = trainer.data_collator([dict(row) for row in rows_of(3)])
    routers = {"output_router_logits": True} if getattr(model.config, "output_router_logits", False) else {}
    own = model(**batch, **routers).loss
    loss = trainer.compute_loss(model, dict(batch))
    assert torch.allclose(loss, own, atol=1e-6, rtol=1e-5)
    gradients = []
    for value in (own, loss):
        model.zero_grad()
        value.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert gradients[0] and any(bool(gradient.abs().max() > 0) for gradient in gradients[0])
    for expected, found in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-6 + 1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("kind", ["bart", "blenderbot-small"])
def test_a_loss_that_does_not_shift_its_labels_is_not_the_objective(make, capsys, kind):
    """BART's decoder would learn to copy the token it was given, with a loss that falls."""
    shape = dict(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, dropout=0.0,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape))
    trainer = make(model, max_steps=1)
    trainer.train()
    assert "own loss is of the tokens it was given" in capsys.readouterr().out
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss_of_tokens(trainer.model, rows_of(7)), rel=1e-5)
    batch = trainer.data_collator([dict(row) for row in rows_of(1)])
    expected = loss_of_tokens(trainer.model, rows_of(1))
    assert trainer.compute_loss(trainer.model, dict(batch)).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def loss_of_tokens(model, rows):
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        log_probs = model.eval()(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
        wanted = labels != -100
        total -= log_probs[wanted, labels[wanted]].sum().item()
        count += int(wanted.sum())
    return total / count


@pytest.mark.parametrize("kind", ["llama", "modernbert-decoder", "mixtral"])
def test_evaluation_is_the_loss_of_all_tokens_at_every_batch_size(make, kind):
    """Else load_best_model_at_end compares figures that mean another thing for every batch size."""
    trainer = make(model_of(kind, 2.0))
    trainer.train()
    expected = loss_of_tokens(trainer.model, rows_of(7))
    seen = []
    for size in (1, 2, 3, 7):
        trainer.args.per_device_eval_batch_size = size
        seen.append(trainer.evaluate())
        assert seen[-1]["eval_loss"] == pytest.approx(expected, rel=1e-5), size
    figures = [record for record in trainer.state.log_history if "eval_loss" in record]
    for name in ("eval_mean_token_accuracy", "eval_entropy"):
        assert len({round(record[name], 5) for record in figures}) == 1
    for name in find_task("causal_lm").higher_is_better():  # what metric_for_best_model may name
        assert all(f"eval_{name}" in record for record in figures)


def test_packing_and_accumulation_leave_evaluation_alone(make):
    """A packed batch is one row of several; its tokens count as they do apart."""
    losses = []
    for options in ({}, {"padding_free": True, "max_length": None}, {"gradient_accumulation_steps": 2}):
        trainer = make(model_of("llama", 2.0), learning_rate=1e-9, **options)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_smoothed_labels_are_weighed_by_tokens_too(make):
    """label_smoothing_factor has a loss of its own, and the same question."""
    losses = []
    for size in (1, 7):
        trainer = make(model_of("llama", 2.0), per_device_eval_batch_size=size, label_smoothing_factor=0.1)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_row_without_labels_counts_nothing(make):
    """A batch of prompts alone must not turn the mean into no number."""
    trainer = make(model_of("modernbert-decoder"), max_steps=1)
    trainer.train()
    expected = trainer.evaluate()["eval_loss"]
    blank = [{"input_ids": [5, 6, 7], "labels": [-100] * 3}]
    with_blank = datasets.Dataset.from_list([*blank, *rows_of(7)])
    trainer.args.per_device_eval_batch_size = 1
    assert trainer.evaluate(with_blank)["eval_loss"] == pytest.approx(expected, rel=1e-5)
