"""Which modules get an adapter, and putting it there."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import FACTORS, MATRIX, FileForm, is_linear, sides
from adalora_scale.adalora.base_digest import WeightsDigest, tensor_samples
from adalora_scale.adalora.fingerprint import fingerprint, sample
from adalora_scale.adalora.frozen import freeze
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.masters import keep_in_float32
from adalora_scale.adalora.targets import (
    ALL_LINEAR,
    expert_tensors,
    find_targets,
    is_inside,
    left_out,
    modules_to_save,
    whole_shape,
)
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.experts.routers import routers
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit

# What wrappers put into a module's own name: DDP in front of it, torch.compile and checkpointing anywhere.
_WRAPPERS_IN_FRONT = re.compile(r"^((module|_orig_mod)(\.|$))+")
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)(\.|$)")


@dataclass(frozen=True)
class Coverage:
    """How much of a model the adapters reach."""

    adapted_weights: int
    """Elements of the linear weights that have an adapter."""
    linear_weights: int
    """Elements of all linear weights, output head and 3-D expert tensors included."""
    adapter_parameters: int
    """Trainable elements in A, E and B."""
    other_trainable: int
    """Trainable elements outside the adapters (modules_to_save)."""
    matrices: int
    """Number of adapted matrices."""
    other_adapted: int = 0
    """Elements of the adapted weights that are of no linear layer (embeddings, convolutions)."""
    expert_matrices: int = 0
    """How many of `matrices` are experts'."""
    routers: int = 0
    """Number of routers without an adapter that are not trained in full either."""

    def __str__(self) -> str:
        share = self.adapted_weights / max(self.linear_weights, 1)
        beside = f" and {self.other_adapted:,} weights of other layers" if self.other_adapted else ""
        extra = f" and {self.other_trainable:,} in modules_to_save" if self.other_trainable else ""
        experts = f" ({self.expert_matrices:,} of experts)" if self.expert_matrices else ""
        frozen = f"; {self.routers} router{'s' * (self.routers > 1)} frozen" if self.routers else ""
        return (
            f"AdaLoRA on {self.matrices} matrices{experts}: {share:.1%} of the linear weights{beside} adapted, "
            f"{self.adapter_parameters:,} adapter parameters{extra}{frozen}"
        )


@dataclass
class Injection:
    """What a model with adapters carries beside them, as its attribute `adalora`; its state_dict does not hold it."""

    config: AdaLoraConfig
    base_digests: dict[str, dict[str, str]]
    """Of the base, for adapter files to record."""
    base_fingerprint: str | None = None
    """Of the base as this rank holds it, for ranks to compare; None for an adapter that was loaded."""
    total_step: int | None = None
    """Steps of the run, for adapter files to record; None before there is an allocator."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Linear layers that `all-linear` left out, routers' or because an adapter on them would not act → why."""
    allocator: Callable[[], Any] | None = None
    """A weak reference to the allocator that is attached to an optimizer."""
    name: str = "default"
    """Of the adapter, where several are at hand (`export/switching.py`)."""

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of a model leave the allocator out: it holds the tensors of the first one."""
        return vars(self) | {"allocator": None}


def inject_adalora(
    model: nn.Module,
    config: AdaLoraConfig,
    *,
    base_fingerprint: str | None = None,
    base_digests: dict[str, dict[str, str]] | None = None,
) -> nn.Module:
    """Freeze `model`, wrap the target modules in `AdaLoraLayer` in place, and return the model.

    Experts of a mixture become layers of their own first (`experts/modules.py`), adapted or not.

    Modules in modules_to_save become trainable, in float32 whatever the base (`keep_in_float32`).

    Args:
        model: any module with layers of the types in `adaptables`, not yet sharded or wrapped.
        config: the method's options.
        base_fingerprint: of the base, from a loader that fills it in later; by default read off the model.
        base_digests: of the base's weights, likewise.

    Raises:
        UserError: a pattern matches nothing, `all-linear` meets weights it cannot adapt, or adapters are already there.
        Unsupported: a pattern matches a layer that cannot be adapted.
    """
    if any(True for _ in adapter_layers(model)):
        raise UserError("the model already has AdaLoRA layers; inject into a fresh base model.")
    split_all_experts(model)
    targets = find_targets(model, config)
    samples = [sample(name, cast(Tensor, model.get_submodule(name).weight).detach()) for name in targets]
    if base_digests is None:
        base_digests = digest_base(model, targets, modules_to_save(model, config))
    passed_over = left_out(model) if config.target_modules == ALL_LINEAR else {}
    freeze(model, modules_to_save(model, config))
    wrappers: dict[nn.Module, AdaLoraLayer] = {}
    seed = int(torch.randint(2**48, (1,), device="cpu"))
    for index, name in enumerate(targets):
        base = model.get_submodule(name)
        wrappers[base] = AdaLoraLayer(
            base,
            r=config.init_r,
            scaling=config.scaling,
            dropout=config.lora_dropout,
            init_weights=config.init_weights,
            init_std=config.init_std,
            seed=seed + index,
        )
    replace_modules(model, wrappers)
    for name in modules_to_save(model, config):
        saved = model.get_submodule(name)
        if any(isinstance(module, Linear4bit | ExpertLinear4bit) for module in saved.modules()):
            raise UserError(
                f"adalora.modules_to_save: '{name}' is in 4 bits and cannot be trained in full; load a checkpoint that "
                f"keeps it in 16 bits, or adapt it."
            )
        saved.requires_grad_(True)
    keep_in_float32(model, modules_to_save(model, config))
    mine = base_fingerprint or fingerprint(samples)
    attach_injection(model, Injection(config, base_digests, mine, left_out=passed_over))
    return model


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, AdaLoraLayer]]:
    """Yield (name, layer) in module order; names are those of the unwrapped model."""
    root = injected_module(model)
    for name, module in (root or model).named_modules():
        if isinstance(module, AdaLoraLayer):
            yield (plain_name(name) if root is None else _WRAPPERS.sub("", name).rstrip(".")), module


def file_forms(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return adapted module → how a file holds its update, as JSON values; matrices are left out."""
    forms: dict[str, FileForm] = {name: layer.form for name, layer in adapter_layers(model)}
    return {name: dataclasses.asdict(form) for name, form in forms.items() if form != MATRIX}


def attach_injection(model: nn.Module, injection: Injection) -> None:
    """Make `injection` the model's own."""
    model.adalora = injection  # type: ignore[assignment]  # a plain attribute; nn.Module's stub knows only tensors
    if callable(getattr(type(model), "save_pretrained", None)):
        model.save_pretrained = _refuse_whole_model  # type: ignore[assignment]


def _refuse_whole_model(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for transformers' `save_pretrained` until something that writes adapters does."""
    raise UserError(
        "model.save_pretrained would write the frozen base under names that nothing loads; call "
        "adalora_scale.save_adapter(model, folder), or train with AdaLoraCallback, after which it writes the adapter."
    )


def injected_module(model: nn.Module) -> nn.Module | None:
    """Return the module that `inject_adalora` was given, inside whatever wraps it now; None if there is no one such."""
    roots = [module for module in model.modules() if isinstance(vars(module).get("adalora"), Injection)]
    return roots[0] if len(roots) == 1 else None


def injection_of(model: nn.Module) -> Injection | None:
    """Return what a model, wrapped or not, carries beside its adapters; None if it has none."""
    root = injected_module(model)
    return None if root is None else cast(Injection, vars(root)["adalora"])


def plain_name(name: str) -> str:
    """Remove the parts that DDP, torch.compile and checkpoint wrappers add to a module's or parameter's name."""
    return _WRAPPERS.sub("", _WRAPPERS_IN_FRONT.sub("", name)).rstrip(".")


def digest_base(model: nn.Module, targets: Iterable[str], saved: Iterable[str]) -> dict[str, dict[str, str]]:
    """Return digests of a base model's weights, for adapters to record and to compare.

    Args:
        model: the base model, with or without adapters, before sharding.
        targets: names of the adapted layers.
        saved: names of the modules that are trained in full; they are no part of the base.
    """

    def look(module: nn.Module, leaf: str) -> tuple[tuple[int, ...], Tensor | None]:
        tensor = cast(Tensor, getattr(module, leaf))
        return tuple(tensor.shape), tensor_samples(tensor)

    return digest_places(model, targets, saved, look)


def digest_places(
    model: nn.Module,
    targets: Iterable[str],
    saved: Iterable[str],
    look: Callable[[nn.Module, str], tuple[tuple[int, ...], Tensor | None]],
) -> dict[str, dict[str, str]]:
    """Do what `digest_base` does with whatever `look` sees of (module, parameter's leaf): shape and samples."""
    embedding = None
    if callable(getter := getattr(model, "get_input_embeddings", None)):
        with contextlib.suppress(NotImplementedError):  # models without token embeddings
            embedding = getattr(getter(), "weight", None)
    kept = list(saved)
    digests = {"adapted": WeightsDigest(), "rest": WeightsDigest()}
    for name in targets:
        digests["adapted"].add(f"{name}.weight", *look(model.get_submodule(name), "weight"))
    for full, parameter in model.named_parameters():
        if not parameter.is_floating_point():  # a 4-bit layer's scales are none
            continue
        name = full.replace(".base_layer.", ".")
        if is_digested(name, parameter.dim(), kept) or (parameter is embedding and not is_inside(name, kept)):
            parent, _, leaf = full.rpartition(".")
            digests["rest"].add(name, *look(model.get_submodule(parent), leaf))
    return {part: result for part, digest in digests.items() if (result := digest.result())}


def is_digested(name: str, dimensions: int, saved: Iterable[str]) -> bool:
    """Return whether a parameter is one of the small ones that a base's digest covers beside the adapted weights."""
    return dimensions == 1 and "lora_" not in name and not is_inside(name, saved)


def coverage(model: nn.Module) -> Coverage:
    """Measure which share of the linear weights has an adapter.

    Args:
        model: with or without adapters, not sharded.

    Returns:
        Numbers of elements: `linear_weights`, `adapted_weights` of them, `other_adapted` of no linear layer,
        `adapter_parameters`, `other_trainable`; `matrices`, how many are adapted, `expert_matrices` of them experts';
        `routers`, how many of a mixture's are left frozen. As a string, one line.
    """
    adapted = other_adapted = linear = adapter = matrices = experts = 0
    owned: set[int] = set()
    for _, module in model.named_modules():
        if isinstance(module, AdaLoraLayer):
            weights = module.matrices * module.in_features * module.out_features
            adapted += weights if module.adaptable.linear else 0
            other_adapted += 0 if module.adaptable.linear else weights
            adapter += module.matrices * module.r * module.triplet_size
            owned |= {id(getattr(module, factor)) for factor in FACTORS}
            matrices += module.matrices
            experts += module.matrices if isinstance(module.base_layer, ExpertLinear | ExpertLinear4bit) else 0
        elif isinstance(module, Linear4bit):
            linear += math.prod(sides(module))
        elif isinstance(module, ExpertLinear4bit):
            linear += module.experts * math.prod(sides(module))
        elif is_linear(module):  # routers too
            linear += whole_shape(cast(nn.Parameter, module.weight)).numel()
    linear += sum(whole_shape(parameter).numel() for _, _, parameter in expert_tensors(model))
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in owned]
    other = sum(whole_shape(parameter).numel() for parameter in others)
    chosen = [model.get_submodule(name) for name in routers(model)]
    frozen = sum(not any(parameter.requires_grad for parameter in router.parameters()) for router in chosen)
    return Coverage(adapted, linear, adapter, other, matrices, other_adapted, experts, frozen)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace submodules everywhere: a layer shared under two names shares its replacement too."""
    for parent in list(model.modules()):
        for leaf, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, leaf, replacements[child])
    _leave_fused_path(model)


def _leave_fused_path(model: nn.Module) -> None:
    """Keep torch's encoder layers from multiplying by the weights themselves in evaluation, adapters left out."""
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerEncoder):
            continue
        if not any(isinstance(inner, AdaLoraLayer) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # "neither": looked at before the fused path is taken
        else:
            module.use_nested_tensor = False  # padded batches, which the fused path alone can take
