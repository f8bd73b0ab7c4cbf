"""Adapters of a model in memory: switched off for a while, merged into the base's weights, taken out again.

For models that one process holds whole. What a sum in a merged weight is, the exporter says (`export/merge.py`), so a
model that is merged here has the bits of a merged folder.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora_scale.adalora.adaptables import block
from adalora_scale.adalora.injection import adapter_layers, injected_module, injection_of, replace_modules
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.matrices import parts
from adalora_scale.adalora.targets import modules_to_save
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.modules import join_all_experts
from adalora_scale.export.merge import BLOCK
from adalora_scale.export.planned import added
from adalora_scale.export.tensor_files import DTYPE_NAMES

_ORIGINAL = "original_weight"
"""Attribute of a merged layer: the base's own parameter (shared with others), or a copy of its values on the host."""


@contextlib.contextmanager
def disable_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """Compute with the base alone inside the `with`, bit for bit; afterwards with the adapter again.

    Allowed while training too, for the logits of a reference model; the optimizer step looks at the adapter's own
    parameters and is the same.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.

    Raises:
        UserError: the model has no adapters, or they are merged.
        Unsupported: it is sharded, or has modules that were trained in full: their first weights are not kept.
    """
    layers = _layers(model, "disable_adapters")
    require_unmerged(model, "disable_adapters")
    _refuse_trained_modules(model, "disable_adapters")
    before = [layer.bypassed for layer in layers.values()]
    for layer in layers.values():
        layer.bypassed = True
    try:
        yield model
    finally:
        for layer, bypassed in zip(layers.values(), before, strict=True):
            layer.bypassed = bypassed


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Add ΔW to the base's weights in place, in their dtype, and return the model; adapters cost nothing after it.

    The weights as they were are kept on the host for `unmerge_adapters`. Where an embedding's weight is the output
    head's too, the two part, and `tie_word_embeddings` becomes false, as in a merged export.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.

    Raises:
        UserError: the model has no adapters, they are merged already, training is running, or a sum does not fit the
            weight's dtype; nothing is changed then.
        Unsupported: the model is sharded, a weight is in 4 bits, or it is shared with what cannot part from it.
    """
    layers = _layers(model, "merge_adapters")
    require_unmerged(model, "merge_adapters")
    require_no_training(model, "merge_adapters")
    _refuse_4bit(layers)
    root = injected_module(model) or model
    parting = {name for name, layer in layers.items() if layer.r and _is_shared(root, layer)}
    try:
        for name, layer in layers.items():
            _merge(name, layer, parts_from=root if name in parting else None)
    except UserError:
        _unmerge(root, layers)
        raise
    return model


@torch.no_grad()
def unmerge_adapters(model: nn.Module) -> nn.Module:
    """Give the base its own weights again, bit for bit, and let the adapters act beside them; return the model.

    Args:
        model: what `merge_adapters` returned.

    Raises:
        UserError: the adapters are not merged.
        Unsupported: the model is sharded.
    """
    layers = _layers(model, "unmerge_adapters")
    if not all(_ORIGINAL in vars(layer) for layer in layers.values()):
        raise UserError("unmerge_adapters: the adapters are not merged; call merge_adapters(model) first.")
    _unmerge(injected_module(model) or model, layers)
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merge, take the adapters out, and return the model: the base's class and names, with the merged weights.

    Modules that were trained in full stay as they were trained, in float32.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.

    Raises:
        UserError, Unsupported: as `merge_adapters`; adapters that are merged already are taken out as they are.
    """
    if not _are_merged(_layers(model, "merge_and_unload")):
        merge_adapters(model)
    require_no_training(model, "merge_and_unload")
    _take_out(model)
    return model


def unload(model: nn.Module) -> nn.Module:
    """Take the adapters out without merging, and return the model: the base, bit for bit.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.

    Raises:
        UserError: the model has no adapters, they are merged, or training is running.
        Unsupported: the model is sharded, or has modules that were trained in full: their first weights are not kept.
    """
    _layers(model, "unload")
    require_unmerged(model, "unload")
    require_no_training(model, "unload")
    _refuse_trained_modules(model, "unload")
    _take_out(model)
    return model


def require_no_training(model: nn.Module, call: str) -> None:
    """See that no optimizer is between its first and its last step with the adapters.

    Raises:
        UserError: it is.
    """
    injection = injection_of(model)
    allocator = injection.allocator() if injection is not None and injection.allocator is not None else None
    if allocator is not None and allocator.step < allocator.schedule.total_step:
        raise UserError(
            f"{call}: training is running (step {allocator.step} of {allocator.schedule.total_step}) and its optimizer "
            f"holds the adapters; save_adapter(model, folder), and load that onto a fresh base."
        )


def require_whole(model: nn.Module, call: str) -> None:
    """See that this process holds the model whole.

    Raises:
        Unsupported: an engine shards it.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise Unsupported(
                f"{call}: '{name}' is sharded over ranks; save the adapter, and then `adalora-scale export` merges it "
                f"without a GPU, or load_adapter puts it onto a base that one process holds."
            )


def _layers(model: nn.Module, call: str) -> dict[str, AdaLoraLayer]:
    layers = dict(adapter_layers(model))
    if not layers:
        raise UserError(f"{call}: the model has no AdaLoRA layers; load_adapter(model, folder) first.")
    require_whole(model, call)
    return layers


def _are_merged(layers: dict[str, AdaLoraLayer]) -> bool:
    return any(_ORIGINAL in vars(layer) for layer in layers.values())


def require_unmerged(model: nn.Module, call: str) -> None:
    """See that the adapters act beside the base's own weights.

    Raises:
        UserError: they are merged.
    """
    if _are_merged(dict(adapter_layers(model))):
        raise UserError(f"{call}: the adapters are merged into the base; call unmerge_adapters(model) first.")


def _refuse_trained_modules(model: nn.Module, call: str) -> None:
    injection = injection_of(model)
    trained = modules_to_save(model, injection.config) if injection is not None else []
    if trained:
        raise Unsupported(
            f"{call}: '{trained[0]}' was trained in full (modules_to_save) and its first weights are not kept; load "
            f"the base a second time."
        )


def _refuse_4bit(layers: dict[str, AdaLoraLayer]) -> None:
    if name := next((name for name, layer in layers.items() if not layer.weight.is_floating_point()), None):
        raise Unsupported(
            f"merge_adapters: the base weight of '{name}' is in 4 bits, which a sum does not fit; load the adapter "
            f"onto the 16-bit base, or use `adalora-scale export --format merged`, with --dequantise for the 4-bit "
            f"values."
        )


def _merge(name: str, layer: AdaLoraLayer, *, parts_from: nn.Module | None) -> None:
    """Put W + ΔW in the place of W: in a parameter of its own where it parts from the other side of a tie."""
    weight = layer.weight
    if not layer.r:
        vars(layer)[_ORIGINAL] = None
    elif parts_from is not None:
        merged = nn.Parameter(_sum(name, layer), requires_grad=False)
        vars(layer)[_ORIGINAL] = weight
        layer.base_layer.weight = merged
        _say_tied(parts_from, False)
    else:
        total = _sum(name, layer)
        vars(layer)[_ORIGINAL] = weight.detach().cpu().clone()
        weight.copy_(total)
    layer.bypassed = True


def _unmerge(root: nn.Module, layers: dict[str, AdaLoraLayer]) -> None:
    """Bring back what `_merge` kept, where it was called."""
    for layer in layers.values():
        if _ORIGINAL not in vars(layer):
            continue
        original = vars(layer).pop(_ORIGINAL)
        if isinstance(original, nn.Parameter):
            layer.base_layer.weight = original
            _say_tied(root, True)
        elif original is not None:
            layer.weight.copy_(original)
        layer.bypassed = False


def _sum(name: str, layer: AdaLoraLayer) -> Tensor:
    """Return W + ΔW, a block of rows at a time, as the exporter sums it."""
    weight = layer.weight.detach()
    total = torch.empty_like(weight, memory_format=torch.contiguous_format)
    wholes = weight.unbind(0) if layer.matrices > 1 else [weight]
    sums = total.unbind(0) if layer.matrices > 1 else [total]
    triplets = parts(layer.lora_A, layer.lora_E * layer.scaling, layer.lora_B, layer.matrices)
    for own, result, (a, e, b) in zip(wholes, sums, triplets, strict=True):
        rows, *rest = own.shape
        step = max(1, BLOCK // math.prod(rest))
        for start in range(0, rows, step):
            part = own[start : start + step]
            transposed = layer.adaptable.is_transposed(layer.base_layer)
            delta = block(a.T.contiguous(), e, b, start, start + len(part), transposed=transposed)
            result[start : start + step] = added(part, delta.view_as(part), DTYPE_NAMES[weight.dtype], name)
    return total


def _is_shared(root: nn.Module, layer: AdaLoraLayer) -> bool:
    """Whether the layer's weight is another module's too; only output head and embedding can part.

    Raises:
        Unsupported: it is that of something else.
    """
    head = getattr(root, "get_output_embeddings", lambda: None)()
    others = [
        (name, module)
        for name, module in root.named_modules()
        if module is not layer.base_layer and any(own is layer.weight for own in module._parameters.values())
    ]
    for name, module in others:
        sides = (layer, layer.base_layer, module, root.get_submodule(name.removesuffix(".base_layer")))
        if head is None or not any(side is head for side in sides):
            raise Unsupported(
                f"merge_adapters: an adapted weight is also that of '{name}', which is not the output head, so the two "
                f"cannot part; keep the adapter beside it."
            )
    return bool(others)


def _say_tied(root: nn.Module, tied: bool) -> None:
    config = getattr(root, "config", None)
    if hasattr(config, "tie_word_embeddings"):
        config.tie_word_embeddings = tied  # type: ignore[union-attr]


def _take_out(model: nn.Module) -> None:
    root = injected_module(model) or model
    layers = [layer for _, layer in adapter_layers(root)]
    replace_modules(root, {layer: layer.base_layer for layer in layers})
    join_all_experts(root)
    for attribute in ("adalora", "adalora_adapters", "save_pretrained"):
        vars(root).pop(attribute, None)
