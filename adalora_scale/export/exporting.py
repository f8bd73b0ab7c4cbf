"""One export, from an adapter folder to a folder that others load, with a report of what was done."""

from __future__ import annotations

import dataclasses
import importlib.util
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint, local_base
from adalora_scale.export.dequantise import Dequantised, check_storage, dequantised_weights, trained_on
from adalora_scale.export.fidelity import Fidelity, available_memory, compare, load_float32, sample_batches
from adalora_scale.export.merge import check_same_base, plan_merge
from adalora_scale.export.model_folder import shard_bytes, write_companions, write_model
from adalora_scale.export.output import REPORT_NAME, output_folder
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.export.peft_forms import write_peft_adalora, write_peft_lora
from adalora_scale.export.tensor_files import DTYPES

_TOLERANCE = 1e-4  # of the largest logit, for forms that only rearrange float32 numbers
_HEADS = ("classifier.weight", "score.weight", "out_proj.weight")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    adapter: Path
    output: Path
    format: str
    uniform: bool = False
    rank: int | None = None
    base: str | None = None
    dequantise: bool = False
    max_shard_size: str = "5GB"
    overwrite: bool = False
    fidelity: bool | None = None
    text: Path | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.uniform and self.format != "peft-lora":
            raise UserError(f"--uniform belongs to --format peft-lora, not to {self.format}.")
        if self.rank is not None and not self.uniform:
            raise UserError("--rank belongs to --uniform; add it, or leave --rank out.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank is {self.rank}; it must be at least 1.")
        if self.dequantise and self.format != "merged":
            raise UserError(f"--dequantise belongs to --format merged, not to {self.format}.")
        shard_bytes(self.max_shard_size)


def export_adapter(request: Request) -> dict[str, Any]:
    """Write the adapter in the asked form and return the report, which `export.json` holds too.

    Raises:
        UserError: the adapter or the base cannot be read, do not belong together, or the output folder is taken.
        Unsupported: the adapter, the base's architecture or its storage is not supported in this form.
    """
    adapter = AdapterFile(request.adapter)
    base = _base(request, adapter)
    inputs = [request.adapter, *([base.directory] if base else [])]
    report: dict[str, Any] = {
        "format": request.format + (" --uniform" if request.uniform else ""),
        "adapter": str(request.adapter),
        "output": str(request.output),
        "base": str(request.base or adapter.base),
        "notes": [],
    }
    if not adapter.final:
        report["notes"].append("the adapter is from before its final allocation: it holds more than the target budget")
    quantised: Dequantised | None = None
    if request.format == "merged":
        if base is None:
            raise UserError("--format merged needs the base model; name it with --base.")
        quantised = dequantised_weights(adapter, base) if request.dequantise else None
        report |= _merge(request, adapter, base, quantised, report["notes"])
    else:
        with output_folder(request.output, overwrite=request.overwrite, inputs=inputs) as folder:
            if request.format == "peft-adalora":
                report |= write_peft_adalora(adapter, folder, base=request.base)
            else:
                report |= write_peft_lora(
                    adapter, folder, base=request.base, uniform=request.uniform, rank=request.rank
                )
            report["what"] = _said_of_peft(request, report)
            _write_report(folder, report)
        if request.uniform and adapter.others:
            report["notes"].append("servers such as vLLM take no modules_to_save; this adapter has some")
    reason = _fidelity_reason(request, base)
    fidelity = None if reason or base is None else _measure(request, adapter, base, quantised)
    report["fidelity"] = fidelity.as_dict() if fidelity else None
    report["fidelity_text"] = str(fidelity) if fidelity else f"fidelity: not measured ({reason})"
    report["failed"] = fidelity is not None and request.format != "merged" and fidelity.relative > _TOLERANCE
    if report["failed"]:
        report["notes"].append(f"the exported form differs by more than {_TOLERANCE:g} of the largest logit: do not use")
    _write_report(request.output, report)
    return report
