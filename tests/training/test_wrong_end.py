"""A run that leaves nothing right ends with an error: no numbers, nothing trained, or not at its budget."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments

from adalora_scale.checkpoint.format import checkpoints
from adalora_scale.config import load_config
from adalora_scale.errors import WRONG_END_EXIT_CODE, UserError, WrongEnd
from adalora_scale.export.peft_adalora import save_adapter
from adalora_scale.training.callback import AdaLoraCallback
from adalora_scale.training.run import make_trainer, prepare, train
from tests.conftest import ROOT

RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
BASE_MODEL = ROOT / "launch" / "quickstart" / "base_model"
OPTIONS = [
    "training.max_steps=24", "training.logging_steps=1", "training.save_steps=2", "training.save_total_limit=1",
    "training.eval_strategy=no", "adalora.tinit=2", "adalora.tfinal=6", "adalora.deltaT=2", "data.max_train_samples=64",
    "data.max_eval_samples=8", "training.per_device_train_batch_size=4", "model.load_in_4bit=false",
]  # fmt: skip


def config(folder, *overrides):
    return load_config(RECIPE, [*OPTIONS, f"training.output_dir={folder}", *overrides])


def trainer_of(folder, *overrides):
    settings = config(folder, *overrides)
    return make_trainer(settings, prepare(settings))


def poison(trainer, value, start):
    """From optimizer step `start` on every gradient of the adapters is `value`."""

    def spoil(gradient):
        return torch.full_like(gradient, value) if trainer.state.global_step + 1 >= start else gradient

    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            parameter.register_hook(spoil)


def spoiled_base(folder, name, value=float("nan")):
    """Copy the quickstart's base with one value of one tensor replaced."""
    shutil.copytree(BASE_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def losses(folder):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_with_one_bad_weight_is_named(tmp_path, value):
    """Every step is skipped, and the run would end with the adapter it began with, exit code 0."""
    name = "model.layers.1.mlp.up_proj.weight"
    base = spoiled_base(tmp_path / "base", name, value)
    with pytest.raises(WrongEnd, match=r"step 10: the last 10 steps .*'model\.layers\.1\.mlp\.up_proj.*'.* base"):
        train(config(tmp_path / "out", f"model.model_name_or_path={base}"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "run.json").exists()
    assert "up_proj" in json.loads((tmp_path / "out" / "wrong-end.json").read_text())["reason"]
    assert losses(tmp_path / "out") == [None] * 9  # a loss that is not a number is written as none, never as 0.0


@pytest.mark.shows("features", feature="a wrong end is an error on every rank", engine="one process")
def test_the_command_says_it_in_one_line_and_exits_with_3(tmp_path):
    """A script that looks at exit codes takes 0 for a trained adapter."""
    base = spoiled_base(tmp_path / "base", "model.norm.weight")
    command = [sys.executable, ROOT / "launch" / "train.py", "--config", RECIPE, *OPTIONS]
    command += [f"training.output_dir={tmp_path / 'out'}", f"model.model_name_or_path={base}"]
    done = subprocess.run(
        [*command, "training.max_skipped_steps=3"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == WRONG_END_EXIT_CODE == 3, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: training stopped at step 3") and "'model.norm.weight'" in last
    assert "loss nan" in done.stdout + done.stderr


def test_gradients_that_turn_bad_keep_the_last_good_checkpoint(tmp_path):
    """Else a week's run is lost to its last hour, or goes on for days without training."""
    trainer = trainer_of(tmp_path / "out")
    poison(trainer, float("nan"), start=5)
    with pytest.raises(WrongEnd, match=r"step 14: .*steps=10.*Every weight is finite.* is checkpoint-4"):
        trainer.train()
    assert "checkpoint-4" in [path.name for path in checkpoints(tmp_path / "out")]  # save_total_limit=1 let it be
    done = train(config(tmp_path / "out", "training.resume_from_checkpoint=auto"))  # goes on from there, and ends well
    assert done["total_step"] == 24
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-24"]
    assert not (tmp_path / "out" / "wrong-end.json").exists()


def test_single_bad_steps_do_not_end_a_run(tmp_path):
    """Nine bad steps and one good one, again and again, still train; only steps in a row count."""
    trainer = trainer_of(tmp_path / "out", "training.max_skipped_steps=2")

    def spoil(gradient):
        return gradient * (float("nan") if trainer.state.global_step % 2 else 1.0)

    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.register_hook(spoil)
    trainer.train()
    assert trainer.allocator.skipped_steps == 12 and trainer.allocator.frozen


def test_a_run_shorter_than_the_limit_is_judged_at_its_end(tmp_path):
    """Six bad steps of six are fewer than ten in a row."""
    trainer = trainer_of(tmp_path / "out", "training.max_steps=6", "adalora.tfinal=2", "adalora.tinit=1")
    poison(trainer, float("inf"), start=1)
    with pytest.raises(WrongEnd, match="not one of 6 steps had a finite gradient"):
        trainer.train()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_gradients_that_are_all_zero_train_nothing(tmp_path):
    """The loss of a model whose adapters are bypassed looks like any other."""
    trainer = trainer_of(tmp_path / "out")
    poison(trainer, 0.0, start=1)
    with pytest.raises(WrongEnd, match="nothing was trained"):
        trainer.train()


def test_rows_without_a_token_to_learn_from_train_nothing(tmp_path):
    """A data set with every label masked gives a loss of 0 / 0."""
    trainer = trainer_of(tmp_path / "out")
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": [-100] * len(row["labels"])})
    with pytest.raises(WrongEnd, match=r"nothing was trained|Every weight is finite"):
        trainer.train()
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_learning_rate_beyond_all_bounds_is_an_error(tmp_path):
    """1e30 leaves weights that no forward survives; they must not be called an adapter."""
    with pytest.raises(WrongEnd, match="learning_rate"):
        train(config(tmp_path / "out", "training.learning_rate=1e30"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("value", [".inf", ".nan", "-1e-4", "0"])
def test_a_learning_rate_that_is_none_is_refused_before_anything_is_loaded(tmp_path, value):
    """YAML reads .inf and .nan as numbers."""
    with pytest.raises(UserError, match=r"training\.learning_rate is .*; it must be (a finite number|positive)\."):
        train(config(tmp_path / "out", f"training.learning_rate={value}"))


def test_a_run_that_ends_before_its_budget_says_so(tmp_path):
    """An early stop leaves an adapter several times as large as was asked for."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 8

    trainer = trainer_of(tmp_path / "out")
    trainer.add_callback(Stop())
    with pytest.raises(WrongEnd, match=r"step 8 of 24, before the final allocation \(step 18\).* is checkpoint-8"):
        trainer.train()


def test_weights_that_are_not_numbers_are_never_written(tmp_path):
    """The last good checkpoint would be rotated away for one of NaN."""
    trainer = trainer_of(tmp_path / "out")

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for name, p in model.named_parameters() if name.endswith("lora_A")).view(-1)[0] = torch.inf

    trainer.add_callback(Break())
    with pytest.raises(WrongEnd, match=r"weights are not numbers.*lora_A' is not finite.*checkpoint is checkpoint-2"):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    with pytest.raises(UserError, match=r"lora_A' of the adapter has values that are not finite"):
        save_adapter(trainer.model, tmp_path / "by hand")
    assert not list((tmp_path / "by hand").glob("*"))


def test_one_bad_step_leaves_the_log_readable(tmp_path):
    """transformers carries the NaN of one step into every loss that it logs later."""
    trainer = trainer_of(tmp_path / "out")
    compute = trainer.compute_loss

    def broken(*args, **kwargs):
        return compute(*args, **kwargs) * (float("nan") if trainer.state.global_step == 4 else 1.0)

    trainer.compute_loss = broken
    trainer.train()
    found = losses(tmp_path / "out")
    assert [index for index, loss in enumerate(found) if loss is None] == [4] and len(found) == 24


def test_a_breakdown_near_the_end_is_no_result(tmp_path):
    """Seven of eight steps were skipped after one of 1e12: fewer than ten, and the adapter is worth nothing."""
    short = ["training.max_steps=8", "adalora.tinit=1", "adalora.tfinal=2", "training.warmup_steps=0"]
    with pytest.raises(WrongEnd, match="the last 7 of 8 steps had no finite gradient"):
        train(config(tmp_path / "out", *short, "training.learning_rate=1e12"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_an_earlier_result_does_not_stand_beside_a_wrong_end(tmp_path):
    """Whoever looks for run.json and an adapter would take the old run's for this one's."""
    out = tmp_path / "out"
    train(config(out))
    assert (out / "run.json").exists()
    with pytest.raises(WrongEnd):
        train(config(out, "training.learning_rate=1e30", "training.overwrite_output_dir=true"))
    left = {path.name for path in out.iterdir()}
    assert "wrong-end.json" in left and not left & {"run.json", "adapter_model.safetensors", "adapter_config.json"}


def test_a_norm_that_is_never_clipped_is_no_mistake(tmp_path):
    """max_grad_norm=.inf measures the norm and clips nothing; NaN would make every gradient NaN."""
    assert train(config(tmp_path / "out", "training.max_grad_norm=.inf"))["total_step"] == 24
    with pytest.raises(UserError, match=r"training\.max_grad_norm is nan"):
        train(config(tmp_path / "no", "training.max_grad_norm=.nan"))


def test_a_plain_trainer_does_not_write_over_its_last_sound_checkpoint(tmp_path):
    """transformers saves and rotates before a callback's on_save."""
    source = trainer_of(tmp_path / "unused")
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=24, save_steps=2, save_total_limit=1, per_device_train_batch_size=4,
        learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(p for name, p in model.named_parameters() if name.endswith("lora_A")).view(-1)[0] = torch.inf

    trainer = Trainer(
        source.model, arguments, train_dataset=source.train_dataset, data_collator=source.data_collator,
        callbacks=[AdaLoraCallback(), Break()],
    )  # fmt: skip
    with pytest.raises(WrongEnd, match="at step 4 weights are not numbers"):
        trainer.train()
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
