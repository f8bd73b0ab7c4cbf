"""AdaLoraCallback gives AdaLoRA to trainers this package did not write."""

import json

import datasets
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer
from transformers import TrainingArguments as Arguments
from trl import SFTConfig, SFTTrainer

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.inspection import inspect_folder
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.training.callback import AdaLoraCallback
from adalora_scale.training.idle import FirstStep
from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks
from tests.sizes import ONE_OF_EACH, assert_spent, parameters_of

CONFIG = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=24, tinit=2, tfinal=4, deltaT=3)
STEPS = 16
OPTIONS = {
    "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "logging_steps": 4, "use_cpu": True, "disable_tqdm": True, "bf16": False,
}  # fmt: skip


@pytest.fixture
def tokenizer(stories260k):
    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@pytest.fixture
def texts(data_dir):
    lines = (data_dir / "sgd_chat" / "train.jsonl").read_text().splitlines()[:64]
    return [" ".join(turn["content"] for turn in json.loads(line)["messages"])[:300] for line in lines]


def stock_trainer(kind, model, tokenizer, texts, folder, callback, **options):
    """A trainer as its own documentation builds it."""
    if kind == "SFTTrainer":
        return SFTTrainer(
            model,
            args=SFTConfig(str(folder), max_length=48, **OPTIONS, **options),
            train_dataset=datasets.Dataset.from_dict({"text": texts}),
            processing_class=tokenizer,
            callbacks=[callback],
        )
    rows = [{"input_ids": tokenizer(text)["input_ids"][:48]} for text in texts]
    return Trainer(
        model,
        Arguments(str(folder), **OPTIONS, **options),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[callback],
    )


@torch.no_grad()
def loss_on(model, tokenizer, texts):
    model.eval()
    ids = [torch.tensor([tokenizer(text)["input_ids"][:64]]) for text in texts[:8]]
    return sum(model(input_ids=row, labels=row).loss.item() for row in ids) / 8


@pytest.mark.shows("features", feature="AdaLoraCallback in a stock trainer", engine="one process")
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_unmodified_trainer_prunes_and_saves_what_it_trained(stories260k, tokenizer, texts, tmp_path, kind):
    """PEFT's AdaLoRA in a Trainer never prunes and says nothing; here the files and the live model must agree."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    before = loss_on(model, tokenizer, texts)
    callback = AdaLoraCallback()
    stock_trainer(kind, model, tokenizer, texts, tmp_path, callback, save_strategy="no").train()

    allocator = callback.allocator
    assert allocator.step == STEPS and allocator.frozen
    live = {name: int((layer.lora_E != 0).sum()) for name, layer in adapter_layers(model)}
    assert live == allocator.ranks()
    assert_spent(live, CONFIG.target_r)
    assert allocator.spent == parameters_of(live)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    logged = [record for record in records if "loss" in record]
    assert [record["step"] for record in logged] == [4, 8, 12, 16]
    assert logged[-1]["adalora/budget"] == CONFIG.target_r * ONE_OF_EACH
    assert logged[-1]["adalora/rank_total"] == sum(live.values())
    allocations = [json.loads(line) for line in (tmp_path / "ranks.jsonl").read_text().splitlines()]
    assert [a["step"] for a in allocations] == [3, 6, 9, 12]
    assert allocations[-1]["ranks"] == live

    trained = loss_on(model, tokenizer, texts)
    assert trained < before - 0.2
    loaded = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k), tmp_path)
    assert abs(loss_on(loaded, tokenizer, texts) - trained) < 1e-5


def test_checkpoints_of_a_stock_trainer_hold_the_adapter(stories260k, tokenizer, texts, tmp_path):
    """Without it the only copy of a killed run's adapter would be inside a whole model of wrapped layers."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    stock_trainer("Trainer", model, tokenizer, texts, tmp_path, AdaLoraCallback(), save_steps=8).train()
    early = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k), tmp_path / "checkpoint-8")
    assert {layer.r for _, layer in adapter_layers(early)} == {6}  # before the final allocation all are kept
    last = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k), tmp_path / "checkpoint-16")
    assert_spent({name: layer.r for name, layer in adapter_layers(last)}, CONFIG.target_r)
    assert abs(loss_on(last, tokenizer, texts) - loss_on(model, tokenizer, texts)) < 1e-5


@pytest.mark.shows("features", feature="save_model and checkpoints of a stock trainer", engine="one process")
@pytest.mark.parametrize("kind", ["Trainer", "SFTTrainer"])
def test_saving_by_a_stock_trainer_writes_the_adapter_alone(stories260k, tokenizer, texts, tmp_path, capsys, kind):
    """Else save_model and every checkpoint hold the base as `…base_layer.weight`, which nothing loads."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    trainer = stock_trainer(kind, model, tokenizer, texts, tmp_path / "run", AdaLoraCallback(), save_steps=8)
    trainer.save_model(str(tmp_path / "before"))
    assert "no allocator was attached" in capsys.readouterr().err
    assert inspect_folder(tmp_path / "before")["unfinished"] == "no allocator"
    trainer.train()
    trainer.save_model(str(tmp_path / "after"))
    said = capsys.readouterr().err.splitlines()
    (note,) = [line for line in said if "unfinished" in line]
    assert note.startswith(
        f"note: the adapter in {tmp_path}/run/checkpoint-8 is marked unfinished: it is from before the"
    )
    for folder in ("before", "after", "run/checkpoint-8", "run/checkpoint-16", "run"):
        assert (tmp_path / folder / "adapter_model.safetensors").is_file()
    assert not [path for name in ("model*", "pytorch_model*") for path in tmp_path.rglob(name)]
    assert inspect_folder(tmp_path / "run" / "checkpoint-8")["unfinished"] == "before the final allocation"
    assert inspect_folder(tmp_path / "after")["unfinished"] is None
    again = load_adapter(AutoModelForCausalLM.from_pretrained(stories260k), tmp_path / "after")
    assert abs(loss_on(again, tokenizer, texts) - loss_on(model, tokenizer, texts)) < 1e-5
    again.save_pretrained(tmp_path / "again")  # without a trainer
    assert inspect_folder(tmp_path / "again")["ranks"] == inspect_folder(tmp_path / "after")["ranks"]


def test_the_best_checkpoint_of_a_stock_trainer_is_refused_before_training(stories260k, tokenizer, texts, tmp_path):
    """transformers would look for a whole model there, warn, and go on with the last weights."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    trainer = stock_trainer("Trainer", model, tokenizer, texts, tmp_path, AdaLoraCallback(), save_steps=8)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(Unsupported, match="load_best_model_at_end=True"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_saving_a_prepared_model_whole_is_refused(stories260k, tmp_path):
    """A loop by hand that calls what it always called would write a model that loads with random weights."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG)
    with pytest.raises(UserError, match="save_adapter"):
        model.save_pretrained(tmp_path / "whole")
    assert not list(tmp_path.iterdir())


def test_model_without_adapters_is_refused(stories260k, tokenizer, texts, tmp_path):
    """The callback would do nothing, as PEFT's does, and the user would find out at the end."""
    model = AutoModelForCausalLM.from_pretrained(stories260k)
    trainer = stock_trainer("Trainer", model, tokenizer, texts, tmp_path, AdaLoraCallback(), save_strategy="no")
    with pytest.raises(UserError, match="inject_adalora"):
        trainer.train()
    assert not list(tmp_path.iterdir())


def test_schedule_without_room_is_refused_when_training_starts(stories260k, tokenizer, texts, tmp_path):
    """total_step is the trainer's: only there can the schedule be checked, and it must be before the first step."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), CONFIG.replace(tinit=10, tfinal=6))
    trainer = stock_trainer("Trainer", model, tokenizer, texts, tmp_path, AdaLoraCallback(), save_strategy="no")
    with pytest.raises(UserError, match=r"adalora\.tinit \(10 steps\)"):
        trainer.train()
    assert trainer.state.global_step == 0


WORKER = ROOT / "tests" / "distributed" / "workers" / "callback_alone.py"


def test_ranks_that_would_train_alone_are_refused(stories260k, tmp_path):
    """accelerate trains every rank alone on CPU unless told otherwise; rank 0's adapter would be saved as the job's."""
    for rank in run_ranks(WORKER, 2, [stories260k, tmp_path, "forgotten"]):
        assert "use_cpu=True" in rank["refused"]
    assert not (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.shows("features", feature="AdaLoraCallback in a stock trainer", engine="ddp")
@pytest.mark.full
def test_unmodified_trainer_prunes_alike_on_two_ranks(stories260k, tmp_path):
    """Ranks that disagree about the mask train two models."""
    ranks = run_ranks(WORKER, 2, [stories260k, tmp_path, "use_cpu"])
    assert [(rank["refused"], rank["world_size"]) for rank in ranks] == [("", 2)] * 2
    assert ranks[0]["digest"] == ranks[1]["digest"]
    assert ranks[0]["weights"] == ranks[1]["weights"]


def test_adapters_that_no_gradient_reaches_are_named_once(capsys):
    """Else a tower that no batch uses takes part of the budget in silence."""

    class TwoLayers(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.dropped, self.unused = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            self.dropped(x)
            return self.used(x)

    model = inject_adalora(TwoLayers(), AdaLoraConfig(init_r=2, target_r=1))
    watch = FirstStep(model)
    model(torch.ones(2, 4)).sum().backward()
    watch.name_idle()
    said = capsys.readouterr().err
    assert "no gradient reached 2 of 3 adapters" in said and "'dropped' and 1 more" in said
    model.used.lora_E.grad = None
    model(torch.ones(2, 4)).sum().backward()
    again = FirstStep(model)
    with torch.no_grad():
        model(torch.ones(2, 4))
    assert again.idle() == ["used", "dropped", "unused"]
