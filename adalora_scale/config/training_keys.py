"""The keys of `training:` without the libraries they belong to.

The section's keys are fields of transformers' TrainingArguments or TRL's SFTConfig. Importing these takes many seconds;
their files are read as text instead, so that a misspelt key is answered at once and editors can complete keys.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adalora_scale.config.options import TaskName
from adalora_scale.errors import UserError

OWN_KEYS: dict[str, Any] = {
    "overwrite_output_dir": bool,
    "async_save": bool,
    "output_store": str | None,
    "resume_allow_changed": list[str] | None,
    "resume_compact": bool | None,
    "global_batch_size": int,
    "max_skipped_steps": int,
    "show_example": bool,
    "tiled_mlp": int,
}
"""Keys of the section that are not transformers', and their types."""
OWN_MEANINGS = {
    "overwrite_output_dir": "train although output_dir holds another run.",
    "async_save": "write checkpoints by a thread of each rank while training goes on.",
    "output_store": "URL of a folder on object storage that gets checkpoints and results, as s3://bucket/run.",
    "resume_allow_changed": "keys that may differ from those of the run that is continued.",
    "resume_compact": "continue without the pruned columns; None: only where that changes no bit.",
    "global_batch_size": "examples of one optimizer step over all ranks; accumulation follows from it.",
    "max_skipped_steps": "steps in a row with values that are no numbers, after which the run ends.",
    "show_example": "print the first training row as the model sees it when a run begins.",
    "tiled_mlp": "parts of a sequence that a block's MLP works on in turn, each computed again in the backward pass.",
}
MANAGED = {
    "max_length": "data.max_length",
    "packing": "data.packing",
    "eval_packing": "data.packing",
    "completion_only_loss": "data.loss_on",
    "assistant_only_loss": "data.loss_on",
    "chat_template_path": "data.chat_template",
    "dataset_text_field": "data.text_column",
    "dataset_num_proc": "data.preprocessing_num_workers",
    "dataset_kwargs": "data",
    "model_init_kwargs": "model",
    "deepspeed": "engine.config",
    "fsdp": "engine.name",
    "fsdp_config": "engine.config",
}
"""Keys of TRL's or transformers' classes that are set through another section, and where: two places for one thing
would disagree some day."""

_CLASSES: Mapping[TaskName, tuple[str, str]] = {
    "causal_lm": ("trl.trainer.sft_config", "SFTConfig"),
    "sequence_classification": ("transformers.training_args", "TrainingArguments"),
}
"""Task → module and class of its training arguments, as `Task.arguments_class` returns it."""
_HOMES = {("transformers", "TrainingArguments"): "transformers.training_args"}
"""Where a class is that a package hands out itself."""


@dataclass(frozen=True)
class VendorKey:
    """A field of a vendor's class."""

    annotation: str
    """Its type, as written there."""
    default: str
    """Its default as written there; empty where it is none that can be shown."""
    meaning: str
    """The first sentence of its description; may be empty."""


def refuse_managed(key: str) -> None:
    """Refuse a key of the section that has its place in another one.

    Raises:
        UserError: naming that place.
    """
    if key in MANAGED:
        raise UserError(f"training.{key} is set through {MANAGED[key]} here; move it there.")


@functools.cache
def vendor_keys(task: str) -> Mapping[str, VendorKey] | None:
    """Return the fields of the task's training arguments; None where their files cannot be followed as text."""
    if task not in _CLASSES:
        return None
    module, name = _CLASSES[task]  # type: ignore[index]
    return _fields(module, name)


def _fields(module: str, name: str) -> dict[str, VendorKey] | None:
    tree = _parsed(module)
    found = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None) if tree else None
    if tree is None or found is None:
        return None
    fields: dict[str, VendorKey] = {}
    for base in found.bases:
        if not isinstance(base, ast.Name) or (home := _home(tree, module, base.id)) is None:
            return None
        inherited = _fields(home, base.id)
        if inherited is None:
            return None
        fields |= inherited
    said = _described(ast.get_docstring(found) or "")
    for entry in found.body:
        if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name):
            key, annotation = entry.target.id, ast.unparse(entry.annotation)
            if "ClassVar" in annotation or key.startswith("_"):
                continue
            default, told = _of_field(entry.value)
            meaning = said.get(key) or told or (fields[key].meaning if key in fields else "")
            fields[key] = VendorKey(annotation.strip("'\""), default, _sentence(meaning))
    return fields


def _home(tree: ast.Module, module: str, name: str) -> str | None:
    """Return the module that a name of another one comes from."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module
        if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
            package = ".".join(module.split(".")[: -node.level]) if node.level else ""
            source = ".".join(part for part in (package, node.module or "") if part)
            return _HOMES.get((source, name), source)
    return None


@functools.cache
def _parsed(module: str) -> ast.Module | None:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest).with_suffix(".py")
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return None


def _of_field(value: ast.expr | None) -> tuple[str, str]:
    """Return the default and the help of a dataclass field's right side."""
    if not isinstance(value, ast.Call):
        return (ast.unparse(value) if value is not None else ""), ""
    words = {word.arg: word.value for word in value.keywords}
    default, help_ = "", ""
    if isinstance(words.get("default"), ast.Constant):
        default = ast.unparse(words["default"])
    for holder in ast.walk(words["metadata"]) if "metadata" in words else ():
        if isinstance(holder, ast.Dict):
            for key, text in zip(holder.keys, holder.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "help" and isinstance(text, ast.Constant):
                    help_ = str(text.value)
    return default, help_


def _described(docstring: str) -> dict[str, str]:
    """Return what a docstring in transformers' form says of each argument."""
    found: dict[str, str] = {}
    for match in re.finditer(r"^\s*(\w+) \([^\n]*\):\s*$", docstring, flags=re.MULTILINE):
        rest = docstring[match.end() :].lstrip("\n").splitlines()
        indent = len(match.group(0)) - len(match.group(0).lstrip())
        lines = []
        for line in rest:
            if not line.strip() or len(line) - len(line.lstrip()) <= indent:
                break
            lines.append(line.strip())
        found.setdefault(match.group(1), " ".join(lines))
    return found


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"\[`?~?([^\]`]*)`?\](\([^)]*\))?", r"\1", text)
    first = re.split(r"(?<=[.!?])\s+(?=[A-Z`*])", text, maxsplit=1)[0]
    return first[:300]
