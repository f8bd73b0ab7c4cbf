"""Base models that stream from their files to where the engine keeps them; no rank ever holds a whole sharded model.

The model is built on the meta device, gets 4-bit layers and adapters there, is sharded, and only then receives its
weights: under FSDP2 each rank reads its own rows, under ZeRO-3 rank 0 reads block by block and DeepSpeed partitions
each block at once, elsewhere every rank holds the base whole, in 4 bits if asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.adalora.fingerprint import WeightSample, fingerprint, sample
from adalora_scale.adalora.injection import (
    coverage,
    digest_places,
    inject_adalora,
)
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.targets import expert_tensors, find_targets, modules_to_save
from adalora_scale.config import AdaLoraConfig, ModelConfig, RunConfig
from adalora_scale.engines.ranks import together
from adalora_scale.errors import UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.placing.new_rows import draw_rows
from adalora_scale.placing.progress import note, progress
from adalora_scale.placing.sampling import Samples, leading
from adalora_scale.quantization.base_files import FLOATS, BaseFiles
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.fill import copy_rows, draw_fresh, fill
from adalora_scale.quantization.functional import check_kernels
from adalora_scale.quantization.linear import Linear4bit, quantized_share
from adalora_scale.quantization.materialize import materialize, materialize_shards
from adalora_scale.quantization.memory import give_back_freed
from adalora_scale.quantization.plan import LoadingPlan, absent_tensors, make_plan
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.reading.base_config import check_base, foreign, said_of
from adalora_scale.tasks import building
from adalora_scale.tasks.registry import find_task
from adalora_scale.tasks.vocabulary import grow

Fresh = list[tuple[nn.Module, dict[str, nn.Parameter]]]


@dataclass
class Loading:
    """A model on the meta device on its way into memory."""

    model: nn.Module
    plan: LoadingPlan
    fresh: Fresh
    """Values of what the checkpoint does not hold."""
    device: torch.device
    """Where this rank computes, and quantises."""
    absent: list[str] = field(default_factory=list)
    """Names of the tensors that the checkpoint does not hold."""
    grown: dict[str, int] = field(default_factory=dict)
    """Tensors that were given rows (`tasks.vocabulary.grow`) → rows of the checkpoint."""


def is_streamed(config: ModelConfig) -> bool:
    """Whether this base must be loaded here rather than by `from_pretrained`: it is quantised now, or is already."""
    return config.load_in_4bit or _stored_quantization(shape_of_base(config)) is not None


def begin(
    config: RunConfig,
    *,
    device: torch.device,
    label_names: list[str] | None = None,
    new_heads: Callable[[nn.Module, list[str]], list[str]] = lambda _, __: [],
    rows: int | None = None,
    seed: int | None = None,
) -> Loading:
    """Build the base model without memory and check that its files fill it.

    Args:
        config: the run's.
        device: where this rank computes.
        label_names: names of the classes, for a classifier.
        new_heads: given a model and the names of the tensors that its checkpoint lacks, names the modules that it need
            not hold.
        rows: of the embedding and the output head, where the checkpoint's are too few.
        seed: of torch's generator before anything is drawn; None leaves it where building the model left it.

    Raises:
        UserError: the checkpoint is incomplete, damaged or another model's; a weight cannot be quantised.
        Unsupported: the architecture's weights have to be converted; bitsandbytes lacks a kernel.
    """
    model_config = shape_of_base(config.model)
    with said_of(config.model.model_name_or_path):
        checkpoint = BaseFiles.open(config.model.model_name_or_path, config.model.revision)
    dtype = _dtype(config.model, model_config, checkpoint)
    spec = quant_spec(config.model) if is_streamed(config.model) else None
    if spec is not None:
        check_kernels(spec, device, dtype)
    with foreign(f"model.model_name_or_path={config.model.model_name_or_path}"):
        model = build_on_meta(config, model_config, dtype, label_names)
        _take_generation_config(model, config)
    grown = grow(model, rows) if rows is not None else {}
    absent = absent_tensors(model, checkpoint)
    heads = new_heads(model, absent)
    plan = make_plan(
        model,
        checkpoint,
        dtype=dtype,
        spec=spec if config.model.load_in_4bit else None,
        compute_dtype=getattr(torch, config.model.bnb_4bit_compute_dtype),
        skip_modules=[*(config.model.bnb_4bit_skip_modules or []), *(config.adalora.modules_to_save or [])],
        new_heads=heads,
        grown=grown,
    )
    draw_rows(plan, grown, seed=config.training.get("seed", 42))
    if config.model.load_in_4bit and plan.stored_in_4bit:
        layers = (slot.module for slot in plan.slots)
        stored = next(layer.spec for layer in layers if isinstance(layer, Linear4bit | ExpertLinear4bit))
        note(f"the checkpoint is in 4 bits already, as {stored}; the run's own bnb_4bit options do not apply")
    if seed is not None:
        torch.manual_seed(seed)
    return Loading(model, plan, draw_fresh(plan, model), device, absent, grown)


def build_on_meta(
    config: RunConfig, model_config: PretrainedConfig, dtype: torch.dtype, label_names: list[str] | None = None
) -> nn.Module:
    """Build the run's model with its parameters on the meta device; buffers such as rotary frequencies are real.

    Experts are split: their projections are layers.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": config.model.trust_remote_code}
    if config.model.attn_implementation:
        options["attn_implementation"] = config.model.attn_implementation
    _stored_quantization(model_config)  # refuses other ones than 4 bits
    task = find_task(config.task)
    model = building.build_on_meta(task, model_config, label_names=label_names, **options)
    model.name_or_path = config.model.model_name_or_path  # type: ignore[assignment]  # as from_pretrained does
    _keep_float32(model, dtype)
    split_all_experts(model)
    return model.eval()


def _take_generation_config(model: nn.Module, config: RunConfig) -> None:
    """Read generation_config.json, which is the hub's to give where the base is; `plan` has no use for it."""
    if find_task(config.task).generates:
        with contextlib.suppress(OSError):  # there is none: transformers derives one from config.json
            model.generation_config = GenerationConfig.from_pretrained(  # type: ignore[assignment]
                config.model.model_name_or_path, revision=config.model.revision or "main"
            )


def quant_spec(config: ModelConfig) -> QuantSpec:
    """Return the 4-bit options of the `model:` section.

    Raises:
        UserError: a value that bitsandbytes has no kernel for.
    """
    return QuantSpec(
        quant_type=config.bnb_4bit_quant_type,
        blocksize=config.bnb_4bit_blocksize,
        double_quant=config.bnb_4bit_use_double_quant,
        compute_dtype=getattr(torch, config.bnb_4bit_compute_dtype),
    )


def load_whole(loading: Loading) -> nn.Module:
    """Fill the base on this rank's device, whole, and return it."""
    materialize(loading.model.modules(), loading.device, loading.plan.ties)
    with progress(loading.plan) as on_slot:
        fill(loading.plan, loading.plan.slots, device=loading.device, on_slot=on_slot)
    _fill_drawn(loading, loading.model)
    give_back_freed()
    return loading.model


def inject(loading: Loading, adalora: AdaLoraConfig) -> nn.Module:
    """Put adapters on the meta device around the base, whose fingerprint comes from its files."""
    targets, saved = find_targets(loading.model, adalora), modules_to_save(loading.model, adalora)
    return inject_adalora(
        loading.model,
        adalora,
        base_fingerprint=fingerprint(list(_samples(loading, adalora))),
        base_digests=digests(loading, targets, saved),
    )


def digests(loading: Loading, targets: Iterable[str], saved: Iterable[str]) -> dict[str, dict[str, str]]:
    """Do what `digest_base` does, from the files, before injection: weights count as they are before quantisation."""
    model, plan = loading.model, loading.plan
    sources = {(id(slot.module), slot.leaf): slot for slot in plan.slots}
    samples = Samples(plan.checkpoint)

    def look(module: nn.Module, leaf: str) -> tuple[tuple[int, ...], Tensor | None]:
        slot = sources.get((id(module), leaf))
        if slot is None or slot.parts:  # tied to another's, or stored in 4 bits
            return (), None
        seen = samples.of(slot.source)
        return plan.checkpoint.stored(slot.source).shape, None if seen is None else seen.to(plan.dtype)

    names = {name for name, _ in model.named_modules()}
    return digest_places(model, [target for target in targets if target in names], saved, look)


def load_sharded(loading: Loading, shard: Callable[[nn.Module], None], storage: torch.device) -> nn.Module:
    """Shard with FSDP2 first, then let every rank read its own rows; a collective call.

    Args:
        loading: with adapters.
        shard: applies `fully_shard` in place.
        storage: where shards are kept (the CPU under CPU offload).
    """
    shard(loading.model)
    materialize_shards(loading.model, storage, loading.device, loading.plan.ties)
    with progress(loading.plan) as on_slot:
        fill(loading.plan, loading.plan.slots, device=loading.device, on_slot=on_slot, together=together)
    _fill_drawn(loading, loading.model)
    give_back_freed()
    return loading.model


def load_partitioned(
    loading: Loading,
    blocks: list[nn.Module],
    partition: Callable[[list[nn.Parameter]], None],
    dtype: torch.dtype | None,
) -> nn.Module:
    """Let rank 0 read block by block, and DeepSpeed ZeRO-3 partition each at once; a collective call.

    Args:
        loading: with adapters.
        blocks: the transformer blocks; what is outside them comes first, module by module.
        partition: partitions parameters in place, with rank 0's values.
        dtype: what DeepSpeed computes in: it casts no model that is partitioned already; None keeps every dtype.
    """
    plan = loading.plan
    inside = {id(module) for block in blocks for module in block.modules()}
    # Embedding and head are the largest: they are whole for a moment while the rank's other partitions are not there.
    units = [[module] for module in loading.model.modules() if id(module) not in inside]
    units += [list(block.modules()) for block in blocks]
    reads = dist.get_rank() == 0
    with progress(loading.plan) as on_slot:
        for unit in units:
            materialize(unit, loading.device, plan.ties)
            members = {id(module) for module in unit}
            slots = [slot for slot in plan.slots if reads and id(slot.module) in members]
            together(partial(fill, plan, slots, device=loading.device, on_slot=on_slot))
            _fill_drawn(loading, unit)
            own = [parameter for module in unit for parameter in module.parameters(recurse=False)]
            for parameter in own:
                if dtype is not None and parameter.is_floating_point() and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.to(dtype)
            for buffer in _filled_buffers(unit):  # parameters are broadcast as they are partitioned
                dist.broadcast(buffer, src=0)
            partition(own)
            give_back_freed()
    return loading.model


def describe(model: nn.Module) -> str:
    """Return the line about the share of the base that is kept in 4 bits, and what looks as if it should be."""
    quantized, _ = quantized_share(model)
    line = f"4-bit base: {quantized / max(coverage(model).linear_weights, 1):.1%} of the linear weights quantised"
    experts = [name for name, module in model.named_modules() if isinstance(module, ExpertLinear)]
    experts += [f"{name}.{leaf}" for name, leaf, _ in expert_tensors(model)]
    if experts:
        line += f"; tensors of several matrices stay as they are: {experts[0]}{' …' * (len(experts) > 1)}"
    return line


def unquantized_linears(model: nn.Module) -> list[str]:
    """Name the linear layers that are not in 4 bits: transformers must leave them alone when it loads the result."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def _fill_drawn(loading: Loading, where: nn.Module | list[nn.Module]) -> None:
    """Fill adapters and new heads among `where`."""
    modules = list(where.modules()) if isinstance(where, nn.Module) else where
    members = {id(module) for module in modules}
    for module in modules:
        if isinstance(module, AdaLoraLayer):
            for name, value in zip(FACTORS, module.initial_factors(), strict=True):
                copy_rows(getattr(module, name), value, name)
    for head, values in loading.fresh:
        for prefix, part in head.named_modules():
            if id(part) in members:
                for leaf, parameter in part.named_parameters(recurse=False):
                    copy_rows(parameter, values[f"{prefix}.{leaf}" if prefix else leaf], leaf)


def _filled_buffers(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the buffers that come from the checkpoint: persistent ones, and the second level of 4-bit weights."""
    for module in modules:
        for leaf, buffer in module._buffers.items():
            stored = leaf not in module._non_persistent_buffers_set or isinstance(module, Linear4bit)
            if buffer is not None and stored and buffer.numel():
                yield buffer


def _samples(loading: Loading, adalora: AdaLoraConfig) -> Iterator[WeightSample]:
    """Look at the weights to adapt as `inject_adalora` would in memory: ranks, engines and loaders see the same."""
    sources = {(id(slot.module), slot.leaf): slot for slot in loading.plan.slots}
    checkpoint, dtype = loading.plan.checkpoint, loading.plan.dtype
    for name in find_targets(loading.model, adalora):
        module = loading.model.get_submodule(name)
        weight: Tensor = module.weight  # type: ignore[assignment]
        slot = sources.get((id(module), "weight"))
        seen = sample(name, weight)
        if slot is None:  # tied to another module's, which has been seen
            yield seen
            continue
        first = leading(checkpoint, slot.source)
        kept = first.to(dtype) if first.is_floating_point() else first
        in_4bit = isinstance(module, Linear4bit | ExpertLinear4bit)
        kind = f"{dtype} {module.spec}" if in_4bit else f"{seen.dtype}"
        shape = checkpoint.stored(slot.source).shape if in_4bit else seen.shape
        yield WeightSample(name, shape, kind, kept.tolist())


def shape_of_base(config: ModelConfig) -> PretrainedConfig:
    """Return the base's config.json as transformers reads it.

    Raises:
        UserError: it cannot be read.
    """
    with said_of(config.model_name_or_path):
        check_base(config.model_name_or_path, config.revision, attention=config.attn_implementation)
    with foreign(f"model.model_name_or_path={config.model_name_or_path}"):
        found: PretrainedConfig = AutoConfig.from_pretrained(
            config.model_name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return found


def _stored_quantization(config: PretrainedConfig) -> Any:
    """Return the checkpoint's own quantisation, if it is bitsandbytes' 4-bit one.

    Raises:
        UserError: it is another one.
    """
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    options = stored if isinstance(stored, dict) else stored.to_dict()
    if not options.get("load_in_4bit", options.get("_load_in_4bit", False)):
        method = options.get("quant_method", "unknown")
        raise UserError(
            f"the checkpoint is quantised with '{method}'; load a 16-bit checkpoint or a 4-bit one of bitsandbytes."
        )
    return options


def _dtype(config: ModelConfig, model_config: PretrainedConfig, checkpoint: BaseFiles) -> torch.dtype:
    if config.torch_dtype != "auto":
        return cast(torch.dtype, getattr(torch, config.torch_dtype))
    if isinstance(stated := getattr(model_config, "dtype", None), torch.dtype):
        return stated
    return next((FLOATS[t.dtype] for t in checkpoint.tensors.values() if t.dtype in FLOATS), torch.float32)


def _keep_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep in float32 what transformers keeps so when it loads a model in another dtype."""
    plan = model._get_dtype_plan(dtype)  # type: ignore[operator]  # PreTrainedModel's
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{leaf}" if name else leaf
            if any(entry in full.split(".") or entry == full for entry in plan) and parameter.dtype != torch.float32:
                module._parameters[leaf] = nn.Parameter(parameter.float(), requires_grad=parameter.requires_grad)
