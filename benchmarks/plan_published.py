"""The plan beside published memory of 70 B QLoRA runs, and what known differences explain.

    python benchmarks/plan_published.py --json benchmarks/results/plan_published.json     # two minutes, no GPU

The published runs used PEFT's LoRA, not this package. Columns, each with the differences of those before it:

- plan: what `adalora-scale plan` says of this package's engine at the published settings;
- parts: bitsandbytes keeps first-level scales whole on every GPU, and LoRA has no score;
- PEFT: a step of PEFT's own LoRA layers, traced as the plan traces ours, with hidden states in bfloat16;
- float32: the same with hidden states in float32, as embeddings in float32 leave them. The publications do not say
  which they had.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as PeftLinear4bit

from adalora_scale.cluster.plan.memory import Part, describe, memory_of
from adalora_scale.cluster.plan.model import build, build_base
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.trace import BLOCKS, Activations, trace_step
from adalora_scale.config import load_config
from adalora_scale.engines.planned import SCORE_STATISTICS
from adalora_scale.engines.registry import ENGINES
from adalora_scale.quantization.linear import Linear4bit

RECIPE = Path(__file__).resolve().parents[1] / "configs" / "recipes" / "llama3_70b_qadalora.yaml"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PEFT_DOCS = "PEFT's documentation, accelerate/fsdp and accelerate/deepspeed"
BLOG = "philschmid.de/fsdp-qlora-llama3"


@dataclass(frozen=True)
class Published:
    """A run and the memory of one GPU that was reported, in bytes."""

    name: str
    source: str
    reported: float
    model: str
    gpus: int
    engine: str
    offload: bool
    sequences: int
    length: int
    rank: int
    dropout: float

    def request(self) -> Request:
        """The same settings in this package."""
        values = {
            "model.model_name_or_path": self.model,
            "model.attn_implementation": "flash_attention_2",
            "data.max_length": self.length,
            "adalora.init_r": self.rank,
            "adalora.target_r": self.rank,
            "adalora.lora_dropout": self.dropout,
            "training.gradient_accumulation_steps": 2,
            "engine.config.cpu_offload": str(self.offload).lower(),
        }
        config = load_config(RECIPE, [f"{key}={value}" for key, value in values.items()])
        return Request(config=config, gpus=self.gpus, micro_batch=self.sequences, whole_logits=True)


LLAMA_2, LLAMA_3 = "meta-llama/Llama-2-70b-hf", "meta-llama/Meta-Llama-3-70B"
RUNS = [
    Published("FSDP", PEFT_DOCS, 35.6e9, LLAMA_2, 2, "fsdp2", False, 2, 2048, 8, 0.1),
    Published("FSDP, CPU offload", PEFT_DOCS, 19.6e9, LLAMA_2, 2, "fsdp2", True, 2, 2048, 8, 0.1),
    Published("ZeRO-3", PEFT_DOCS, 36.6e9, LLAMA_2, 2, "zero3", False, 2, 2048, 8, 0.1),
    Published("FSDP, CPU offload, Llama 3", BLOG, 22e9, LLAMA_3, 4, "fsdp2", True, 1, 3072, 16, 0.05),
]


class PeftLayer(PeftLinear4bit):
    """PEFT's forward of a LoRA layer on a bitsandbytes linear, over our 4-bit linear."""

    def __init__(self, base_layer: Any, adapter_name: str, config: LoraConfig, **options: Any) -> None:
        options.pop("device_map", None)
        super().__init__(base_layer, adapter_name, config=config, **options)


def peft_activations(request: Request, states: torch.dtype) -> Activations:
    """Trace a step of PEFT's layers on two blocks, under autocast as Trainer sets it."""
    rank, dropout = request.config.adalora.init_r, request.config.adalora.lora_dropout
    lora = LoraConfig(r=rank, lora_alpha=16, lora_dropout=dropout, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    lora._register_custom_module({Linear4bit: PeftLayer})
    model: Any = get_peft_model(build_base(request, BLOCKS), lora).get_base_model()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()  # as FSDP and DeepSpeed compute with them
        elif "embed_tokens" in name:
            parameter.data = parameter.data.to(states)
    return trace_step(request, sequences=request.sequences, checkpointing=True, autocast=True, model=model.train())


def compare(run: Published) -> dict[str, Any]:
    """Return device bytes a GPU: reported, planned, and with each difference."""
    request = run.request()
    model = describe(build(request))
    hooked = ENGINES[run.engine].hooks_layers
    ours = trace_step(request, sequences=run.sequences, checkpointing=True, autocast=False, hooked=hooked)
    result: dict[str, Any] = {"name": run.name, "source": run.source, "reported": run.reported}
    scales = sum(piece.bytes for piece in model.held if piece.kind == "4-bit scales")
    for column, activations, others in (
        ("plan", ours, False),
        ("parts", ours, True),
        ("PEFT", peft_activations(request, torch.bfloat16), True),
        ("float32", peft_activations(request, torch.float32), True),
    ):
        memory = memory_of(run.engine, request, model, activations)
        if others:
            memory.parts = list(as_peft(memory.parts, scales))
        result[column] = memory.device
        result[f"{column}: activations"] = activations.total(model.blocks)
    return result


def as_peft(parts: Iterable[Part], scales: int) -> Iterable[Part]:
    """Scales whole and on the device, no statistics."""
    for part in parts:
        if part.name == "4-bit scales":
            yield replace(part, bytes=scales, moment="always")
        elif part.name != SCORE_STATISTICS:
            yield part


def main() -> int:
    """Compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, in bytes")
    arguments = parser.parse_args()
    columns = ("plan", "parts", "PEFT", "float32")
    print(f"{'GB a GPU':28}{'reported':>10}" + "".join(f"{column:>16}" for column in columns))
    results = []
    for run in RUNS:
        result = compare(run)
        results.append(result)
        cells = [f"{result[c] / 1e9:.1f} ({result[c] / run.reported - 1:+.0%})" for c in columns]
        print(f"{run.name:28}{run.reported / 1e9:10.1f}" + "".join(f"{cell:>16}" for cell in cells), flush=True)
    if arguments.json:
        versions = {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
        arguments.json.write_text(json.dumps({"versions": versions, "runs": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
