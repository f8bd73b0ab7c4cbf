"""Two optimizer steps of a real model on a real engine; reports the most bytes of live tensors in the second step.

weigh_run.py ENGINE CONFIG [section.key=value …]        ENGINE: ddp fsdp2 zero2 zero3; one process without a launcher
"""

import gc
import os
import sys
import weakref

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cluster.plan.shapes import model_config
from adalora_scale.config import Fsdp2Config, load_config
from adalora_scale.controller import RankAllocator
from adalora_scale.engines.fsdp2_place import shard_fsdp2
from adalora_scale.engines.zero_place import deepspeed_config
from adalora_scale.placing.streaming import quant_spec
from adalora_scale.placing.tiled_mlp import tile_mlps
from adalora_scale.quantization.linear import quantize_model
from tests.distributed.launcher import report


class Weigher(TorchDispatchMode):
    """After every operation, sums the sizes of all storages that are alive: those of before, and those made since."""

    def __init__(self):
        super().__init__()
        self.storages = {}
        self.peak = 0
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                self.note(thing)

    def note(self, tensor):
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = weakref.ref(storage, lambda _: self.storages.pop(key, None))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        self.peak = max(self.peak, self.bytes())
        return result

    def bytes(self):
        alive = [reference() for reference in list(self.storages.values())]
        return sum(storage.nbytes() for storage in alive if storage is not None and storage.device.type == "cpu")


def main(name, *arguments):
    config = load_config(*arguments[:1], arguments[1:])
    torch.manual_seed(0)
    dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(model_config(config.model), dtype=dtype, attn_implementation="sdpa")
    if config.model.load_in_4bit:
        quantize_model(model, quant_spec(config.model))
    inject_adalora(model, config.adalora)
    tile_mlps(model, config.training.get("tiled_mlp", 1))
    model.train()
    if config.training["gradient_checkpointing"]:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name.startswith("zero"):
        import deepspeed

        options = deepspeed_config(config.engine.config) | {"train_micro_batch_size_per_gpu": 2}
        options |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=options, model_parameters=trained, dist_init_required=False
        )
        RankAllocator(engine.module, config.adalora, total_step=100).attach(engine)
        forward, backward, step = engine, engine.backward, engine.step
    else:
        if name == "fsdp2":
            shard_fsdp2(model, Fsdp2Config(), device_type="cpu", bf16=True)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        RankAllocator(model, config.adalora, total_step=100).attach(optimizer)
        forward = model

        def backward(loss):
            loss.backward()

        def step():
            optimizer.step()
            optimizer.zero_grad()

    length = config.data.max_length
    ids = torch.randint(0, 1000, (2, length))
    mask = torch.ones(2, 1, length, length, dtype=torch.bool)

    def one_step():
        with torch.autocast("cpu", dtype, enabled=name == "ddp"):
            loss = forward(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
        backward(loss)
        del loss
        step()

    one_step()
    gc.collect()
    weigher = Weigher()
    with weigher:
        one_step()
    return weigher.peak


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    report(peak=main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local")]))
    if dist.is_initialized():
        dist.destroy_process_group()
