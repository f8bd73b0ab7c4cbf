"""A model folder that plain transformers loads: weights in shards, config, tokenizer and the base's other files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint, rows_in
from adalora_scale.export.merge import Plan
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.planned import Planned
from adalora_scale.export.tensor_files import DTYPES, TensorFileWriter
from adalora_scale.reading.base_config import foreign
from adalora_scale.reading.folders import own_file

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NOT_COPIED = re.compile(r"config\.json|.*\.index\.json|adapter_.*|run\.json|export\.json|trainer_state\.json")
_COPIED = (".json", ".txt", ".model", ".jinja", ".py")


def write_model(plan: Plan, folder: Path, *, max_shard_bytes: int) -> dict[str, Any]:
    """Write the planned tensors as `model.safetensors`, or as shards with an index; shows a bar on a terminal."""
    shards: list[list[Planned]] = [[]]
    for tensor in plan.tensors:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > max_shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    count = len(shards)
    index: dict[str, str] = {}
    total = sum(tensor.size for tensor in plan.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="merging", disable=None) as bar:
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            by_key = {tensor.key: tensor for tensor in shard}
            entries = [(t.key, t.dtype, t.shape, t.size) for t in shard]
            with TensorFileWriter(folder / name, entries) as writer:
                for key in writer.order:
                    bar.update(writer.write(by_key[key].pieces()))
            index |= dict.fromkeys(by_key, name)
    if count > 1:
        tree = {"metadata": {"total_size": total}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return {"bytes": total, "shards": count}


def write_companions(adapter: AdapterFile, base: BaseCheckpoint, plan: Plan, folder: Path, dtype: str | None) -> None:
    """Write config.json, and copy the generation config, the tokenizer, model code and licences.

    Args:
        adapter: its tokenizer (with the chat template it was trained on) goes before the base's.
        base: where the rest comes from.
        plan: what was merged.
        folder: where to.
        dtype: the weights' dtype where it is no longer what the base's config says.
    """
    for path in sorted(base.directory.iterdir()):
        licence = path.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY"))
        if path.is_file() and (licence or path.suffix in _COPIED) and not _NOT_COPIED.fullmatch(path.name):
            shutil.copyfile(own_file(path, base.directory), folder / path.name)
    copy_tokenizer(adapter.directory, folder)
    config = dict(base.config)
    config["architectures"] = [type(base.model).__name__]
    if base.grown:
        _set_vocabulary(config, rows_in(base))
    if plan.untied:
        config["tie_word_embeddings"] = False
    if dtype is not None:
        config.pop("quantization_config", None)
        config.pop("torch_dtype", None)
        config["dtype"] = str(DTYPES[dtype]).removeprefix("torch.")
    if adapter.task is not None and adapter.task.has_labels:
        model_config: Any = base.model.config
        labels = adapter.record.get("labels") or list(model_config.id2label.values())
        config["id2label"] = {str(number): label for number, label in enumerate(labels)}
        config["label2id"] = {label: number for number, label in enumerate(labels)}
        config.pop("num_labels", None)
        config.pop("problem_type", None)  # the base's
        if problem := adapter.record.get("problem_type"):
            config["problem_type"] = problem
        _add_padding(config, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def shard_bytes(text: str) -> int:
    """Read a size such as 5GB.

    Raises:
        UserError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B?)", text.strip().upper())
    unit = match.group(2) if match else "?"
    unit = unit if unit in _UNITS else unit + "B"
    if match is None or unit not in _UNITS or float(match.group(1)) <= 0:
        raise UserError(f"--max-shard-size {text} is no size; write for example 5GB.")
    return int(float(match.group(1)) * _UNITS[unit])


def _set_vocabulary(config: dict[str, Any], rows: int) -> None:
    """Say how many tokens the embedding has, where the base's config says it: a part of models with several."""
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = config["text_config"] | {"vocab_size": rows}
        if "vocab_size" not in config:
            return
    config["vocab_size"] = rows


def _add_padding(config: dict[str, Any], folder: Path) -> None:
    """Decoders that classify look for the last token before the padding; training took the tokenizer's."""
    if config.get("pad_token_id") is None and (folder / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        with foreign(f"the tokenizer in {folder}"):
            pad = AutoTokenizer.from_pretrained(folder, trust_remote_code=False).pad_token_id
        if pad is not None:
            config["pad_token_id"] = pad
