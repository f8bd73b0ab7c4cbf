"""A new run that goes on from a finished adapter: its function is there at step 0, and its ranks reopen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from adalora_scale.adalora.base_digest import same_base
from adalora_scale.adalora.injection import adapter_layers, digest_base, injection_of
from adalora_scale.adalora.matrices import Triplets, layer_among, matrix_names, stacked
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile


def check_start(directory: str | Path, config: AdaLoraConfig) -> AdapterFile:
    """Read the adapter that a run starts from, and see that its triplets fit in the run's.

    Raises:
        UserError: it cannot be read, or a matrix has more triplets than `config.init_r`.
        Unsupported: it is of another method.
    """
    adapter = AdapterFile(directory)
    # The file says how many triplets there are at most; only a matrix with too many is read.
    crowded = [name for name, shape in adapter.modules.items() if shape.rank > config.init_r]
    needed = {name: starting_triplets(adapter, name, 1.0)[1].numel() for name in crowded}
    largest = max(needed, key=lambda name: needed[name], default=None)
    if largest is not None and needed[largest] > config.init_r:
        raise UserError(
            f"model.adapter_path={directory}: '{largest}' has {needed[largest]} triplets, adalora.init_r is "
            f"{config.init_r}: some would be lost. Set adalora.init_r to at least {needed[largest]}."
        )
    return adapter


@torch.no_grad()
def start_from_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    base: dict[str, dict[str, str]] | None = None,
    own: Callable[[str], Tensor | None] | None = None,
) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Let an injected model start from an earlier adapter's function; call it on every rank, before sharding.

    The earlier triplets take the first places of every layer, with λ rescaled from the old scaling to the new one; the
    others begin as `init_weights` says, without an update. So the logits are the earlier adapter's, the ranks are
    init_r again, and the new budget prunes from there. Plain LoRA is brought into SVD form first.

    Args:
        model: what `inject_adalora` returned, in memory or on the meta device (then the factors are filled in later).
        directory: the earlier adapter: AdaLoRA or plain LoRA.
        base: digests of the model's base over the adapter's modules, where they cannot be seen in the model.
        own: reads a weight of the model's base by its name, where it cannot be seen in the model.

    Returns:
        (module, its parameters' values) of modules that were trained in full, for loaders that fill a model later.

    Raises:
        UserError: the adapter belongs to another base, adapts modules that the model does not, has more triplets than
            init_r, or other classes.
        Unsupported: it is of another method.
    """
    injection = injection_of(model)
    if injection is None:
        raise UserError("the model has no AdaLoRA layers; call inject_adalora(model, config) first.")
    adapter = check_start(directory, injection.config)
    layers = dict(adapter_layers(model))
    held: dict[str, list[str]] = {}
    for name, shape in adapter.modules.items():
        layer_name = layer_among(layers, name)
        held.setdefault(layer_name, []).append(name)
        layer = layers.get(layer_name)
        if layer is None:
            raise UserError(
                f"model.adapter_path={directory} adapts '{name}', which this run does not: its update would be lost. "
                f"Add it to adalora.target_modules."
            )
        if (layer.in_features, layer.out_features) != (shape.in_features, shape.out_features):
            raise UserError(
                f"model.adapter_path={directory} has ({shape.in_features}, {shape.out_features}) features for "
                f"'{name}', the model ({layer.in_features}, {layer.out_features}); it belongs to another base."
            )
    digests = digest_base(model, held, adapter.saved) if base is None else base
    if not same_base(adapter.record.get("base") or {}, digests):
        raise UserError(
            f"model.adapter_path={directory} was trained on another base model (shapes agree, weights differ); set "
            f"model.model_name_or_path to its own{f', {adapter.base}' if adapter.base else ''}."
        )
    adapter.require_own_copies(own or partial(_own_weight, model))
    heads = _heads(model, adapter)
    for name in held:
        layer = layers[name]
        layer.earlier = partial(_of_layer, adapter, matrix_names(name, layer.matrices), layer.scaling)
        layer.reset_adapter()
    for module, values in heads:
        for leaf, value in values.items():
            parameter = module.get_parameter(leaf)
            if not parameter.is_meta:
                parameter.copy_(value)
    return heads


def _of_layer(adapter: AdapterFile, matrices: list[str], scaling: float) -> Triplets:
    """Return A, E and B of a layer; a matrix of experts that the adapter leaves out has none."""
    found = {name: starting_triplets(adapter, name, scaling) for name in matrices if name in adapter.modules}
    if len(matrices) == 1:
        return found[matrices[0]]
    a, e, b = next(iter(found.values()))
    none = a[:, :0], e[:0], b[:, :0]
    each = [found.get(name, none) for name in matrices]
    return stacked(each, max(e.numel() for _, e, _ in each))


def starting_triplets(adapter: AdapterFile, module: str, scaling: float) -> Triplets:
    """Return A (in, k), E (k,) and B (out, k) of the earlier update under another scaling, zero λ left out."""
    raw = adapter.triplets(module)
    ratio = adapter.scaling(module) / scaling
    if adapter.method == "LORA":
        a, e, b = svd_form(raw.a, raw.b)
        return a, e * ratio, b
    kept = (raw.e != 0) & (raw.b != 0).any(0)  # LoRA's start has λ = 1 and B = 0
    return raw.a[kept].T, raw.e[kept] * ratio, raw.b[:, kept]


def svd_form(a: Tensor, b: Tensor) -> Triplets:
    """Return A (in, k), E (k,) and B (out, k) with orthonormal columns and B diag(E) Aᵀ = b a.

    Args:
        a: (r, in_features) float32.
        b: (out_features, r) float32; k leaves out triplets that are zero (padding).
    """
    kept = (a != 0).any(1) & (b != 0).any(0)
    left, upper = torch.linalg.qr(b[:, kept].double())
    right, lower = torch.linalg.qr(a[kept].double().T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    return (right @ vh.T).float(), s.float(), (left @ u).float()


def _own_weight(model: nn.Module, name: str) -> Tensor | None:
    module, _, leaf = name.rpartition(".")
    layer = dict(adapter_layers(model)).get(module)
    weight = getattr(model.get_submodule(module) if layer is None else layer.base_layer, leaf, None)
    return weight if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.is_meta else None


def _heads(model: nn.Module, adapter: AdapterFile) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Pair modules that were trained in full with their values; this run must train them too, or they would freeze."""
    labels, own = adapter.record.get("labels"), getattr(getattr(model, "config", None), "id2label", None)
    if isinstance(labels, list) and own and list(own.values()) != labels:
        raise UserError(
            f"model.adapter_path={adapter.directory} was trained on other classes ({labels[0]}, … {len(labels)} in "
            f"all) than this run's data has; train a new adapter, or use data with the same classes."
        )
    earlier, asked = adapter.record.get("problem_type"), getattr(getattr(model, "config", None), "problem_type", None)
    if earlier and asked and earlier != asked:
        raise UserError(
            f"model.adapter_path={adapter.directory} was trained for {earlier} and this run's labels are for {asked}; "
            f"set data.labels, or train a new adapter."
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules: dict[str, dict[str, nn.Parameter]] = {}
    for name, shape in adapter.others.items():
        parameter = parameters.get(name)
        if parameter is None or not parameter.requires_grad:
            raise UserError(
                f"model.adapter_path={adapter.directory} holds '{name}', which this run does not train; add its module "
                f"to adalora.modules_to_save."
            )
        if tuple(parameter.shape) != shape:
            raise UserError(
                f"model.adapter_path={adapter.directory} has shape {shape} for '{name}', the model "
                f"{tuple(parameter.shape)}; use data with the same classes, or another adapter."
            )
        parent, _, leaf = name.rpartition(".")
        value = adapter.other(name).to(parameter.dtype)
        modules.setdefault(parent, {})[leaf] = nn.Parameter(value, requires_grad=False)
    return [(model.get_submodule(parent), values) for parent, values in modules.items()]
