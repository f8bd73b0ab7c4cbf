"""Which modules of a model get an adapter, and which are trained in full: names, by PEFT's rule."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.adaptables import adaptable_or_none, is_linear, sides
from adalora_scale.adalora.recorded import recorded
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError, nearest
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import is_experts, why_not_split
from adalora_scale.experts.routers import routers
from adalora_scale.quantization.called import computes_linear, weights_read

ALL_LINEAR = "all-linear"

_NO_MATRICES = re.compile(r"(^|_)(tokens?|embeds?|embeddings?|emb|pos|positions?|latents?|quer(y|ies)|bias)$")
"""What a tensor of several dimensions is called that no input is multiplied by: class tokens, tables of positions."""


def find_targets(model: nn.Module, config: AdaLoraConfig) -> list[str]:
    """Return the names of the modules to adapt, in module order.

    Args:
        model: with its experts split (`split_all_experts`), so that their projections are modules.
        config: the method's options.

    Raises:
        UserError: a pattern matches nothing, or `all-linear` would leave expert tensors behind.
        Unsupported: a named target cannot be adapted.
    """
    names = [name for name, _ in model.named_modules() if name]
    excluded = _matches(names, config.exclude_modules, "adalora.exclude_modules") if config.exclude_modules else set()
    saved = set(modules_to_save(model, config))
    if config.target_modules == ALL_LINEAR:
        head = _output_head(model)
        linear = {name for name in names if is_linear(model.get_submodule(name))} - left_out(model).keys()
        selected = {name for name in linear if model.get_submodule(name) is not head and not is_inside(name, saved)}
        _refuse_unreachable_weights(model, excluded)
    else:
        _refuse_named_experts(model, config.target_modules)
        selected = _matches(names, config.target_modules, "adalora.target_modules")
    selected = {name for name in selected if not is_inside(name, excluded)}
    if config.layers_to_transform is not None:
        selected = _keep_layers(selected, config.layers_to_transform)
    targets = [name for name in names if name in selected]
    if not targets:
        raise UserError("adalora.target_modules selects no module after adalora.exclude_modules was applied.")
    read = weights_read(model) if config.target_modules != ALL_LINEAR else {}
    chosen = routers(model) if config.target_modules != ALL_LINEAR else set()
    hooked = recorded(model, targets)
    for name in targets:
        if name in chosen and not _can_adapt(model.get_submodule(name)):
            raise Unsupported(
                f"cannot adapt '{name}': a {type(model.get_submodule(name)).__name__} chooses experts by a weight that "
                f"it multiplies itself. Leave it frozen (adalora.exclude_modules), or train it in full "
                f"(adalora.modules_to_save)."
            )
        if name in hooked:
            raise Unsupported(
                f"cannot adapt '{name}': transformers records its output as {hooked[name]}, and would record it "
                f"without the adapter. Leave it frozen (adalora.exclude_modules), or train it in full "
                f"(adalora.modules_to_save)."
            )
        sides(model.get_submodule(name))
        if name in read and (is_linear(model.get_submodule(name)) or not read[name].also_called):
            raise Unsupported(
                f"cannot adapt '{name}': {read[name]} and would leave the adapter out. Exclude it with "
                f"adalora.exclude_modules."
            )
        if is_inside(name, saved):
            named = set(modules_to_save(model, config, tied=False))
            shares = "" if is_inside(name, named) else " (it shares a weight with one that is named there)"
            raise UserError(
                f"'{name}' is in both adalora.target_modules and adalora.modules_to_save{shares}; keep it in one of "
                f"them."
            )
    return targets


def _can_adapt(router: nn.Module) -> bool:
    return adaptable_or_none(router) is not None and not _has_own_forward(router)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a linear layer by its class computes something else."""
    return isinstance(module, nn.Linear | Conv1D) and not computes_linear(module)


def left_out(model: nn.Module) -> dict[str, str]:
    """Return name → why, of every linear layer that `all-linear` leaves out: a router's, or no adapter would act."""
    read = {name: str(reason) for name, reason in weights_read(model).items()}
    chosen = routers(model)
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_linear(module) and name in read:
            found[name] = read[name]
        elif _has_own_forward(module):
            found[name] = f"{type(module).__name__} has a forward of its own"
        elif is_linear(module) and is_inside(name, chosen):
            found[name] = "it is a router's, which stays frozen unless adalora.target_modules names it"
    return found


def modules_to_save(model: nn.Module, config: AdaLoraConfig, *, tied: bool = True) -> list[str]:
    """Return the full names of the modules trained in full, in module order.

    Args:
        model: with or without adapters.
        config: the method's options.
        tied: also name the modules that share a weight with one of these (an output head tied to its embedding): they
            are trained with it, and whoever opens the adapter must give them the same weight.

    Raises:
        UserError: a name in modules_to_save matches nothing.
    """
    if not config.modules_to_save:
        return []
    names = [name for name, _ in model.named_modules() if name]
    matched = _matches(names, config.modules_to_save, "adalora.modules_to_save")
    if tied:
        trained = {id(parameter) for name in matched for parameter in model.get_submodule(name).parameters()}
        matched |= {
            name
            for name, module in model.named_modules()
            if not is_inside(name, matched) and any(id(p) in trained for p in module.parameters(recurse=False))
        }
    return [name for name in names if name in matched]


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None


def is_inside(name: str, parents: Iterable[str]) -> bool:
    """Return whether a module or parameter is one of `parents` or below one."""
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _matches(names: list[str], patterns: list[str] | str, key: str) -> set[str]:
    """Names selected by PEFT's rule: a list holds name endings, a string is one regex over the full name."""
    if isinstance(patterns, str):
        try:
            regex = re.compile(patterns)
        except re.error as error:
            raise UserError(f"{key}: '{patterns}' is not a valid regular expression ({error}).") from None
        found = {name for name in names if regex.fullmatch(name)}
        if not found:
            raise UserError(
                f"{key}: the regular expression '{patterns}' matches no module (it must match the full name, such as "
                f"'{names[-1]}'). Use a list for name endings."
            )
        return found
    result: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _ends(name, [pattern])}
        if not found:
            raise UserError(
                f"{key}: '{pattern}' matches no module.{nearest(pattern, {n.split('.')[-1] for n in names})}"
            )
        result |= found
    return result


def _keep_layers(names: set[str], layers: list[int] | int) -> set[str]:
    wanted = {layers} if isinstance(layers, int) else set(layers)
    index = {name: int(m.group(1)) for name in names if (m := re.search(r"\.(\d+)\.", name))}
    missing = wanted - set(index.values())
    if missing:
        raise UserError(f"adalora.layers_to_transform: layer {min(missing)} has no target module in this model.")
    return {name for name, layer in index.items() if layer in wanted}


def _refuse_unreachable_weights(model: nn.Module, excluded: set[str]) -> None:
    """`all-linear` promises all linear weights; experts in one 3-D tensor that nothing splits would be left out."""
    for name, parameter_name, parameter in expert_tensors(model):
        if not is_inside(name, excluded):
            reason = why_not_split(model.get_submodule(name))
            raise UserError(
                f"adalora.target_modules=all-linear cannot reach '{name}.{parameter_name}' "
                f"(a {parameter.dim()}-D expert tensor){f': {reason}' if reason else ''}. Add '{name.split('.')[-1]}' "
                f"to adalora.exclude_modules to leave it frozen, or name the linear layers to adapt."
            )


def _refuse_named_experts(model: nn.Module, patterns: list[str] | str) -> None:
    """Say why an expert tensor that was named is no module, which "matches nothing" would not."""
    for name, leaf, parameter in expert_tensors(model):
        module, full = model.get_submodule(name), f"{name}.{leaf}"
        named = re.fullmatch(patterns, full) if isinstance(patterns, str) else _ends(full, patterns)
        if named:
            reason = why_not_split(module) or f"{type(module).__name__} is of no kind of experts that is known here"
            raise Unsupported(f"cannot adapt '{full}' (a {parameter.dim()}-D expert tensor): {reason}.")


def _ends(full: str, patterns: Iterable[str]) -> bool:
    return any(full == pattern or full.endswith("." + pattern) for pattern in patterns)


def expert_tensors(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield (module name, parameter name, parameter) of weights that hold several matrices in one tensor.

    Convolutions are none, nor are class tokens and tables of positions, which are added and not multiplied by; nor what
    `split_experts` has made a layer of.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | ParametrizationList | ExpertLinear):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            shape = whole_shape(parameter)
            if len(shape) < 3 or _NO_MATRICES.search(parameter_name):
                continue
            if shape[0] > 1 or is_experts(module):  # a mixture of one cannot be split, but is a weight
                yield name, parameter_name, parameter


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Return a parameter's shape, also where ZeRO-3 has partitioned it."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
