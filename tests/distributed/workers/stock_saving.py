"""An unmodified Trainer with AdaLoraCallback under an engine that accelerate sets up: what its saving leaves.

run_ranks(…, args=["zero3", MODEL, FOLDER])

Modes: `ddp`, `fsdp2`, `zero2`, `zero3`; `whole` is zero3 with the checkpoints that transformers writes by default,
`sharded` is fsdp2 whose state dicts are shards, without checkpoints.
"""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from adalora_scale import AdaLoraCallback, AdaLoraConfig, inject_adalora, save_adapter
from adalora_scale.training import callback
from tests.conftest import ROOT
from tests.distributed.launcher import report

mode, model_dir, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(1)
zero = {"zero2": "zero2.json", "zero3": "zero3.json", "whole": "zero3.json"}.get(mode)
options = {"save_only_model": mode != "whole", "bf16": zero is not None}
if zero is not None:
    options["deepspeed"] = json.loads((ROOT / "configs" / "deepspeed" / zero).read_text())
    options["deepspeed"]["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
if mode in ("fsdp2", "sharded"):
    kind = "FULL_STATE_DICT" if mode == "fsdp2" else "SHARDED_STATE_DICT"
    os.environ["FSDP_STATE_DICT_TYPE"] = kind
    if mode == "sharded":
        options |= {"save_only_model": False, "save_strategy": "no"}
    options["fsdp"] = True
    options["fsdp_config"] = {
        "version": 2, "reshard_after_forward": True, "state_dict_type": kind,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }  # fmt: skip


def shards_on_cpu(self, *given, fsdp_plugin=None, **more):
    """accelerate 1.15 shards on GPUs alone: on CPUs it trains such a run with DDP, without a word."""
    begin(self, *given, fsdp_plugin=fsdp_plugin, **more)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


begin, AcceleratorState.__init__ = AcceleratorState.__init__, shards_on_cpu
args = TrainingArguments(
    str(folder), max_steps=10, per_device_train_batch_size=2, report_to="none", save_steps=5, learning_rate=1e-2,
    use_cpu=True, remove_unused_columns=False, disable_tqdm=True, ddp_find_unused_parameters=False, **options,
)  # fmt: skip
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(model_dir)
inject_adalora(model, AdaLoraConfig(init_r=6, target_r=4, tinit=2, tfinal=3, deltaT=2))
rows = [{"input_ids": torch.randint(3, 500, (16,)).tolist()} for _ in range(40)]


def collate(examples):
    ids = torch.tensor([example["input_ids"] for example in examples])
    return {"input_ids": ids, "labels": ids}


def tensors(name):
    return load_file(folder / name / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


gathered, gather = [], callback.gather_adapter


def counted(model):
    gathered.append(trainer.state.global_step)
    return gather(model)


callback.gather_adapter = counted
try:
    trainer = Trainer(model, args, train_dataset=rows, data_collator=collate, callbacks=[AdaLoraCallback()])
    trainer.train()
except NotImplementedError as error:
    report(refused=str(error))
    raise SystemExit from None
sharded = sum(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
trainer.save_model(str(folder / "after"))
save_adapter(trainer.model, folder / "ours")
weights = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".distcp")]
keys = {key for path in weights if path.suffix == ".safetensors" for key in load_file(path)}
report(
    refused="",
    gathered=gathered,
    sharded=sharded,
    files=sorted(str(path.relative_to(folder)) for path in weights if path.name != "training_args.bin"),
    base=[key for key in keys if "lora_" not in key],
    last=mode == "sharded" or same(tensors("checkpoint-10"), tensors("ours")),
    after=same(tensors("" if mode == "sharded" else "after"), tensors("ours")),
    early=mode == "sharded" or all(tensor.dtype == torch.float32 for tensor in tensors("checkpoint-5").values()),
)
