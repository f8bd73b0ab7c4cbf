"""One training run through the trainers, as launch/train.py makes it, on any engine or in one process.

run_ranks(…, args=["zero2", "sft", MODEL, DATA, FOLDER])

Kinds: `sft` (AdaLoraSFTTrainer on dialogues), `classify` (AdaLoraTrainer with a new head, ending at its best
checkpoint), `callback` (AdaLoraCallback in TRL's own SFTTrainer).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import TrainerCallback
from trl import SFTTrainer

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.targets import modules_to_save
from adalora_scale.config import load_config
from adalora_scale.engines.full import full_parameter
from adalora_scale.engines.zero_place import whole_weights
from adalora_scale.placing.model import load_model
from adalora_scale.training.callback import AdaLoraCallback
from adalora_scale.training.run import make_trainer, prepare
from tests.conftest import ROOT

STEPS, GLOBAL_BATCH, FINAL_STEP = 16, 8, 12
ZERO = ROOT / "configs" / "deepspeed"
EVERY_STEP = {4, 6, 8, 10, 12}
"""Allocations: tinit 2, tfinal 4, deltaT 2."""


class Recorder(TrainerCallback):
    """Masks at every allocation, gradient norms at every step."""

    def __init__(self):
        self.masks, self.gaps, self.norms, self.allocator_of = {}, [], [], lambda: None

    def on_step_end(self, args, state, control, **kwargs):
        allocator = self.allocator_of()
        last = allocator.last_allocation
        if last is not None and last.step == allocator.step:
            self.masks[str(last.step)] = allocator.rank_pattern()
            self.gaps.append(last.gap)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def config_of(engine, kind, model_dir, data_dir, folder, world_size, extra=()):
    """The run's config; the global batches are the same at every number of ranks."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    classify = kind == "classify"
    rows = Path(data_dir) / ("banking77" if classify else "sgd_chat")
    names = ("train.csv", "test.csv") if classify else ("train.jsonl", "dev.jsonl")
    tree = {
        "task": "sequence_classification" if classify else "causal_lm",
        "model": {"model_name_or_path": str(model_dir), "torch_dtype": "float32"},
        "data": {
            "train": str(rows / names[0]), "eval": str(rows / names[1]), "max_length": 64,
            "max_train_samples": 200,  # one epoch is longer than the run: the last batch of an epoch is padded
            "max_eval_samples": 24,
            **({"label_column": "category"} if classify else {"chat_template": "plain"}),
        },
        "adalora": {
            "init_r": 6, "target_r": 4, "lora_alpha": 8, "tinit": 2, "tfinal": 4, "deltaT": 2, "orth_reg_weight": 0.3,
        },
        "training": {
            "output_dir": f"{folder}/out", "max_steps": STEPS, "learning_rate": 2e-3, "weight_decay": 0.01,
            "per_device_train_batch_size": GLOBAL_BATCH // world_size, "max_grad_norm": 0.5, "seed": 3,
            # batches of evaluation are the same at one and two ranks: their means are averaged
            "per_device_eval_batch_size": 12 if classify else 11,
            "lr_scheduler_type": "constant", "logging_steps": 1,
        },
    }  # fmt: skip
    # one file a rank: a file that another rank is writing is seen empty
    path = Path(folder) / f"run-{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(tree))
    overrides = []
    if kind == "classify":
        overrides += [
            "training.eval_steps=4", "training.save_steps=4", "training.load_best_model_at_end=true",
            # the larger loss counts as better, so that the best checkpoint is not the last
            "training.metric_for_best_model=eval_loss", "training.greater_is_better=true",
        ]  # fmt: skip
    if kind == "callback":
        overrides += ["training.save_steps=8", "training.save_only_model=true"]
    match engine:
        case "fsdp2":
            overrides += ["engine.name=fsdp2"]
        case "hsdp":
            overrides += ["engine.name=fsdp2", "engine.config.replicate=2"]
        case "zero1" | "zero2" | "zero3" | "zero3_offload":
            overrides += ["engine.name=deepspeed", f"engine.config={ZERO / engine}.json"]
        case "zero3_hpz":
            tree = json.loads((ZERO / "zero3.json").read_text())
            tree["zero_optimization"]["zero_hpz_partition_size"] = 2
            overrides += ["engine.name=deepspeed", f"engine.config={json.dumps(tree)}"]
    return load_config(path, [*overrides, *extra])


def unmodified_trainer(config, inputs):
    """TRL's own trainer: what a user has who only adds the callback."""
    torch.manual_seed(3)
    with whole_weights():
        model = load_model(config)
    inject_adalora(model, config.adalora)
    callback = AdaLoraCallback()
    trainer = SFTTrainer(
        model, args=inputs.arguments, train_dataset=inputs.data.train, eval_dataset=inputs.data.eval,
        processing_class=inputs.tokenizer, callbacks=[callback],
    )  # fmt: skip
    return trainer, lambda: callback.allocator


def probe_loss(model, kind):
    """Loss on fixed tokens, the same on every rank: forward passes meet in the same collectives."""
    ids = torch.randint(3, 500, (4, 24), generator=torch.Generator().manual_seed(5))
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    if kind == "classify":
        return F.cross_entropy(logits, torch.arange(4)).item()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def train(engine, kind, model_dir, data_dir, folder, world_size, extra=()):
    """Train and return what a test compares; whole adapters go to FOLDER/live.safetensors."""
    config = config_of(engine, kind, model_dir, data_dir, folder, world_size, extra)
    inputs = prepare(config)
    if kind == "callback":
        trainer, allocator_of = unmodified_trainer(config, inputs)
    else:
        trainer = make_trainer(config, inputs)
        allocator_of = lambda: trainer.allocator  # noqa: E731
    recorder = Recorder()
    recorder.allocator_of = allocator_of
    trainer.add_callback(recorder)
    trainer.train()
    evaluations = {str(log["step"]): log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    after = trainer.evaluate()["eval_loss"]
    live = {}
    for name, layer in adapter_layers(trainer.model):
        for factor in ("lora_A", "lora_E", "lora_B"):
            live[f"{name}.{factor}"] = full_parameter(getattr(layer, factor), trainer.model).clone()
    for name in modules_to_save(trainer.model, trainer.model.adalora.config):
        for key, parameter in trainer.model.get_submodule(name).named_parameters():
            live[f"{name}.{key}"] = full_parameter(parameter, trainer.model).clone()
    if trainer.args.process_index == 0:
        save_file(live, Path(folder) / "live.safetensors")
    generated = None
    if kind != "classify":
        prompt = torch.tensor([[1, 410, 471, 419]])
        generated = trainer.model.generate(prompt, max_new_tokens=8, do_sample=False).tolist()
    return {
        "masks": recorder.masks,
        "gaps": recorder.gaps,
        "norms": recorder.norms,
        "engine": getattr(trainer, "engine", None),
        "eval_loss": after,
        "evaluations": evaluations,
        "best": trainer.state.best_global_step,
        "probe": probe_loss(trainer.model_wrapped, kind),
        "generated": generated,
        "skipped": allocator_of().skipped_steps,
    }


if __name__ == "__main__":
    from tests.distributed.launcher import report

    torch.set_num_threads(1)
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    engine, kind, model_dir, data_dir, folder, *extra = arguments
    report(**train(engine, kind, model_dir, data_dir, folder, int(os.environ["WORLD_SIZE"]), extra))
    dist.destroy_process_group()
