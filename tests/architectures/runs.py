"""One small run of an architecture through the toolkit, and what it must agree with.

What a run learnt is asked of others: transformers opens the merged model and computes the model's own loss row by row,
PEFT opens the exported LoRA over the untouched base, and over one that bitsandbytes' functions rounded to 4 bits. The
toolkit's own readers and figures are not asked.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from adalora_scale.config.reading import config_from_tree
from adalora_scale.errors import Unsupported, UserError, WrongEnd
from adalora_scale.export.exporting import export_adapter
from adalora_scale.export.request import Request
from adalora_scale.training.run import train
from tests.architectures.small import LABELS, small_model

_WORDS = (
    "def",
    "return",
    "list",
    "sum",
    "of",
    "the",
    "value",
    "in",
    "a",
    "string",
    "number",
    "name",
    "with",
    "or",
    "for",
)
STEPS, ROWS, HELD_OUT, BATCH = 4, 16, 6, 4
TOLERANCE = 1e-4
"""Of losses and logits in float32, relative."""

RIGHT = "right"


class Wrong(Exception):
    """The toolkit's result is not what others compute."""


def make_base(model_type: str, kind: str, tokenizer: Path, folder: Path) -> None:
    """Write the small model and the rows of its run.

    Matrices are made larger than at the start of a pretraining, so that the model's logits depend on its input.
    """
    model = small_model(model_type, kind)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(2)
    model.save_pretrained(folder / "base")
    words = AutoTokenizer.from_pretrained(tokenizer)
    if kind == "encoder":  # as BERT's and BART's own do it; several classify the end token
        ends = [(token, words.convert_tokens_to_ids(token)) for token in (words.bos_token, words.eos_token)]
        template = TemplateProcessing(single=f"{ends[0][0]} $A {ends[1][0]}", special_tokens=ends)
        words.backend_tokenizer.post_processor = template
    words.save_pretrained(folder / "base")
    for name, count, first in (("train", ROWS, 0), ("eval", HELD_OUT, ROWS)):
        rows = []
        for row in range(first, first + count):
            text = " ".join(_WORDS[(row * 7 + i * (row % 5 + 1)) % len(_WORDS)] for i in range(4 + row % 9))
            rows.append({"text": text} | ({"label": f"class {row % LABELS}"} if kind == "encoder" else {}))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder: Path, kind: str, name: str, *, batch: int = BATCH, **keys: Any) -> float:
    """Train into ``folder/name`` and return the evaluation loss that the run reports."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"model_name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64},
        "adalora": {"init_r": 4, "target_r": 2, "deltaT": 1},
        "training": {
            "output_dir": str(folder / name), "max_steps": STEPS, "learning_rate": 0.02, "bf16": False,
            "per_device_train_batch_size": batch, "per_device_eval_batch_size": 2, "save_strategy": "no",
            "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        },
    }  # fmt: skip
    for key, value in keys.items():
        section, _, option = key.partition("__")
        sections.setdefault(section, {})[option] = value
    task = "causal_lm" if kind == "causal" else "sequence_classification"
    summary = train(config_from_tree(sections | {"task": task}))
    return float(summary["final"]["eval_loss"])


def training(folder: Path, kind: str) -> str:
    """One process, float32: the run's loss is the merged model's own."""
    loss = run(folder, kind, "one")
    export_adapter(Request(adapter=folder / "one", output=folder / "merged", format="merged", fidelity=False))
    _same("evaluation loss", loss, _loss(_open(folder / "merged", kind), folder, kind))
    return RIGHT


def merging(folder: Path, kind: str) -> str:
    """The merged model gives the logits of the exported LoRA over the base, opened by PEFT."""
    export_adapter(Request(adapter=folder / "one", output=folder / "lora", format="peft-lora", fidelity=False))
    base = _open(folder / "base", kind)
    plain = _logits(base, folder, kind)
    lora = _logits(PeftModel.from_pretrained(base, folder / "lora"), folder, kind)
    merged = _logits(_open(folder / "merged", kind), folder, kind)
    distance, moved = float((lora - merged).norm()), float((lora - plain).norm())
    if not moved > 0:
        raise Wrong("the adapter opened by PEFT changes no logit")
    if not distance <= 1e-3 * moved:
        raise Wrong(f"merged and PEFT's logits differ by {distance / moved:.1e} of what the adapter changes")
    return RIGHT


def in_4_bits(folder: Path, kind: str) -> str:
    """A 4-bit base: the run's loss is that of the exported LoRA over weights that went to NF4 and back."""
    loss = run(
        folder, kind, "four", model__load_in_4bit=True, model__bnb_4bit_compute_dtype="float32",
        model__torch_dtype="float32",
    )  # fmt: skip
    export_adapter(Request(adapter=folder / "four", output=folder / "lora-four", format="peft-lora", fidelity=False))
    base = _quantised(_open(folder / "base", kind))
    _same("evaluation loss", loss, _loss(PeftModel.from_pretrained(base, folder / "lora-four"), folder, kind))
    return RIGHT


def packed(folder: Path, kind: str) -> str:
    """Packed rows: the run's loss is that of the same rows alone."""
    loss = run(folder, kind, "packed", data__packing=True)
    export_adapter(Request(adapter=folder / "packed", output=folder / "merged-p", format="merged", fidelity=False))
    _same("evaluation loss", loss, _loss(_open(folder / "merged-p", kind), folder, kind))
    return RIGHT


def sharded(folder: Path, kind: str) -> str:
    """Called on each of two ranks: FSDP2 ends where one process did."""
    loss = run(folder, kind, "fsdp2", batch=BATCH // 2, engine__name="fsdp2")
    alone, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "fsdp2"))
    if sorted(alone) != sorted(two):
        raise Wrong(f"FSDP2 saves other tensors: {sorted(set(alone) ^ set(two))[:3]}")
    difference = sum(float((alone[name].double() - two[name].double()).square().sum()) for name in alone)
    size = sum(float(tensor.double().square().sum()) for tensor in alone.values())
    if not (difference / size) ** 0.5 <= TOLERANCE:
        raise Wrong(f"FSDP2's adapter is {(difference / size) ** 0.5:.1e} away from one process's")
    del loss
    return RIGHT


CHECKS = {"train": training, "merge, PEFT": merging, "4-bit": in_4_bits, "packing": packed, "FSDP2 × 2": sharded}
"""A column of the table each; merging and FSDP2 look at what training left."""


def verdict(check: str, folder: Path, kind: str) -> tuple[str, str]:
    """Return (`right`, `refused` or `wrong`, the reason)."""
    try:
        return CHECKS[check](folder, kind), ""
    except (UserError, Unsupported) as error:
        return "refused", str(error)
    except (Wrong, WrongEnd) as error:
        return "wrong", str(error)
    except BaseException as error:  # a traceback that a user would see
        traceback.print_exc()
        return "wrong", f"{type(error).__name__}: {error}"


@torch.no_grad()
def _quantised(model: nn.Module) -> nn.Module:
    """Round the weights of linear layers, output heads apart, as bitsandbytes' kernels do."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        kept = module is head or name in ("classifier", "score", "classification_head", "lm_head")
        if type(module) is nn.Linear and not kept:
            # One block a row: the CPU kernel of bitsandbytes 0.50 takes a wrong scale where rows are narrower.
            blocks = module.weight.reshape(-1, 64)
            packed, state = quantize_4bit(blocks, blocksize=64, compress_statistics=True, quant_type="nf4")
            module.weight.copy_(dequantize_4bit(packed, state).view_as(module.weight))
    return model


def _open(folder: Path, kind: str, **options: Any) -> nn.Module:
    classes = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    return classes.from_pretrained(folder, **({"dtype": torch.float32} | options)).eval()


def _batches(folder: Path, kind: str) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Token ids, labels, and how many tokens or rows they count for, of each held-out row."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    names = sorted({json.loads(line)["label"] for line in _lines(folder / "train.jsonl")}) if kind == "encoder" else []
    found = []
    for line in _lines(folder / "eval.jsonl"):
        row = json.loads(line)
        ids = tokenizer(row["text"])["input_ids"]
        if kind == "causal":
            tokens = torch.tensor([[*ids, tokenizer.eos_token_id]])
            found.append((tokens, tokens.clone(), tokens.shape[1] - 1))
        else:
            found.append((torch.tensor([ids]), torch.tensor([names.index(row["label"])]), 1))
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@torch.no_grad()
def _loss(model: nn.Module, folder: Path, kind: str) -> float:
    total = count = 0.0
    for tokens, labels, weight in _batches(folder, kind):
        output = model(input_ids=tokens, attention_mask=torch.ones_like(tokens), labels=labels)
        total += float(output.loss) * weight
        count += weight
    return total / count


@torch.no_grad()
def _logits(model: nn.Module, folder: Path, kind: str) -> torch.Tensor:
    rows = [model(input_ids=t, attention_mask=torch.ones_like(t)).logits.flatten() for t, *_ in _batches(folder, kind)]
    return torch.cat(rows)


def _same(what: str, ours: float, theirs: float) -> None:
    if not abs(ours - theirs) <= TOLERANCE * abs(theirs):
        raise Wrong(f"the run's {what} is {ours:.5f}, others compute {theirs:.5f}")
