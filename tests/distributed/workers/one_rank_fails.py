"""One rank's files are damaged, as on one machine of several: what does each rank say?

run_ranks(…, args=[WHEN, ENGINE, FOLDER])    FOLDER/rankN/model is rank N's own copy
WHEN: begin: headers are read; load: in the middle of reading weights; resume: a checkpoint's pieces;
save: rank 0, which writes the adapter, reaches a limit of its disk
"""

import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.state import allocator_position, gather, scatter
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.config import AdaLoraConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from adalora_scale.engines.registry import configured
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import save_adapter
from adalora_scale.placing import streaming
from adalora_scale.placing.model import place_model
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem
from tests.distributed.launcher import report

CPU = torch.device("cpu")
BROKEN = {"zero3": 0}  # there rank 0 alone reads
ENGINES = {"zero3": EngineConfig(config={"zero_optimization": {"stage": 3}}), "fsdp2": EngineConfig(name="fsdp2")}


def damage(path):
    os.truncate(path, path.stat().st_size // 2)


def load(when, engine, folder, rank):
    broken = rank == BROKEN.get(engine, 1)
    file = folder / "model" / "model.safetensors"
    injected = streaming.inject

    def inject_and_break(*given):
        done = injected(*given)
        if broken:
            damage(file)
        return done

    if when == "begin" and broken:
        damage(file)
    if when == "load":
        streaming.inject = inject_and_break
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(file.parent), load_in_4bit=True, bnb_4bit_compute_dtype="float32"),
        data=DataConfig(train="unused"),
        adalora=AdaLoraConfig(init_r=4, target_r=2),
        training={"output_dir": "unused"},
    )
    arguments = SimpleNamespace(device=CPU, process_index=rank, bf16=False, fp16=False, seed=0)
    place_model(config, configured(ENGINES[engine]), arguments)


def resume(engine, folder, rank, ranks):
    problem = Problem(model=None, device=CPU, ranks=ranks, preset="paper")
    model = problem.adapted_model()
    with running(engine, "plain", problem, model) as runner:
        gathered = gather(model, runner.allocator.sharding, runner.allocator)
        shared = folder.parent / "run"
        written = write_checkpoint(shared, 1, gathered, {}, {"allocator": allocator_position(runner.allocator)}, {})
        own = damaged_copy(written, folder) if rank == 1 else written
        dist.barrier()
        scatter(Checkpoint(own), model, runner.allocator.sharding, runner.allocator)


def save(folder, rank):
    model = Problem(model=None, device=CPU, ranks=2, preset="default").adapted_model()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        save_adapter(model, folder.parent / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def damaged_copy(checkpoint, folder):
    own = folder / checkpoint.name
    shutil.copytree(checkpoint, own)
    for path in own.glob("*.safetensors"):
        damage(path)
    return own


def main(when, engine, folder):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    own = Path(folder) / f"rank{rank}"
    said = ""
    try:
        if when == "save":
            save(own, rank)
        else:
            resume(engine, own, rank, ranks) if when == "resume" else load(when, engine, own, rank)
        dist.barrier()
    except UserError as error:
        said = str(error)
    report(said=said)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
