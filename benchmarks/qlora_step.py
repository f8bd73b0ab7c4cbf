"""QAdaLoRA on one card: memory and speed of training steps on a random 4-bit Llama, and whether its kernels are right.

    python benchmarks/qlora_step.py                                         # a tiny shape, seconds on a CPU
    python benchmarks/qlora_step.py --shape 8b --tokens 4096 --output FILE
    python benchmarks/qlora_step.py --shape 70b --tokens 2048 --output FILE  # 40 GB of weights: a card of 80 GB

Weights are drawn and quantised on the device matrix by matrix (NF4, double quantisation), so the model is never there
in 16 bits. Every linear layer but the head gets an adapter; AdamW with the RankAllocator attached takes the steps, in
bfloat16, with gradient checkpointing off and on. Medians over the timed steps.

Model FLOPs of a token: 4 for each weight of the linear layers and the head (forward, and the gradient for the input;
frozen weights need none) and 6 · layers · width · length for causal attention. Adapters (under 0.5 %) and
recomputation are not counted. Utilisation is against --peak-tflops, by default the maker's dense bf16 figure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adalora_scale.adalora.injection import coverage, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.files import write_json
from adalora_scale.quantization import functional
from adalora_scale.quantization.functional import check_kernels
from adalora_scale.quantization.linear import Linear4bit, quantization_targets, quantized_share, replace_linears
from adalora_scale.quantization.materialize import materialize
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.training.records import hardware, peak_memory_by_rank, versions

TIE = 2e-5  # of a block's absmax: float32 means of thousands of scales; codes lie 100 times further apart
WARM_UP = 2  # the first steps allocate optimizer state and choose kernels
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 256},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Llama 3's shapes, and a small one with the same parts."""
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0, "L40S": 362.1, "4090": 165.2}
"""Dense bf16 of the SXM cards, from NVIDIA's data sheets."""


def main() -> int:
    """Check the kernels, take the steps, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=128, help="length of a sequence (default 128)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences a step (default 1)")
    parser.add_argument("--steps", type=int, default=5, help=f"timed steps, after {WARM_UP} others (default 5)")
    parser.add_argument("--r", type=int, default=12, help="rank of every adapter (default 12)")
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, help="default: off, then on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="bf16 peak of the device, for the utilisation")
    parser.add_argument("--output", "--json", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    return run_reporting_errors(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> int:
    for option in ("tokens", "micro_batch", "steps", "r"):
        if getattr(arguments, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} is {getattr(arguments, option)}; it must be at least 1.")
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU.")
    spec = QuantSpec(compute_dtype=torch.bfloat16)
    check_kernels(spec, device, torch.bfloat16)
    checks = check_layer(device, spec)
    for name, check in checks.items():
        print(f"{name}: {check}")
    started = time.perf_counter()
    model = inject_adalora(random_model(arguments.shape, device, spec), _adalora(arguments.r))
    built = {
        "build_seconds": round(time.perf_counter() - started, 1),
        "held_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
        "build_peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }
    quantized, every = quantized_share(model)
    print(coverage(model))
    print(
        f"{quantized / every:.1%} of {every:,} linear weights in NF4; model and adapters {built['held_bytes']:,} bytes"
    )
    peak = arguments.peak_tflops or _peak_tflops(device)
    runs = train(model, arguments, device, peak)
    passed = all(check["passed"] for check in checks.values()) and all(run.get("finite", True) for run in runs)
    print("kernels right, losses finite" if passed else "NOT right: see above")
    if arguments.output:
        shape = {key: value for key, value in vars(arguments).items() if key not in ("output", "peak_tflops")}
        figures = {"shape": shape | SHAPES[arguments.shape], "passed": passed, "checks": checks, "model": built}
        figures |= {"peak_tflops": peak, "runs": runs, "versions": versions(), "hardware": hardware()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, figures)
    return 0 if passed else 1


@torch.no_grad()
def random_model(shape: str, device: torch.device, spec: QuantSpec) -> nn.Module:
    """Build a Llama with N(0, 0.02²) weights, quantised as they are drawn; norms are one."""
    torch.manual_seed(0)
    config = LlamaConfig(max_position_embeddings=8192, tie_word_embeddings=False, **SHAPES[shape])  # type: ignore[arg-type]
    with init_empty_weights(include_buffers=False):
        model = cast(LlamaForCausalLM, AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
    replace_linears(model, spec, quantization_targets(model))
    for module in model.modules():
        materialize([module], device, [])
        if isinstance(module, Linear4bit):
            sides = (module.out_features, module.in_features)
            module.quantize_(torch.empty(sides, dtype=torch.bfloat16, device=device).normal_(std=0.02))
        else:
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1)
    return model.requires_grad_(False)


def train(
    model: nn.Module, arguments: argparse.Namespace, device: torch.device, peak_tflops: float | None
) -> list[dict[str, Any]]:
    """Take the steps without and with gradient checkpointing; what does not fit is said to."""
    llama = cast(LlamaForCausalLM, model.train())
    trained = [p for p in llama.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    RankAllocator(llama, _adalora(arguments.r), total_step=1_000_000).attach(optimizer)
    shape = (arguments.micro_batch, arguments.tokens)
    ids = torch.randint(0, SHAPES[arguments.shape]["vocab_size"], shape, device=device)

    def step() -> Tensor:
        loss: Tensor = llama(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    asked = arguments.gradient_checkpointing
    runs = []
    for checkpointing in [False, True] if asked is None else [asked]:
        if checkpointing:
            llama.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            llama.gradient_checkpointing_disable()
        run: dict[str, Any] = {"gradient_checkpointing": checkpointing}
        try:
            run |= _measured(step, arguments, device, peak_tflops)
        except torch.OutOfMemoryError:
            run["out_of_memory"] = True
            optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
        runs.append(run)
    return runs


def _measured(
    step: Callable[[], Tensor], arguments: argparse.Namespace, device: torch.device, peak_tflops: float | None
) -> dict[str, Any]:
    cuda = device.type == "cuda"
    for _ in range(WARM_UP):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(arguments.steps):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        loss = step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    tokens = arguments.micro_batch * arguments.tokens
    flops = model_flops(arguments.shape, arguments.tokens)
    return {
        "median_seconds": median,
        "fastest_seconds": min(seconds),
        "slowest_seconds": max(seconds),
        "tokens_per_second": tokens / median,
        "model_flops_per_token": flops,
        "utilisation": flops * tokens / median / (peak_tflops * 1e12) if peak_tflops else None,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated() if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
        "process_peak_resident_bytes": peak_memory_by_rank()[0]["resident_bytes"],
        "loss": loss.item(),
        "finite": bool(loss.isfinite()),
    }


def model_flops(shape: str, length: int) -> int:
    """Return the model FLOPs of one token in a sequence of `length`, as the module's docstring counts them."""
    s = SHAPES[shape]
    width, key_value = s["hidden_size"], s["hidden_size"] * s["num_key_value_heads"] // s["num_attention_heads"]
    layer = 2 * width * width + 2 * width * key_value + 3 * width * s["intermediate_size"]
    weights = s["num_hidden_layers"] * layer + width * s["vocab_size"]
    return 4 * weights + 6 * s["num_hidden_layers"] * width * length


@torch.no_grad()
def check_layer(device: torch.device, spec: QuantSpec) -> dict[str, dict[str, Any]]:
    """Compare a Linear4bit on `device` with its dequantised weight, and its bytes with the CPU's.

    Output and gradient may be twice as far from float64 as those of a 16-bit layer of the same weights.
    """
    torch.manual_seed(0)
    weight = torch.randn(384, 1024, dtype=torch.bfloat16)
    on_cpu = Linear4bit(1024, 384, spec=spec)
    on_cpu.quantize_(weight)
    layer = Linear4bit(1024, 384, spec=spec, device=device)
    layer.quantize_(weight.to(device))
    exact, rounded = layer.dequantize(torch.float32).double(), layer.dequantize(torch.bfloat16)
    checks: dict[str, dict[str, Any]] = {}
    # bitsandbytes takes another kernel for one row, for some, and for many.
    for rows in (1, 64, 2048):
        x = torch.randn(rows, 1024, dtype=torch.bfloat16, device=device).requires_grad_()
        gradient = torch.randn(rows, 384, dtype=torch.bfloat16, device=device)
        with torch.enable_grad():
            y = layer(x)
            y.backward(gradient)
        wanted, got = x.double() @ exact.T, cast(Tensor, x.grad)
        wanted_gradient = gradient.double() @ exact
        checks[f"forward of {rows}"] = _compared(y, F.linear(x, rounded), wanted)
        checks[f"backward of {rows}"] = _compared(got, gradient @ rounded, wanted_gradient)
    before = [tensor.clone() for tensor in _bytes_of(on_cpu)]
    every = torch.arange(on_cpu.weight.numel(), dtype=torch.int64).to(torch.uint8)  # all 256 values, over and over
    on_cpu.weight.copy_(every.view_as(on_cpu.weight))
    before[0] = on_cpu.weight.clone()
    returned = [tensor.cpu() for tensor in _bytes_of(on_cpu.to(device))]
    checks["bytes to the device and back"] = {"passed": all(map(torch.equal, before, returned))}
    checks["bytes quantised here against CPU"] = _compared_bytes(weight, device, spec)
    return checks


def _compared(got: Tensor, plain: Tensor, exact: Tensor) -> dict[str, Any]:
    ours, theirs = (((value.double() - exact).norm() / exact.norm()).item() for value in (got, plain))
    return {"relative_error": ours, "of_16_bit_layer": theirs, "passed": ours <= 2 * theirs}


def _compared_bytes(weight: Tensor, device: torch.device, spec: QuantSpec) -> dict[str, Any]:
    """Quantise on the CPU and on `device`: bytes may differ only where the weight or scale lies between two codes."""
    values = weight.reshape(-1)
    packed, absmax = functional.quantize_blocks(values, spec)
    ours, our_absmax = (t.cpu() for t in functional.quantize_blocks(values.to(device), spec))
    scales, nested = functional.encode_scales(absmax, spec)
    our_scales, our_nested = (t.cpu() for t in functional.encode_scales(absmax.to(device), spec))
    plain = replace(spec, double_quant=False)  # codes are judged by the exact absmax
    exact = functional.encode_scales(absmax, plain)
    shape = (absmax.numel(), spec.blocksize)

    def distance(codes: Tensor) -> Tensor:
        return (functional.dequantize(codes, *exact, plain, shape, torch.float32) - weight.float().view(shape)).abs()

    def scale_distance(scales: Tensor, nested: Tensor) -> Tensor:
        return (functional.decode_scales(scales, nested) - absmax).abs()

    further = [
        (distance(packed) - distance(ours)).abs() / absmax[:, None],
        (scale_distance(scales, nested) - scale_distance(our_scales, our_nested)).abs() / absmax,
    ]
    differing = [int((packed != ours).sum()), int((scales != our_scales).sum())]
    worst = max(float(t.max()) for t in further)
    passed = torch.equal(absmax, our_absmax) and worst <= TIE
    return {"differing_codes": differing[0], "differing_scales": differing[1], "worst": worst, "passed": passed}


def _bytes_of(layer: Linear4bit) -> list[Tensor]:
    return [layer.weight.detach(), layer.scales.detach(), layer.nested]


def _adalora(r: int) -> AdaLoraConfig:
    return AdaLoraConfig(init_r=r, target_r=max(1, r * 2 // 3), tinit=0, tfinal=0, deltaT=2)


def _peak_tflops(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


if __name__ == "__main__":
    sys.exit(main())
