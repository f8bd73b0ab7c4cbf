"""Peak memory of a merge: a random-weight Llama checkpoint is made on the spot, an adapter is merged into it.

    python benchmarks/merge_memory.py --gigabytes 2 --json benchmarks/results/merge_memory.json

The merge runs in a process of its own, whose peak resident memory (VmHWM) is compared with that of a process that only
imports what the merge imports. Exit code 1 when the difference reaches --limit-gigabytes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig

from adalora_scale.export.adapter_file import CONFIG_NAME, PREFIX, WEIGHTS_NAME
from adalora_scale.export.tensor_files import TensorFileWriter, save_file

_HIDDEN, _INTERMEDIATE, _VOCABULARY, _RANK = 2048, 5632, 32000, 16
_BASELINE = "import adalora_scale.export.exporting"
_MERGE = """
from pathlib import Path
from adalora_scale.export.exporting import export_adapter
from adalora_scale.export.request import Request
report = export_adapter(Request(adapter=Path({adapter!r}), output=Path({output!r}), format="merged", fidelity=False))
assert len(report["merged"]) == {matrices}
"""
_PEAK = """
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def main() -> int:
    """Make, merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (default 2)")
    parser.add_argument("--shards", type=int, default=4, help="files of the checkpoint (default 4)")
    parser.add_argument("--limit-gigabytes", type=float, default=1.0, help="allowed above the baseline (default 1)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        layers = make_checkpoint(folder / "base", arguments.gigabytes, arguments.shards)
        matrices = make_adapter(folder / "adapter", folder / "base", layers)
        nbytes = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        baseline, _ = peak(_BASELINE)
        merge = _MERGE.format(adapter=str(folder / "adapter"), output=str(folder / "out"), matrices=matrices)
        merging, seconds = peak(merge)
        written = sum(path.stat().st_size for path in (folder / "out").glob("*.safetensors"))
    above = merging - baseline
    figures: dict[str, Any] = {
        "checkpoint_bytes": nbytes,
        "written_bytes": written,
        "shards": arguments.shards,
        "matrices": matrices,
        "baseline_peak_bytes": baseline,
        "merge_peak_bytes": merging,
        "above_baseline_bytes": above,
        "seconds": round(seconds, 1),
        "limit_bytes": int(arguments.limit_gigabytes * 1e9),
        "passed": above < arguments.limit_gigabytes * 1e9 and written >= nbytes * 0.99,
        "hardware": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {package: metadata.version(package) for package in ("adalora-scale", "torch", "transformers")},
    }
    print(
        f"merged {matrices} matrices into {nbytes / 1e9:.2f} GB ({arguments.shards} files) in {seconds:.1f} s: peak "
        f"{merging / 1e6:,.0f} MB, interpreter with imports {baseline / 1e6:,.0f} MB, {above / 1e6:,.0f} MB above it "
        f"(allowed {arguments.limit_gigabytes * 1e3:,.0f} MB): {'pass' if figures['passed'] else 'FAIL'}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if figures["passed"] else 1


def make_checkpoint(folder: Path, gigabytes: float, shards: int) -> int:
    """Write a bf16 Llama of about that size, one tensor in memory at a time, and return its number of layers."""
    folder.mkdir()
    layer_bytes = 2 * sum(math.prod(shape) for _, shape in layer_tensors(0))
    layers = max(shards, round((gigabytes * 1e9 - 4 * _HIDDEN * _VOCABULARY) / layer_bytes))
    LlamaConfig(
        hidden_size=_HIDDEN,
        intermediate_size=_INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=_HIDDEN // 64,
        num_key_value_heads=_HIDDEN // 64,
        vocab_size=_VOCABULARY,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    ).save_pretrained(folder)
    head = [("model.embed_tokens.weight", (_VOCABULARY, _HIDDEN))]
    tail = [("model.norm.weight", (_HIDDEN,)), ("lm_head.weight", (_VOCABULARY, _HIDDEN))]
    everything = [*head, *(tensor for index in range(layers) for tensor in layer_tensors(index)), *tail]
    per_file = -(-len(everything) // shards)
    index: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(everything[number * per_file : (number + 1) * per_file])
        entries = [(key, "BF16", shape, 2 * math.prod(shape)) for key, shape in own.items()]
        with TensorFileWriter(folder / name, entries) as writer:
            for key in writer.order:
                writer.write([torch.randn(own[key], generator=generator).mul_(0.02).bfloat16()])
        index |= dict.fromkeys(own, name)
    total = {"total_size": 2 * sum(math.prod(shape) for _, shape in everything)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": total, "weight_map": index}))
    return layers


def layer_tensors(index: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return (name, shape) of a decoder layer's tensors."""
    prefix = f"model.layers.{index}."
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj": (_HIDDEN, _HIDDEN) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (_INTERMEDIATE, _HIDDEN), "mlp.up_proj": (_INTERMEDIATE, _HIDDEN)}
    shapes |= {"mlp.down_proj": (_HIDDEN, _INTERMEDIATE)}
    shapes |= {"input_layernorm": (_HIDDEN,), "post_attention_layernorm": (_HIDDEN,)}
    return [(f"{prefix}{name}.weight", shape) for name, shape in shapes.items()]


def make_adapter(folder: Path, base: Path, layers: int) -> int:
    """Write an adapter of every linear layer and return the number of matrices."""
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for index in range(layers):
        for key, shape in layer_tensors(index):
            if len(shape) == 2:
                name = PREFIX + key.removesuffix(".weight")
                tensors[f"{name}.lora_A"] = torch.randn(_RANK, shape[1]) * 0.02
                tensors[f"{name}.lora_E"] = torch.randn(_RANK, 1)
                tensors[f"{name}.lora_B"] = torch.randn(shape[0], _RANK) * 0.02
    save_file(tensors, folder / WEIGHTS_NAME)
    config: dict[str, Any] = {"peft_type": "ADALORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base)}
    config |= {"init_r": _RANK, "target_r": _RANK, "lora_alpha": 2 * _RANK, "bias": "none"}
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    AutoConfig.from_pretrained(base)  # what was written is a model
    return len(tensors) // 3


def peak(code: str) -> tuple[int, float]:
    """Run code in a process of its own; return its peak resident memory in bytes and its seconds."""
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code + _PEAK], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    if result.returncode:
        raise RuntimeError(result.stderr)
    return int(result.stdout.split()[-1]) * 1024, time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
