"""One export, from an adapter folder to a folder that others load, with a report of what was done."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adalora_scale.adalora.adaptables import adaptable_of
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint, local_base
from adalora_scale.export.dequantise import Dequantised, dequantised_weights, refuse_quantised
from adalora_scale.export.fidelity import (
    Fidelity,
    available_memory,
    compare,
    load_float32,
    quiet_transformers,
    sample_batches,
)
from adalora_scale.export.from_checkpoint import adapter_folder
from adalora_scale.export.merge import check_same_base, plan_merge
from adalora_scale.export.model_folder import shard_bytes, write_companions, write_model
from adalora_scale.export.output import output_folder, write_report
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.export.peft_forms import write_peft_adalora, write_peft_lora

_TOLERANCE = 1e-4  # of the largest logit, for forms that only rearrange float32 numbers
_HEADROOM = 1.5  # loading holds a tensor twice, computing needs activations


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
    """Write the adapter (or a checkpoint's) in the asked form and return the report, which `export.json` holds too.

    Raises:
        UserError: the adapter or the base cannot be read, do not belong together, or the output folder is taken.
        Unsupported: the adapter, the base's architecture or its storage is not supported in this form.
    """
    with adapter_folder(request.adapter) as folder:
        return _export(request, AdapterFile(folder))


def _export(request: Request, adapter: AdapterFile) -> dict[str, Any]:
    base = _base(request, adapter)
    report: dict[str, Any] = {
        "format": request.format + (" --uniform" if request.uniform else ""),
        "adapter": str(request.adapter),
        "output": str(request.output),
        "base": str(request.base or adapter.base),
        "notes": [],
    }
    if not adapter.final:
        report["notes"].append("the adapter is from before its final allocation: it holds more than the target budget")
    reason = _why_not_measured(request, adapter, base)
    batches = [] if reason or base is None else _samples(request, adapter, base)
    quantised: Dequantised | None = None
    if request.format == "merged":
        if base is None:
            raise UserError("--format merged needs the base model; name it with --base.")
        quantised = dequantised_weights(adapter, base) if request.dequantise else None
        _merge(request, adapter, base, quantised, report)
    else:
        _rearrange(request, adapter, base, report)
    fidelity = _measure(request, adapter, base, quantised, batches) if batches and base is not None else None
    report["fidelity"] = fidelity.as_dict() if fidelity else None
    report["fidelity_text"] = str(fidelity) if fidelity else f"fidelity: not measured ({reason})"
    report["failed"] = fidelity is not None and request.format != "merged" and not fidelity.relative <= _TOLERANCE
    if report["failed"]:
        report["notes"].append(f"it differs by more than {_TOLERANCE:g} of the largest logit: do not use this export")
    write_report(request.output, report)
    return report


def _base(request: Request, adapter: AdapterFile) -> BaseCheckpoint | None:
    """Open the base model, and see that the adapter belongs to it; PEFT's forms can do without one."""
    name = request.base or adapter.base
    needed = request.format == "merged" or request.base is not None or request.fidelity
    if name is None:
        if needed:
            raise UserError("the adapter does not name its base model; say where it is with --base.")
        return None
    try:
        base = BaseCheckpoint(
            local_base(name),
            task=adapter.task,
            num_labels=_num_labels(adapter),
            trust_remote_code=request.trust_remote_code,
        )
    except (UserError, Unsupported):
        if needed:
            raise
        return None
    check_same_base(adapter, base)
    return base


def _num_labels(adapter: AdapterFile) -> int | None:
    """Read the number of classes off the head."""
    return adapter.task.label_count(adapter.others) if adapter.task else None


def _rearrange(request: Request, adapter: AdapterFile, base: BaseCheckpoint | None, report: dict[str, Any]) -> None:
    inputs = [request.adapter, *([base.directory] if base else [])]
    with output_folder(request.output, overwrite=request.overwrite, inputs=inputs) as folder:
        if request.format == "peft-adalora":
            report |= write_peft_adalora(adapter, folder, base=request.base)
            what = "PEFT AdaLoRA"
        else:
            _refuse_other_function(adapter, base)
            report |= write_peft_lora(adapter, folder, base=request.base, uniform=request.uniform, rank=request.rank)
            what = "plain LoRA, zero-padded to one rank" if request.uniform else "plain LoRA, a rank for every matrix"
        ranks = report["ranks"].values()
        report["what"] = f"{request.output}: {what}; {len(ranks)} matrices, ranks {min(ranks)} to {max(ranks)}"
        write_report(folder, report)
    if report.get("left_out"):
        report["notes"].append(f"{len(report['left_out'])} matrices have rank 0 and are left out, PEFT's LoRA has none")
    if request.uniform and adapter.others:
        report["notes"].append("servers such as vLLM take no modules_to_save; this adapter has some")


def _refuse_other_function(adapter: AdapterFile, base: BaseCheckpoint | None) -> None:
    """Refuse settings of an adapted layer under which PEFT's LoRA would compute something else."""
    if base is None:
        return
    for name in adapter.modules:
        layer = base.model.get_submodule(name)
        if (reason := adaptable_of(layer).why_not_peft(layer)) is not None:
            raise Unsupported(f"'{name}' cannot be exported for PEFT: {reason}. Use --format merged.")


def _merge(
    request: Request,
    adapter: AdapterFile,
    base: BaseCheckpoint,
    quantised: Dequantised | None,
    report: dict[str, Any],
) -> None:
    if quantised is None:
        refuse_quantised(base)
    plan = plan_merge(adapter, base, quantised)
    needed = sum(tensor.size for tensor in plan.tensors)
    inputs = [request.adapter, base.directory]
    with output_folder(request.output, overwrite=request.overwrite, inputs=inputs, needed_bytes=needed) as folder:
        report |= write_model(plan, folder, max_shard_bytes=shard_bytes(request.max_shard_size))
        dtype = next(iter(quantised.weights.values())).dtype if quantised and base.quantization else None
        write_companions(adapter, base, plan, folder, dtype)
        into = quantised.said if quantised else f"the weights of {base.directory}, in their own dtype"
        heads = f", {len(plan.replaced)} tensors trained in full replaced" if plan.replaced else ""
        report["merged"], report["replaced"] = plan.merged, plan.replaced
        report["what"] = f"{request.output}: {len(plan.merged)} matrices merged into {into}{heads}"
        write_report(folder, report)
    if plan.untied:
        report["notes"].append(
            "the adapter is on one side of the tie between output head and embedding, so they are no longer tied"
        )
    if quantised is None and (trained := adapter.record.get("quantisation")):
        report["notes"].append(
            f"the adapter was trained on the {trained.get('quant_type')} values of its base; these are the original "
            f"ones, so the result differs from training by the quantisation error (--dequantise keeps it)"
        )


def _why_not_measured(request: Request, adapter: AdapterFile, base: BaseCheckpoint | None) -> str | None:
    if request.fidelity is False:
        return "--no-fidelity"
    if base is None:
        return "the base model is not at hand; name it with --base"
    if (request.format != "merged" or adapter.method == "LORA") and importlib.util.find_spec("peft") is None:
        return "PEFT is not installed"
    inputs = getattr(base.model, "main_input_name", "input_ids")
    if inputs != "input_ids":
        return f"the model takes {inputs}, the samples are text"
    needed = 4 * sum(parameter.numel() for parameter in base.model.parameters())
    available = available_memory()
    if request.fidelity is None and available is not None and needed * _HEADROOM > available:
        sizes = f"the model in float32 takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        return f"{sizes}; --fidelity does it anyway"
    return None


def _samples(request: Request, adapter: AdapterFile, base: BaseCheckpoint) -> list[dict[str, Tensor]]:
    return sample_batches([adapter.directory, base.directory], request.text, base.model.config)


def _measure(
    request: Request,
    adapter: AdapterFile,
    base: BaseCheckpoint,
    quantised: Dequantised | None,
    batches: list[dict[str, Tensor]],
) -> Fidelity:
    options: dict[str, Any] = {"trust_remote_code": True} if request.trust_remote_code else {}
    labels = _num_labels(adapter)
    head = options | ({"num_labels": labels, "ignore_mismatched_sizes": True} if labels is not None else {})

    def load_base() -> nn.Module:
        return quantised.load_model() if quantised else load_float32(base.directory, base.model, **head)

    def load_exported() -> nn.Module:
        if request.format == "merged":
            return load_float32(request.output, base.model, **options)
        return _with_peft(load_float32(base.directory, base.model, **head), request.output)

    def with_adapter(model: nn.Module) -> nn.Module:
        if adapter.method == "LORA":
            return _with_peft(model, adapter.directory)
        return load_adapter(model, adapter.directory)

    live = "the 4-bit base" if quantised else f"{base.directory}"
    with quiet_transformers():
        return compare(
            load_base,
            with_adapter,
            load_exported,
            batches,
            compared_with=f"the adapter on {live}",
        )


def _with_peft(model: nn.Module, folder: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():  # about rank_pattern, which AdaLoRA and LoRA mean differently
        warnings.simplefilter("ignore")
        adapted: nn.Module = peft.PeftModel.from_pretrained(model, folder)
    return adapted
