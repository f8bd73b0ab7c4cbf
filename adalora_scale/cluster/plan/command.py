"""`adalora-scale plan`: read the question, print the answer."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, replace
from typing import Any

from adalora_scale.cluster.plan.planner import Plan, Planner
from adalora_scale.cluster.plan.request import ASSUMED_GPU, Gpu, Hardware, Request, find_gpu, parse_bytes
from adalora_scale.cluster.plan.table import table
from adalora_scale.config import load_config
from adalora_scale.engines.registry import fixed_global_batch
from adalora_scale.errors import UserError
from adalora_scale.messages import say_json, say_text
from adalora_scale.training.arguments import check_training_section


def run(arguments: argparse.Namespace) -> int:
    """Answer the command line; return 1 if the run does not fit.

    Raises:
        UserError: the config or an option cannot be used.
    """
    plan = Planner(_request(arguments)).plan()
    if arguments.json:
        say_json(as_dict(plan))
    else:
        say_text(table(plan))
    return 0 if plan.own_row.fits else 1


def _request(arguments: argparse.Namespace) -> Request:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.deepspeed:
        if config.engine.config is not None:
            raise UserError("--deepspeed and engine.config both name a configuration; give one of them.")
        config = config.under_deepspeed(arguments.deepspeed)
    config = replace(config, training=check_training_section(config, max(arguments.gpus, 1)))
    _check_figures(arguments)
    gpu = find_gpu(arguments.gpu or ASSUMED_GPU)
    if arguments.gpu_memory:
        gpu = replace(gpu, memory=parse_bytes("--gpu-memory", arguments.gpu_memory))
        if gpu.memory < 10**6:
            raise UserError(f"--gpu-memory is '{arguments.gpu_memory}', {gpu.memory} bytes; write for example 80GB.")
    stated: dict[str, float] = {}
    for option, name, unit in _GPU_FIGURES:
        if (value := getattr(arguments, option)) is not None:
            stated[name] = value * unit
    hardware = Hardware(
        gpu=Gpu(**(asdict(gpu) | stated)),
        name=arguments.gpu and arguments.gpu.lower(),
        timed=arguments.gpu is not None or arguments.peak_tflops is not None,
        efficiency=arguments.efficiency,
    )
    for option, name in (("node_bandwidth", "node_bandwidth"), ("disk_bandwidth", "disk_bandwidth")):
        if (value := getattr(arguments, option)) is not None:
            hardware = replace(hardware, **{name: value * 1e9})
    return Request(
        config=config,
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        hardware=hardware,
        micro_batch=arguments.micro_batch,
        global_batch=fixed_global_batch(config.engine) if arguments.global_batch is None else arguments.global_batch,
        whole_logits=arguments.whole_logits,
    )


_NO_TIMES: dict[str, Any] = {"step_s": None, "tokens_per_s": None}


def _check_figures(arguments: argparse.Namespace) -> None:
    """Refuse figures with which the sums would be nonsense."""
    for option in (*(option for option, _, _ in _GPU_FIGURES), "node_bandwidth", "disk_bandwidth", "efficiency"):
        value = getattr(arguments, option)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{option.replace('_', '-')} is {value:g}; it must be a number above 0.")
    if arguments.efficiency > 1:
        raise UserError(f"--efficiency is {arguments.efficiency:g}; it is a share, at most 1.")


_GPU_FIGURES = (
    ("peak_tflops", "tflops", 1.0),
    ("memory_bandwidth", "memory_bandwidth", 1e9),
    ("link_bandwidth", "link_bandwidth", 1e9),
)


def as_dict(plan: Plan) -> dict[str, Any]:
    """Return what JSON holds."""
    request = plan.request
    return {
        "model": request.config.model.model_name_or_path,
        "gpus": request.gpus,
        "nodes": request.nodes,
        "hardware": asdict(request.hardware),
        "sequences_per_micro_batch": request.sequences,
        "tokens_per_sequence": request.config.data.max_length,
        "gradient_accumulation": request.accumulation,
        "checkpointing": request.checkpointing,
        "engine": plan.own,
        "fits": plan.own_row.fits,
        "device_bytes_other_checkpointing": plan.without_checkpointing,
        "adapter_bytes_init_r": plan.adapter_bytes[0],
        "adapter_bytes_target_r": plan.adapter_bytes[1],
        "smallest": plan.smallest and dict(zip(("gpus", "engine", "device_bytes"), plan.smallest, strict=True)),
        "ways_out": plan.ways_out,
        "engines": {
            row.engine: {
                "fits": row.fits,
                "device_bytes": row.memory.device,
                "worst_moment": row.memory.moment,
                "parts": [asdict(part) for part in row.memory.parts],
                "host_bytes_per_rank": row.memory.host,
                "largest_micro_batch": row.largest_micro_batch,
                "speed": asdict(row.speed) | ({} if row.speed.means_something(request) else _NO_TIMES),
                "load": asdict(row.load),
            }
            for row in plan.rows
        },
    }
