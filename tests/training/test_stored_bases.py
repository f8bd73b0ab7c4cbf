"""Bases that lie quantised on disk: bitsandbytes' 4 bits train as quantised while loading, all others are refused."""

import json
import shutil

import pytest
import transformers as hf
from safetensors.torch import load_file

from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from adalora_scale.engines.registry import ENGINES, configured
from adalora_scale.engines.replicated import OneProcess
from adalora_scale.errors import UserError
from adalora_scale.placing.model import place_model
from adalora_scale.training.run import train
from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks
from tests.training.short_run import BASE as SHORT
from tests.training.short_run import RECIPE, config

BASE = ROOT / "launch" / "quickstart" / "base_model"
FEW = (
    "training.max_steps=6", "adalora.tinit=1", "adalora.tfinal=2", "training.save_strategy=no",
    "training.gradient_accumulation_steps=1",
)  # fmt: skip
ASKED = {
    "ddp": EngineConfig(name="ddp"),
    "fsdp2": EngineConfig(name="fsdp2"),
    "hsdp": EngineConfig(name="fsdp2", config={"replicate": 2}),
    **{
        zero: EngineConfig(name="deepspeed", config=str(ROOT / "configs" / "deepspeed" / f"{zero}.json"))
        for zero in ("zero1", "zero2", "zero3")
    },
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The quickstart's base, in 4 bits on disk."""
    folder = tmp_path_factory.mktemp("stored") / "base"
    options = ["--torch-dtype", "float32", "--compute-dtype", "float32"]
    assert main(["quantize", str(BASE), str(folder), *options]) == 0
    return folder


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
    assert any(value.abs().sum() > 0 for name, value in one.items() if name.endswith("lora_E"))


@pytest.mark.shows("training", task="causal_lm", engine="one process", base="4-bit checkpoint")
def test_a_4_bit_checkpoint_trains_as_its_base_quantised_while_loading(stored, tmp_path):
    """Else what `quantize` writes once is another base than every run would make."""
    train(config(tmp_path / "now", *FEW))
    train(config(tmp_path / "stored", *FEW, "model.load_in_4bit=false", f"model.model_name_or_path={stored}"))
    assert_equal(adapter(tmp_path / "now"), adapter(tmp_path / "stored"))


@pytest.mark.full
@pytest.mark.shows("training", task="causal_lm", engine="{engine}", base="4-bit checkpoint")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_so_it_does_on_two_ranks(stored, tmp_path, engine, request):
    """Else a rank reads other slices of the stored bytes than it would have made."""
    deepspeed = engine.startswith("zero")
    if deepspeed:
        request.getfixturevalue("deepspeed_ops")
    asked = ASKED[engine]
    more = [f"engine.name={asked.name}", *([f"engine.config={asked.config}"] if deepspeed else [])]
    base = [f"model.model_name_or_path={BASE}"], ["model.load_in_4bit=false", f"model.model_name_or_path={stored}"]
    for name, own in zip(("now", "stored"), base, strict=True):
        arguments = ["--config", RECIPE, *SHORT, *FEW, *more, *own, f"training.output_dir={tmp_path / name}"]
        run_ranks(
            ROOT / "launch" / "train.py", 2, arguments, timeout=300,
            launcher="deepspeed" if deepspeed else "torchrun", env={"DS_ACCELERATOR": "cpu"},
        )  # fmt: skip
    assert_equal(adapter(tmp_path / "now"), adapter(tmp_path / "stored"))


METHODS = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "fp8": {"quant_method": "fp8"},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


@pytest.mark.refuses(
    "training",
    task="{task}",
    engine="{engine}",
    base="other quantised checkpoint",
    because="GPTQ, AWQ, FP8, bitsandbytes' 8 bits: load a 16-bit checkpoint or a 4-bit one of bitsandbytes",
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("task", ["causal_lm", "sequence_classification"])
def test_other_quantised_checkpoints_are_refused_before_anything_is_loaded(tmp_path, task, engine):
    """Else adapters are trained over integers, or transformers asks for a package that trains nothing here."""
    base = shutil.copytree(BASE, tmp_path / "base")
    shape = json.loads((base / "config.json").read_text())
    asked = OneProcess() if engine == "one process" else configured(ASKED[engine])
    arguments = hf.TrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, report_to=[])
    run = RunConfig(
        model=ModelConfig(model_name_or_path=str(base)),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(),
        training={"output_dir": str(tmp_path / "out")},
        task=task,
    )
    for method, options in METHODS.items():
        (base / "config.json").write_text(json.dumps(shape | {"quantization_config": options}))
        with pytest.raises(UserError, match=f"the checkpoint is quantised with '{method}'; load a 16-bit"):
            place_model(run, asked, arguments, label_names=["no", "yes"] if task != "causal_lm" else None)
