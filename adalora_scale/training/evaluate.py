"""Exact match of a base model or an adapter on a run's evaluation rows."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from adalora_scale.config import RunConfig
from adalora_scale.data.rows import load_raw
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.placing.model import load_model
from adalora_scale.reading.written import check_written
from adalora_scale.tasks.registry import find_task, wanted_rows
from adalora_scale.training.metrics import ExactMatch, exact_match
from adalora_scale.training.run import check_model_path, load_tokenizer


def evaluate_exact_match(
    config: RunConfig,
    adapter: Path | None,
    *,
    batch_size: int,
    max_new_tokens: int,
    extract: str | None = None,
) -> ExactMatch:
    """Generate completions for the evaluation rows of `config` and compare them with the references.

    Raises:
        UserError: there are no prompt/completion evaluation rows, the adapter does not fit, or `extract` is no regex.
    """
    if extract is not None:
        try:
            re.compile(extract)
        except re.error as error:
            raise UserError(f"--extract '{extract}' is not a valid regular expression ({error}).") from None
    check_model_path(config)
    raw = load_raw(config.data, wanted_rows(find_task(config.task)), seed=config.training.get("seed", 42))
    if raw.eval is None or raw.layout != "prompt_completion":
        raise UserError("evaluate needs prompt/completion rows in data.eval (or data.eval_fraction).")
    tokenizer = load_tokenizer(config)
    check_written(config.model.model_name_or_path)
    model = load_model(config, given=AdapterFile(adapter).others if adapter is not None else ())
    if adapter is not None:
        load_adapter(model, adapter)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    return exact_match(
        model,
        tokenizer,
        raw.eval["prompt"],
        raw.eval["completion"],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        extract=extract,
    )
