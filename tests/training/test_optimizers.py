"""Every optimizer of transformers: trains, is checkpointed and resumed bit for bit, or is refused by name at once."""

import re

import pytest
import torch
from datasets import Dataset
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported
from adalora_scale.training.optimizers import NOT_RESUMABLE, RESUMABLE, check_optimizer
from adalora_scale.training.packages import _OPTIMIZERS
from adalora_scale.training.trainers import AdaLoraTrainer
from tests.adalora.tiny import bert
from tests.conftest import ROOT

NAMES = sorted(name.value for name in OptimizerNames)
INSTALLED = {name for name in NAMES if name not in _OPTIMIZERS or _OPTIMIZERS[name][0]()} - {"adamw_anyprecision"}


def rows():
    ids = torch.randint(1, 64, (32, 8), generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": [number % 3 for number in range(32)]})


def trainer(folder, optim, **options):
    # Factors of 4096 elements and more: bitsandbytes keeps smaller ones in 32 bits whatever was asked for.
    config = AdaLoraConfig(target_modules=["query", "value"], init_r=160, target_r=80, tinit=1, tfinal=2, deltaT=1,
                           lora_alpha=160, modules_to_save=["classifier"])  # fmt: skip
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, optim=optim, learning_rate=1e-3,
        report_to="none", use_cpu=True, logging_steps=1, disable_tqdm=True, **{"save_steps": 2} | options,
    )  # fmt: skip
    torch.manual_seed(0)
    return AdaLoraTrainer(bert(), args=arguments, train_dataset=rows(), adalora_config=config)


def weights(run):
    found = {f"{name}.{leaf}": p.detach() for name, layer in adapter_layers(run.model)
             for leaf, p in layer.named_parameters(recurse=False)}  # fmt: skip
    return found | {"classifier": run.model.classifier.weight.detach()}


def test_every_optimizer_is_sorted():
    """Else a new one trains for hours and fails at its first checkpoint."""
    assert set(NAMES) == RESUMABLE | set(NOT_RESUMABLE) and not RESUMABLE & set(NOT_RESUMABLE)


@pytest.mark.parametrize("name", sorted(RESUMABLE & INSTALLED))
def test_a_resumable_one_goes_on_bit_for_bit(name, tmp_path):
    """Else a restart silently changes the run: moments that come back as zeros still train."""
    straight = trainer(tmp_path / "straight", name)
    straight.train()
    resumed = trainer(tmp_path / "resumed", name)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    expected, found = weights(straight), weights(resumed)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# GaLore's and LOMO's kin need packages that are not on this project's list.
@pytest.mark.parametrize("name", sorted(set(NOT_RESUMABLE) & INSTALLED))
def test_another_ends_before_its_second_step_unless_it_writes_no_checkpoints(name, tmp_path):
    """Else the first checkpoint of a hand-made trainer, hours later, is where its user learns of it."""
    run = trainer(tmp_path / "a", name)
    with pytest.raises(Unsupported, match=r"which is not cut like weights; use training.optim=adamw_torch"):
        run.train()
    assert run.allocator.step == 1
    free = trainer(tmp_path / "b", name, save_strategy="no")
    free.train()
    assert free.allocator.step == 6 and (tmp_path / "b" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", sorted(NOT_RESUMABLE))
def test_a_config_is_refused_by_name(name):
    """Else the base model is loaded, hours later the first checkpoint fails, and nothing says which key it was."""
    with pytest.raises(Unsupported, match=f"training.optim={name} keeps .* use training.optim="):
        check_optimizer({"optim": name})
    check_optimizer({"optim": name, "save_strategy": "no"})
    check_optimizer({"optim": name, "save_only_model": True})


def test_the_manual_s_table_is_this_one():
    """Else docs/resume.md promises what the code refuses."""
    found = {"resumed": set(), "refused": set()}
    for line in (ROOT / "docs" / "resume.md").read_text().splitlines():
        if row := re.fullmatch(r"\| (`.*) \| (resumed|refused)(: .*)? \|", line):
            found[row[2]] |= set(re.findall(r"`(\w+)`", row[1]))
    assert found == {"resumed": RESUMABLE, "refused": set(NOT_RESUMABLE)}
