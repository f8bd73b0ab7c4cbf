"""A rank of each engine that shards: the model as the engine would hold it, and how its ranks share a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from adalora_scale.checkpoint.layout import Run
from adalora_scale.cluster.plan.model import build
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.shapes import model_config
from adalora_scale.cluster.plan.weights import own_engine
from adalora_scale.cluster.rehearsal.pretended import DEVICE
from adalora_scale.cluster.rehearsal.rank import Moments, Rehearsed, like, take_steps
from adalora_scale.cluster.rehearsal.saving import Layout
from adalora_scale.cluster.rehearsal.zero import rehearse_zero, zero_runs
from adalora_scale.engines import adapter_tensors
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.zero_place import Zero
from adalora_scale.errors import Unsupported
from adalora_scale.placing.absent import adalora_config_for

_MOMENTS = ("exp_avg", "exp_avg_sq")


def rehearse_rank(request: Request, *, half_layers: bool = False) -> Rehearsed:
    """Attach and step on the rank of the pretended group that this process is.

    Args:
        request: the question.
        half_layers: of a model of half the blocks.

    Raises:
        UserError, Unsupported: as `plan`, sharding and attaching; the engine holds every adapter whole on every rank.
    """
    engine = own_engine(request)
    layers = None
    if half_layers:
        layers = max(model_config(request.config.model).num_hidden_layers // 2, 1)
    model = build(request, layers).to(DEVICE)
    if isinstance(engine, Zero):
        return rehearse_zero(model, engine.stage, adalora_config_for(request.config, model))
    shard = engine.sharder(device_type=DEVICE, bf16=request.bf16)
    if shard is None:
        raise Unsupported(
            f"rehearse shows engines that shard adapters, and {engine.real} does not: every rank holds all of them, so "
            f"what it does is what one rank does. Use engine.name=fsdp2."
        )
    shard(model)
    return _by_hooks(model, request)


def _by_hooks(model: nn.Module, request: Request) -> Rehearsed:
    trained: list[Tensor] = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = Moments(trained)

    def give_gradients() -> None:
        for parameter in trained:
            parameter.grad = like(parameter)

    return take_steps(
        model,
        optimizer,
        optimizer,
        adalora_config_for(request.config, model),
        give_gradients=give_gradients,
        step_group=lambda group: optimizer.step(),
    )


def layout_of_rank(rehearsed: Rehearsed, request: Request) -> Layout:
    """Return how the ranks share the adapters, by the engine's rule; a rehearsed rank's own pieces must agree."""
    tensors = {tensor.name: tensor for tensor, _ in adapter_tensors(rehearsed.model)}
    order = [name for name in rehearsed.allocator.sharding.trained() if name in tensors]
    shapes = {name: tensors[name].shape for name in order}
    return layout_of(shapes, own_engine(request), request.gpus, rehearsed)


def layout_of(shapes: dict[str, tuple[int, ...]], engine: Engine, ranks: int, rehearsed: Rehearsed) -> Layout:
    """Return FSDP2's (equal rows a rank, the last ones fewer or none; of several copies the first writes) or ZeRO's.

    Args:
        shapes: tensor → whole shape.
        engine: with its options.
        ranks: of the run.
        rehearsed: for the names of the score's statistics.
    """
    options: Any = getattr(engine, "options", None)
    copies = 1 if options is None else options.replicate
    shards = ranks // copies
    runs: dict[str, Run] = {}
    for name, shape in shapes.items():
        each = -(-shape[0] // shards) * (shape[1] if len(shape) == 2 else 1)
        runs[name] = (0, each, each)
    if isinstance(engine, Zero):
        runs = zero_runs(shapes, engine.stage, ranks)
    statistics = rehearsed.allocator.score.statistics
    return Layout(
        world_size=ranks,
        shapes=shapes,
        runs=runs,
        copies=copies,
        kinds=("weight", *_MOMENTS, *statistics),
    )
