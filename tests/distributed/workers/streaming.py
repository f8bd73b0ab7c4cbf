"""A base streamed onto an engine: digests of every tensor as the ranks hold it together, and what each rank read.

run_ranks(…, args=[ENGINE, MODEL, "4" or "16"])    ENGINE is whole, fsdp2, hsdp or zero3
"""

import hashlib
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adalora_scale.config import AdaLoraConfig, DataConfig, Fsdp2Config, ModelConfig, RunConfig
from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.engines.fsdp2_place import shard_fsdp2
from adalora_scale.engines.zero_place import partition_zero3
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.placing import streaming
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit
from tests.distributed.launcher import report

CPU = torch.device("cpu")


def digest(tensor):
    return hashlib.sha256(tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def whole(parameter):
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "ds_id"):
        from adalora_scale.engines.zero_layouts import gathered_as_forward

        return gathered_as_forward([parameter])[0]
    return parameter


def load(engine, path, bits):
    """Load the model as training does and return (model, bytes that this process read)."""
    model = ModelConfig(model_name_or_path=path, load_in_4bit=bits == "4", bnb_4bit_compute_dtype="float32")
    config = RunConfig(model=model, data=DataConfig(train="unused"), training={"output_dir": "unused"})
    torch.manual_seed(1)
    started = streaming.begin(config, device=CPU)
    streaming.inject(started, AdaLoraConfig(init_r=4, target_r=2))
    before = started.plan.checkpoint.bytes_read  # the fingerprint's few rows
    if engine == "zero3":
        options = {"zero_optimization": {"stage": 3}}
        blocks = transformer_blocks(started.model)
        loaded = streaming.load_partitioned(started, blocks, lambda own: partition_zero3(own, options), None)
    elif engine == "whole":
        loaded = streaming.load_whole(started)
    else:
        options = Fsdp2Config(replicate=2 if engine == "hsdp" else 1)
        loaded = streaming.load_sharded(started, lambda m: shard_fsdp2(m, options, device_type="cpu", bf16=False), CPU)
    return loaded, started.plan.checkpoint.bytes_read - before


def digests(model):
    """Digests of parameters and buffers by name; every rank calls it."""
    found = {name: digest(whole(parameter)) for name, parameter in model.named_parameters(remove_duplicate=False)}
    return found | {name: digest(buffer) for name, buffer in model.named_buffers()}


def leaves(layer):
    return ("weight", "scales", "nested") if isinstance(layer, ExpertLinear4bit) else ("weight", "scales")


def held(model):
    """Bytes of the experts' 4-bit parameters that this rank keeps, and of all of them."""
    own = every = 0
    for layer in model.modules():
        if isinstance(layer, ExpertLinear4bit):
            for leaf in leaves(layer):
                parameter = getattr(layer, leaf)
                every += getattr(parameter, "ds_numel", parameter.numel())
                own += local(parameter).numel()
    return own, every


def local(parameter):
    kept = getattr(parameter, "ds_tensor", parameter)
    return kept.to_local() if isinstance(kept, DTensor) else kept


def trained(model):
    """The loss of a few tokens, and the norm of B's gradients: bytes are gathered for the forward and the backward."""
    ids = torch.arange(3, 43).view(2, 20)
    loss = model(ids, labels=ids).loss
    loss.backward()
    own = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    own = [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in own]
    return loss.item(), torch.stack([grad.norm() for grad in own]).norm().item()


def trained_by_zero3(model):
    """What `trained` gives, with DeepSpeed's own hooks around the modules; nothing stays gathered."""
    import deepspeed
    from deepspeed.utils import safe_get_full_grad

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    options = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    ids = torch.arange(3, 43).view(2, 20)
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss)
    own = [safe_get_full_grad(p) for name, p in engine.module.named_parameters() if "lora_B" in name]
    return loss.item(), torch.stack([grad.norm() for grad in own]).norm().item()


def every_byte_survives(model):
    """Fill the shards with all byte values, gather as a forward in bfloat16 does, and compare what is whole then."""
    own = [layer for layer in model.modules() if isinstance(layer, Linear4bit | ExpertLinear4bit)]
    expected = {}
    for number, layer in enumerate(own):
        for leaf in leaves(layer):
            parameter = getattr(layer, leaf)
            values = (torch.arange(parameter.numel()) * 7 + number).to(torch.uint8).view(parameter.shape)
            expected[number, leaf] = values
            local = parameter.to_local()
            chunk = -(-parameter.shape[0] // dist.get_world_size())
            start = min(dist.get_rank() * chunk, parameter.shape[0])
            local.copy_(values[start : start + local.shape[0]])
    same = True
    for block in (*transformer_blocks(model), model):
        block.unshard()
    for number, layer in enumerate(own):
        for leaf in leaves(layer):
            gathered = getattr(layer, leaf)
            same &= not isinstance(gathered, DTensor) and torch.equal(gathered.detach(), expected[number, leaf])
    seen = {int(value) for values in expected.values() for value in values.unique()}
    return same and seen == set(range(256))


def main(engine, path, bits):
    dist.init_process_group("gloo")
    model, read = load(engine, path, bits)
    together = digests(model)
    figures = {"digests": together, "read": read, "fingerprint": model.adalora.base_fingerprint}
    if any(isinstance(layer, ExpertLinear4bit | ExpertLinear) for layer in model.modules()):
        figures["held"] = held(model)
        figures["trained"] = trained_by_zero3(model) if engine == "zero3" else trained(model)
    if engine == "fsdp2" and bits == "4":
        figures["bytes_survive"] = every_byte_survives(model)
    report(**figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
