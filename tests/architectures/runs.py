"""One small run of an architecture through the toolkit, and what it must agree with.

What a run learnt is asked of others: transformers opens the merged model and computes the model's own loss row by row,
PEFT opens the exported LoRA over the untouched base, and over one that bitsandbytes' functions rounded to 4 bits. The
toolkit's own readers and figures are not asked.
"""

from __future__ import annotations

import json
import re
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
from transformers.pytorch_utils import Conv1D

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
STEPS, ROWS, HELD_OUT, BATCH, EVALUATED = 4, 16, 6, 4, 2
TOLERANCE = 1e-4
"""Of losses and logits in float32, relative."""

RIGHT = "right"


class Wrong(Exception):
    """The toolkit's result is not what others compute."""


class Apart(Exception):
    """Two ranks end elsewhere than one process; whether DDP does so too is to be seen."""


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
    sections: dict[str, Any] = {
        "model": {"model_name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl"), "max_length": 64},
        "adalora": {"init_r": 4, "target_r": 2, "deltaT": 1},
        "training": {
            "output_dir": str(folder / name), "max_steps": STEPS, "learning_rate": 0.02, "bf16": False,
            "per_device_train_batch_size": batch, "per_device_eval_batch_size": EVALUATED, "save_strategy": "no",
            "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none", "disable_tqdm": True,
        },
    }  # fmt: skip
    for key, value in keys.items():
        section, _, option = key.partition("__")
        sections.setdefault(section, {})[option] = value
    sections["task"] = "causal_lm" if kind == "causal" else "sequence_classification"
    while True:
        try:
            summary = train(config_from_tree(sections))
            return float(summary["final"]["eval_loss"])
        except UserError as error:  # experts in one tensor: what the line asks for is done
            asked = re.search(r"Add '(\w+)' to adalora.exclude_modules", str(error))
            if asked is None:
                raise
            sections["adalora"].setdefault("exclude_modules", []).append(asked[1])


def training(folder: Path, kind: str) -> str:
    """One process, float32: the run's loss is the merged model's own."""
    loss = run(folder, kind, "one")
    export_adapter(Request(adapter=folder / "one", output=folder / "merged", format="merged", fidelity=False))
    _same("evaluation loss", loss, _open(folder / "merged", kind), folder, kind)
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
    base = _quantised(_open(folder / "base", kind), folder / "four")
    _same("evaluation loss", loss, PeftModel.from_pretrained(base, folder / "lora-four"), folder, kind)
    return RIGHT


def packed(folder: Path, kind: str) -> str:
    """Packed rows: the run's loss is that of the same rows alone."""
    loss = run(folder, kind, "packed", data__packing=True)
    export_adapter(Request(adapter=folder / "packed", output=folder / "merged-p", format="merged", fidelity=False))
    _same("evaluation loss", loss, _open(folder / "merged-p", kind), folder, kind)
    return RIGHT


def sharded(folder: Path, kind: str) -> str:
    """Called on each of two ranks: FSDP2 ends where one process did, or DDP on the same two ranks.

    Where gradients are tiny, Adam's first steps make much of how two halves of a batch were added up.
    """
    run(folder, kind, "fsdp2", batch=BATCH // 2, engine__name="fsdp2")
    if (distance := _distance(folder / "one", folder / "fsdp2")) > TOLERANCE:
        raise Apart(distance)
    return RIGHT


def replicated(folder: Path, kind: str) -> str:
    """Called where `sharded` is apart from one process: DDP on two ranks ends where FSDP2 does.

    Adam's epsilon is large here, so that a gradient that is zero but for rounding moves nothing; DDP's own runs with
    the small one show what another order of additions does.
    """
    for name in ("ddp", "fsdp2"):
        run(folder, kind, f"{name}-eps", batch=BATCH // 2, engine__name=name, training__adam_epsilon=1e-3)
    if (distance := _distance(folder / "ddp-eps", folder / "fsdp2-eps")) > TOLERANCE:
        raise Wrong(f"FSDP2's adapter is {distance:.1e} away from DDP's")
    run(folder, kind, "ddp", batch=BATCH // 2, engine__name="ddp")
    apart, ours = (_distance(folder / "one", folder / name) for name in ("ddp", "fsdp2"))
    if ours != float("inf") and ours > 100 * max(apart, TOLERANCE / 10):
        raise Wrong(f"FSDP2's adapter is {ours:.1e} away from one process's, DDP's {apart:.1e}")
    return RIGHT


def _distance(one: Path, other: Path) -> float:
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    if {name: t.shape for name, t in ours.items()} != {name: t.shape for name, t in theirs.items()}:
        return float("inf")  # other triplets were kept
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    size = sum(float(tensor.double().square().sum()) for tensor in ours.values())
    return (difference / size) ** 0.5


CHECKS = {"train": training, "merge, PEFT": merging, "4-bit": in_4_bits, "packing": packed, "FSDP2 × 2": sharded}
"""A column of the table each; merging and FSDP2 look at what training left."""


REPLICATED = "DDP × 2"
"""Not a column: asked where FSDP2's differs from one process."""


def verdict(check: str, folder: Path, kind: str) -> tuple[str, str]:
    """Return (`right`, `refused`, `wrong` or `apart`, the reason)."""
    try:
        return (replicated if check == REPLICATED else CHECKS[check])(folder, kind), ""
    except Apart:
        return "apart", ""
    except (UserError, Unsupported) as error:
        return "refused", str(error)
    except (Wrong, WrongEnd) as error:
        return "wrong", str(error)
    except BaseException as error:  # a traceback that a user would see
        traceback.print_exc()
        return "wrong", f"{type(error).__name__}: {error}"


@torch.no_grad()
def _quantised(model: nn.Module, run: Path) -> nn.Module:
    """Round the weights below adapters as bitsandbytes' kernels do, but for those that transformers never quantises."""
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name in json.loads((run / "run.json").read_text())["ranks"]:
        if kept.intersection(name.split(".")):
            continue  # T5's `wo`
        weight = _weight(model, name)
        # One block a row: the CPU kernel of bitsandbytes 0.50 takes a wrong scale where rows are narrower.
        packed, state = quantize_4bit(weight.reshape(-1, 64), blocksize=64, compress_statistics=True, quant_type="nf4")
        weight.copy_(dequantize_4bit(packed, state).view_as(weight))
    return model


def _weight(model: nn.Module, name: str) -> torch.Tensor:
    """Return a view of a matrix's weight, (out, in): a layer's, or that of expert 5 for `….experts.5.down_proj`."""
    parent, _, leaf = name.rpartition(".")
    owner, _, number = parent.rpartition(".")
    if number.isdigit() and isinstance(stack := getattr(model.get_submodule(owner), leaf, None), nn.Parameter):
        experts = model.get_submodule(owner)
        weight = stack.data[int(number)]
        return weight.T if getattr(experts, "is_transposed", True) else weight  # Llama 4's have no such attribute
    module = model.get_submodule(name)
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def _open(folder: Path, kind: str, **options: Any) -> nn.Module:
    classes = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    model = classes.from_pretrained(folder, **({"dtype": torch.float32} | options)).eval()
    model.config.use_cache = False  # nothing is generated; BLT's and xLSTM's caches fail on these small models
    return model


def _batches(folder: Path, kind: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return token ids, (1, tokens), and the class, (1,), of each held-out row."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    names = sorted({json.loads(line)["label"] for line in _lines(folder / "train.jsonl")}) if kind == "encoder" else []
    found = []
    for line in _lines(folder / "eval.jsonl"):
        row = json.loads(line)
        ids = tokenizer(row["text"])["input_ids"]
        if kind == "causal":
            found.append((torch.tensor([[*ids, tokenizer.eos_token_id]]), torch.tensor([-1])))
        else:
            found.append((torch.tensor([ids]), torch.tensor([names.index(row["label"])])))
    return found


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@torch.no_grad()
def _loss(model: nn.Module, folder: Path, kind: str, rows: int) -> float:
    """Return the loss over next tokens or classes, `rows` at a time."""
    total = count = 0.0
    batches = _batches(folder, kind)
    for first in range(0, len(batches), rows):
        chosen = batches[first : first + rows]
        longest = max(tokens.shape[1] for tokens, *_ in chosen)
        words = AutoTokenizer.from_pretrained(folder / "base")  # CPM-Ant reads what the run pads with
        pad = words.eos_token_id if words.pad_token_id is None else words.pad_token_id
        ids = torch.cat([nn.functional.pad(t, (0, longest - t.shape[1]), value=pad) for t, *_ in chosen])
        mask = torch.cat([nn.functional.pad(torch.ones_like(t), (0, longest - t.shape[1])) for t, *_ in chosen])
        logits = model(input_ids=ids, attention_mask=mask).logits.float()
        if kind == "encoder":
            total += float(
                nn.functional.cross_entropy(logits, torch.cat([label for _, label in chosen]), reduction="sum")
            )
            count += len(chosen)
            continue
        wanted = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        total += float(nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), wanted, reduction="sum"))
        count += int(mask[:, 1:].sum())
    return total / count


@torch.no_grad()
def _logits(model: nn.Module, folder: Path, kind: str) -> torch.Tensor:
    rows = [model(input_ids=t, attention_mask=torch.ones_like(t)).logits.flatten() for t, *_ in _batches(folder, kind)]
    return torch.cat(rows)


def _same(what: str, ours: float, model: nn.Module, folder: Path, kind: str) -> None:
    """Compare with the same rows alone, or in the run's batches: the logits of FNet and CANINE depend on padding."""
    theirs = _loss(model, folder, kind, 1)
    if abs(ours - theirs) <= TOLERANCE * abs(theirs):
        return
    together = _loss(model, folder, kind, EVALUATED)
    if not abs(ours - together) <= TOLERANCE * abs(together):
        raise Wrong(f"the run's {what} is {ours:.5f}, others compute {theirs:.5f}")
