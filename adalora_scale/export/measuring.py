"""Whether an export's logits can be compared with the adapter's, and the comparison."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.errors import Unsupported
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.dequantise import Dequantised, experts_in_4_bits
from adalora_scale.export.fidelity import (
    Fidelity,
    available_memory,
    compare,
    load_float32,
    quiet_transformers,
    sample_batches,
)
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.export.request import Request
from adalora_scale.export.rounding import add_rounding
from adalora_scale.export.tensor_files import DTYPES
from adalora_scale.messages import cause
from adalora_scale.tasks.vocabulary import fit_rows

_HEADROOM = 1.5  # loading holds a tensor twice, computing needs activations


def num_labels(adapter: AdapterFile) -> int | None:
    """Read the number of classes off the head."""
    return adapter.task.label_count(adapter.others) if adapter.task else None


def why_not_measured(request: Request, adapter: AdapterFile, base: BaseCheckpoint | None) -> str | None:
    """Say why logits will not be compared; None where they will."""
    if request.format == "rank-pattern":
        return "a rank pattern has no weights"
    if request.fidelity is False:
        return "--no-fidelity"
    if base is None:
        return "the base model is not at hand; name it with --base"
    if (request.format != "merged" or adapter.method == "LORA") and importlib.util.find_spec("peft") is None:
        return "PEFT is not installed"
    if request.uniform and adapter.stacks and base.expert_tensors():
        return "the form is a LoRA an expert, which servers open and PEFT does not"
    if not request.dequantise and experts_in_4_bits(base) is not None:
        return "the base holds experts in 4 bits, which transformers does not load; name the 16-bit one with --base"
    inputs = getattr(base.model, "main_input_name", "input_ids")
    if inputs != "input_ids":
        return f"the model takes {inputs}, the samples are text"
    needed = 4 * sum(parameter.numel() for parameter in base.model.parameters())
    available = available_memory()
    if request.fidelity is None and available is not None and needed * _HEADROOM > available:
        sizes = f"the model in float32 takes {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free"
        return f"{sizes}; --fidelity does it anyway"
    return None


def samples(request: Request, adapter: AdapterFile, base: BaseCheckpoint) -> list[dict[str, Tensor]]:
    """Return model inputs of sample text."""
    return sample_batches([adapter.directory, base.directory], request.text, base.model.config)


def measure(
    request: Request,
    adapter: AdapterFile,
    base: BaseCheckpoint,
    quantised: Dequantised | None,
    batches: list[dict[str, Tensor]],
    written: Path,
    *,
    form_of: AdapterFile | None = None,
) -> Fidelity:
    """Compare what was written, still under its hidden name, with `adapter` on its base, both in float32.

    Args:
        request: what was asked for.
        adapter: the live side; `form_of` is what was written, where it is another one (it was pruned).
        base: both sides' base.
        quantised: its 4-bit side, where that is what was merged into.
        batches: model inputs.
        written: the folder.
    """
    options: dict[str, Any] = {"trust_remote_code": True} if request.trust_remote_code else {}
    labels = num_labels(adapter)
    head = options | ({"num_labels": labels, "ignore_mismatched_sizes": True} if labels is not None else {})

    def load_base() -> nn.Module:
        return enlarged(quantised.load_model() if quantised else load_float32(base.directory, base.model, **head))

    def enlarged(model: nn.Module) -> nn.Module:
        fit_rows(model, adapter.others)
        return model

    def load_exported() -> nn.Module:
        if request.format == "merged":
            return load_float32(written, base.model, **options)
        return _with_peft(enlarged(load_float32(base.directory, base.model, **head)), written)

    def with_adapter(model: nn.Module) -> nn.Module:
        if adapter.method == "LORA":
            return _with_peft(model, adapter.directory)
        return load_adapter(model, adapter.directory)

    def with_rounding(model: nn.Module) -> bool:
        return request.format == "merged" and form_of is None and not quantised and add_rounding(model, adapter, base)

    live = "the 4-bit base" if quantised else f"{base.directory}"
    with quiet_transformers():
        return compare(
            load_base,
            with_adapter,
            load_exported,
            batches,
            compared_with=f"the adapter on {live}",
            rounded=with_rounding,
            **({"noise": _coarsest(quantised)} if quantised and request.format == "merged" else {}),
        )


def _coarsest(quantised: Dequantised) -> float:
    """Return what rounding the merged weights may change, of the largest logit, where it cannot be computed apart."""
    dtypes = [DTYPES[name] for name in quantised.dtypes()]
    return max((8 * torch.finfo(dtype).eps for dtype in dtypes if dtype.itemsize < 4), default=1e-4)


def _with_peft(model: nn.Module, folder: Path) -> nn.Module:
    import peft

    with warnings.catch_warnings():  # about rank_pattern, which AdaLoRA and LoRA mean differently
        warnings.simplefilter("ignore")
        try:
            adapted: nn.Module = peft.PeftModel.from_pretrained(model, folder)
        except (KeyError, ValueError, RuntimeError) as error:
            said = cause(error)
            raise Unsupported(
                f"PEFT does not open this adapter on {type(model).__name__} ({type(error).__name__}: {said}); use "
                f"--format merged."
            ) from error
    return adapted
