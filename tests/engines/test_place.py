"""Which engine a run gets: what is refused before a model is loaded, and what is noticed when training starts."""

import json
import os
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.config import AdaLoraConfig, EngineConfig
from adalora_scale.engines.fsdp2_place import Fsdp2, Hsdp
from adalora_scale.engines.registry import ENGINES, check_engine, configured, continues, engine_for, real_engine
from adalora_scale.engines.replicated import Ddp
from adalora_scale.engines.zero_place import Zero2
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.peft_adalora import save_adapter, saved_values
from adalora_scale.training.trainers import AdaLoraTrainer
from tests.conftest import ROOT
from tests.distributed.launcher import RankFailure, run_ranks
from tests.toy import adapters_of

ZERO2 = str(ROOT / "configs" / "deepspeed" / "zero2.json")


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """As a launcher leaves the environment, without accelerate."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    return monkeypatch


def test_auto_is_deepspeed_with_its_file_and_ddp_without():
    """`--deepspeed FILE` sets the name; a config file that only names the file must mean the same."""
    assert engine_for(EngineConfig()).name == "ddp"
    engine = engine_for(EngineConfig(config=ZERO2))
    assert (engine.name, engine.real) == ("deepspeed", "zero2")
    assert engine.configuration["zero_optimization"]["stage"] == 2


def test_what_a_deepspeed_file_leaves_out_comes_from_the_training_section():
    """DeepSpeed's default for clipping is none, for accumulation 1: the training section's would be ignored."""
    deepspeed = engine_for(EngineConfig(config={"zero_optimization": {"stage": 1}})).configuration
    assert deepspeed["gradient_clipping"] == deepspeed["gradient_accumulation_steps"] == "auto"
    given = {"zero_optimization": {"stage": 1}, "gradient_clipping": 0.5}
    assert engine_for(EngineConfig(config=given)).configuration["gradient_clipping"] == 0.5


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_deepspeed_files_leave_every_shared_value_to_the_training_section(name):
    """A number in one of them would disagree with the next user's training section."""
    shipped = json.loads((ROOT / "configs" / "deepspeed" / f"{name}.json").read_text())
    shared = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert [shipped[key] for key in shared] == ["auto"] * 3
    assert shipped["bf16"] == shipped["fp16"] == {"enabled": "auto"}
    assert shipped["zero_optimization"]["stage"] == int(name[4])


def test_accelerate_launch_brings_the_engine(launched):
    """auto follows it; FSDP must not reach accelerate, which turns it into DDP on CPU without a word."""
    launched.setenv("ACCELERATE_USE_FSDP", "true")
    launched.setenv("FSDP_VERSION", "2")
    launched.setenv("FSDP_OFFLOAD_PARAMS", "true")
    launched.setenv("FSDP_RESHARD_AFTER_FORWARD", "false")
    with pytest.raises(UserError, match=r"engine\.name=ddp.*fsdp2"):
        engine_for(EngineConfig(name="ddp"))
    engine = engine_for(EngineConfig(config={"reshard_after_forward": True}))
    assert (engine.name, engine.options.cpu_offload, engine.options.reshard_after_forward) == ("fsdp2", True, True)
    assert "ACCELERATE_USE_FSDP" not in os.environ
    launched.setenv("ACCELERATE_USE_FSDP", "true")
    launched.setenv("FSDP_VERSION", "1")
    with pytest.raises(Unsupported, match="fsdp_version: 2"):
        engine_for(EngineConfig())


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "deepspeed"}, ["engine.config", "configs/deepspeed"]),
        ({"name": "deepspeed", "config": "missing.json"}, ["engine.config=missing.json", "No such file"]),
        ({"name": "deepspeed", "config": {"stage": 2}}, ["zero_optimization"]),
        ({"name": "ddp", "config": {"replicate": 2}}, ["engine.config", "engine.name=ddp"]),
        ({"name": "fsdp2", "config": ZERO2}, ["engine.config", "FSDP2"]),
        ({"name": "fsdp2", "config": {"replica": 2}}, ["engine.config.replica", "replicate"]),
        ({"name": "fsdp2", "config": {"replicate": 0}}, ["engine.config.replicate"]),
        ({"name": "fsdp2", "config": {"param_dtype": "float16"}}, ["engine.config.param_dtype"]),
    ],
)
def test_unusable_sections_are_refused_by_key(section, words):
    """Each would otherwise fail in the middle of DeepSpeed or torch, or be ignored."""
    with pytest.raises(UserError) as error:
        engine_for(EngineConfig(**section))
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(("name", "start"), [("fsdp2", "torchrun"), ("deepspeed", "deepspeed --num_gpus")])
def test_sharding_engines_without_a_launcher_say_how_to_start(launched, name, start):
    """Without one DeepSpeed looks for MPI, and torch for a master address."""
    launched.delenv("RANK")
    with pytest.raises(UserError, match=start):
        engine_for(EngineConfig(name=name, config=ZERO2))


@pytest.mark.parametrize(
    ("overrides", "words_of_both"),
    [
        (["engine.config.gradient_clipping=0.5"], ["gradient_clipping=0.5", "training.max_grad_norm=1.0"]),
        (
            ["engine.config.train_micro_batch_size_per_gpu=4"],
            ["train_micro_batch_size_per_gpu=4", "training.per_device_train_batch_size=32"],
        ),
        (["engine.config.bf16.enabled=true"], ["bf16.enabled=True", "training.bf16"]),
    ],
)
def test_deepspeed_values_that_disagree_name_both_keys(overrides, words_of_both, tmp_path):
    """transformers#29348: one of two contradicting values wins, and nobody says which."""
    words = ["--config", "configs/recipes/quickstart.yaml", "engine.name=deepspeed",
             "engine.config.zero_optimization.stage=2", f"training.output_dir={tmp_path}", *overrides]  # fmt: skip
    with pytest.raises(RankFailure) as failure:
        run_ranks(ROOT / "launch" / "train.py", 1, words, env={"DS_ACCELERATOR": "cpu"})
    assert re.search(r"rank 0 ended with 2\b|exitcode *: 2\b", str(failure.value))  # the warm launcher's, torchrun's
    (line,) = [line for line in failure.value.ranks[0].output.splitlines() if line.startswith("error")]
    assert all(word in line for word in words_of_both), line


def test_another_engine_than_asked_for_is_noticed():
    """accelerate falls back to DDP, or to nothing, without a word."""
    model = nn.Linear(2, 2)
    assert real_engine(model).real == "one process"
    assert check_engine(model, Ddp(), world_size=1) == "one process"
    for asked in (Fsdp2(), Zero2()):
        with pytest.raises(UserError, match=rf"engine\.name={asked.name}.*one process"):
            check_engine(model, asked, world_size=1)
    for asked in (Ddp(), None):
        with pytest.raises(UserError):
            check_engine(model, asked, world_size=2)


class DeepSpeedEngine(nn.Module):
    """What DeepSpeed's engine shows of itself: its class's name and its stage."""

    def __init__(self, stage):
        super().__init__()
        self.zero_optimization_stage = lambda: stage


def test_deepspeeds_stage_0_is_refused_by_its_key():
    """Else a run is told at attach, after the model was loaded, that a class of DeepSpeed's is not supported."""
    for stage in ({"stage": 0}, {}, {"stage": 4}):
        with pytest.raises(Unsupported, match=r"zero_optimization\.stage=.*1, 2 or 3"):
            engine_for(EngineConfig(config={"zero_optimization": stage}))
    with pytest.raises(Unsupported, match=r"zero_optimization\.stage=0"):
        check_engine(DeepSpeedEngine(0), None, world_size=2)
    assert [real_engine(DeepSpeedEngine(stage)).real for stage in (1, 2, 3)] == ["zero1", "zero2", "zero3"]


def test_a_run_continues_exactly_on_every_engine_of_its_name():
    """Else a run on HSDP, or one moved from one process to DDP, would lose exact resume, or gain it wrongly."""
    exact = {name: {saved for saved in [*ENGINES, "zero0"] if continues(engine, saved)} for name, engine in {
        "ddp": configured(EngineConfig()),
        "fsdp2": configured(EngineConfig(name="fsdp2")),
        "deepspeed": configured(EngineConfig(config=ZERO2)),
    }.items()}  # fmt: skip
    assert exact == {
        "ddp": {"one process", "ddp"},
        "fsdp2": {"fsdp2", "hsdp"},
        "deepspeed": {"zero1", "zero2", "zero3"},
    }


def test_copies_make_fsdp2_hsdp():
    """Else plan, run.json and the order of recognition would speak of another engine than the run's."""
    assert type(configured(EngineConfig(name="fsdp2", config={"replicate": 2}))) is Hsdp
    assert type(configured(EngineConfig(name="fsdp2", config={"replicate": 1}))) is Fsdp2


# ---- the trainer in one process --------------------------------------------------------------------------------------


@pytest.fixture
def make(stories260k, tmp_path):
    """Build a trainer of a small classifier; returns it."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(3, 500, (8,), generator=generator).tolist(), "labels": index % 3}
        for index in range(48)
    ]

    def collate(examples):
        return {key: torch.tensor([row[key] for row in examples]) for key in ("input_ids", "labels")}

    def make(cls=AdaLoraTrainer, **options):
        torch.manual_seed(0)
        base = AutoModelForSequenceClassification.from_pretrained(stories260k, num_labels=3)
        base.config.pad_token_id = 0
        own = {"adalora_config": AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=3, deltaT=2,
                                               modules_to_save=["score"])}  # fmt: skip
        args = TrainingArguments(
            str(tmp_path / "out"), max_steps=9, use_cpu=True, report_to="none", logging_steps=1, disable_tqdm=True,
            learning_rate=1e-2, remove_unused_columns=False, max_grad_norm=0.1,
            **({"per_device_train_batch_size": 4, "save_strategy": "no"} | options),
        )  # fmt: skip
        return cls(
            base, args=args, train_dataset=rows, eval_dataset=rows[:12], data_collator=collate,
            **(own if cls is AdaLoraTrainer else {}),
        )  # fmt: skip

    return make


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulation_does_not_multiply_a_classifiers_loss(make):
    """transformers 5.23 multiplies it by the micro-batches (and ranks): its heads ignore num_items_in_batch."""
    plain = losses(make())
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert losses(make(**parts)) == pytest.approx(plain, rel=1e-4)
    stock = make(Trainer, **parts)
    assert stock.model_accepts_loss_kwargs  # when this fails, the trainer's work-around can go
    assert losses(stock)[0] == pytest.approx(2 * plain[0], rel=1e-3)


def test_best_checkpoint_needs_an_evaluation_at_the_budget(make):
    """Else the comparison never happens, and the last adapter is taken for the best."""
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "best"}
    trainer = make(**options, metric_for_best_model="eval_loss", eval_steps=5)
    with pytest.raises(UserError, match=r"step 6 of 9.*training\.eval_steps"):
        trainer.train()


def test_saved_values_are_the_live_ones(make, tmp_path):
    """Loading the best checkpoint would permute triplets, or lose the head."""
    trainer = make()
    trainer.train()
    layers = dict(adapter_layers(trainer.model))
    assert any(not all(layer.keep_mask) for layer in layers.values())
    save_adapter(trainer.model, tmp_path)
    values = saved_values(trainer.model, tmp_path)
    assert {id(parameter) for parameter, _ in values} == {
        id(parameter) for parameter in trainer.model.parameters() if parameter.requires_grad
    }
    assert all(parameter.detach().equal(value) for parameter, value in values)
    assert sum(weights["E"].abs().sum() for weights in adapters_of(trainer.model).values()) > 0
    next(iter(layers.values())).keep_mask = None
    with pytest.raises(Unsupported, match="another mask"):
        saved_values(trainer.model, tmp_path)


def test_an_engine_that_does_not_exist_is_refused_with_the_nearest_name():
    """Else a misspelt engine is found after rows were tokenised, or in a traceback."""
    with pytest.raises(UserError, match=r"engine.name=fspd2 is none of auto.*Did you mean 'fsdp2'"):
        engine_for(EngineConfig(name="fspd2"))
