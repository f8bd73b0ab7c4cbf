"""What AdaLoRA adds to a training step: ours (the default and the published method), PEFT's AdaLoRA and PEFT's LoRA.

    python benchmarks/step_overhead.py                        # a small shape, a minute on 2 cores
    python benchmarks/step_overhead.py --hidden 4096 --layers 32 --tokens 4096 --device cuda --dtype bfloat16

Steps of the methods are interleaved, on one random Llama, so that a machine whose speed drifts treats them alike;
medians and their ratios to LoRA are printed. Every method adapts the same matrices at the same rank with the same
optimizer, and every AdaLoRA step of the timed window updates importance; every `--delta-t`-th also allocates.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from adalora_scale.files import write_json
from adalora_scale.training.records import hardware, versions

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step (sequences of 128 on CPU, one on cuda)")
    parser.add_argument("--r", type=int, default=8, help="rank of every method")
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each method")
    parser.add_argument("--delta-t", type=int, default=10, help="steps between allocations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the frozen base")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()

    base = _base(arguments)
    methods = {
        "LoRA (PEFT)": _lora,
        "ours, default": lambda model, arguments: _ours(model, arguments, "default"),
        "ours, paper": lambda model, arguments: _ours(model, arguments, "paper"),
        "AdaLoRA (PEFT)": _peft_adalora,
    }
    frozen = list(base.parameters())  # the methods share them: an 8 B model four times would not fit
    steps = {name: build(copy.deepcopy(base, {id(p): p for p in frozen}), arguments) for name, build in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.steps + 3):
        for name, step in steps.items():
            seconds = _timed(step, arguments.device)
            if number >= 3:  # the first steps allocate optimizer state
                times[name].append(seconds)
    medians = {name: statistics.median(values) for name, values in times.items()}
    reference = medians["LoRA (PEFT)"]
    for name, median in medians.items():
        print(f"{name:20} {median * 1e3:9.1f} ms a step   {median / reference:6.3f} x LoRA")
    if arguments.output:
        figures = {
            "shape": {k: v for k, v in vars(arguments).items() if k != "output"},
            "median_seconds": medians,
            "ratio_to_lora": {name: median / reference for name, median in medians.items()},
            "versions": versions() | {"peft": peft.__version__},
            "hardware": hardware(),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, figures)
        print(json.dumps(figures["ratio_to_lora"]))


def _base(arguments: argparse.Namespace) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 7 // 2,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(arguments.hidden // 64, 1),
        num_key_value_heads=max(arguments.hidden // 256, 1),
        vocab_size=2048,
    )
    with torch.device(arguments.device):  # billions of random numbers take a CPU minutes
        model = LlamaForCausalLM._from_config(config, dtype=getattr(torch, arguments.dtype))
    return cast(nn.Module, model.requires_grad_(False))


def _loop(
    model: nn.Module, arguments: argparse.Namespace, after: Callable[[int], Any], ours: AdaLoraConfig | None = None
) -> Callable[[], None]:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, foreach=True)
    if ours is not None:
        RankAllocator(model, ours, total_step=1_000_000).attach(optimizer)
    length = 128 if arguments.device == "cpu" else arguments.tokens
    ids = torch.randint(0, 2048, (max(arguments.tokens // length, 1), length), device=arguments.device)
    done = 0

    def step() -> None:
        nonlocal done
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        done += 1
        after(done)
        optimizer.zero_grad()

    return step


def _ours(model: nn.Module, arguments: argparse.Namespace, preset: str) -> Callable[[], None]:
    config = AdaLoraConfig(
        target_modules=TARGETS, init_r=arguments.r, target_r=arguments.r // 2, tinit=0, tfinal=0,
        deltaT=arguments.delta_t, preset=preset,
    )  # fmt: skip
    return _loop(inject_adalora(model, config), arguments, lambda step: None, config)


def _lora(model: Any, arguments: argparse.Namespace) -> Callable[[], None]:
    return _loop(
        peft.get_peft_model(model, peft.LoraConfig(r=arguments.r, target_modules=TARGETS)),
        arguments,
        lambda step: None,
    )


def _peft_adalora(model: Any, arguments: argparse.Namespace) -> Callable[[], None]:
    config = peft.AdaLoraConfig(
        init_r=arguments.r, target_r=arguments.r // 2, target_modules=TARGETS, tinit=0, tfinal=0,
        deltaT=arguments.delta_t, total_step=1_000_000, orth_reg_weight=0.1,
    )  # fmt: skip
    wrapped: Any = peft.get_peft_model(model, config)
    return _loop(wrapped, arguments, wrapped.base_model.update_and_allocate)


def _timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
