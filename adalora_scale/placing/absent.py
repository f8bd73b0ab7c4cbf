"""Weights that a checkpoint does not hold: trained and saved with the adapter, or refused.

Whatever is drawn at random and not saved is lost with the run, and the adapter with it. A classifier over a language
model has such layers by its nature: its head, and often a pooler or a projection in front of it. They are trained
beside the adapters. Anything else that lacks is an incomplete checkpoint.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from adalora_scale.adalora.targets import is_inside, modules_to_save
from adalora_scale.config import AdaLoraConfig, RunConfig
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import find_task
from adalora_scale.tasks.vocabulary import grown_modules

_POOLER = "pooler"


def adalora_config_for(
    config: RunConfig, model: nn.Module, absent: Sequence[str] = (), grown: Collection[str] = ()
) -> AdaLoraConfig:
    """Return the adalora section; unless the user named some, modules_to_save has all that is new for the task.

    Args:
        config: the run's.
        model: the base, without adapters.
        absent: names of its tensors that the checkpoint does not hold.
        grown: names of its tensors that were given more rows, whose modules are trained in full whatever was named.

    Raises:
        UserError: the task has a head and nobody can tell which module it is.
    """
    adalora = _with_new(config, model, absent)
    saved = modules_to_save(model, adalora)
    more = [name for name in grown_modules(grown) if not is_inside(name, saved)]
    return adalora.replace(modules_to_save=[*(adalora.modules_to_save or []), *more]) if more else adalora


def _with_new(config: RunConfig, model: nn.Module, absent: Sequence[str]) -> AdaLoraConfig:
    adalora, task = config.adalora, find_task(config.task)
    if adalora.modules_to_save is not None or not task.has_labels:
        return adalora
    beside = _new_modules(model, absent)
    try:
        heads = task.new_heads(model)
    except UserError:
        if not beside:
            raise
        heads = []
    new = {*heads, *beside, *task.opened_in_full(model)}
    names = [name for name, _ in model.named_modules() if name in new and not is_inside(name, new - {name})]
    return adalora.replace(modules_to_save=names)


def require_saved(model: nn.Module, adalora: AdaLoraConfig, absent: Sequence[str], given: Collection[str] = ()) -> None:
    """See that everything the checkpoint does not hold is trained and saved, or given by an adapter.

    Args:
        model: the base, without adapters.
        adalora: as `adalora_config_for` returns it.
        absent: names of tensors that the checkpoint does not hold.
        given: names of tensors that an adapter brings.

    Raises:
        UserError: something is not.
    """
    saved = modules_to_save(model, adalora)
    lost = [name for name in absent if not is_inside(name, saved) and name not in given]
    if not lost:
        return
    rest = f" and {len(lost) - 1} more tensors" if len(lost) > 1 else ""
    raise UserError(
        f"the checkpoint lacks '{lost[0]}'{rest} of {type(model).__name__}: drawn at random and not saved, it would be "
        f"lost. Use a checkpoint that is complete, or train it: add '{lost[0].rpartition('.')[0]}' to "
        f"adalora.modules_to_save."
    )


def require_openable(config: RunConfig, model: nn.Module, adalora: AdaLoraConfig) -> None:
    """See that an adapter has whole what PEFT looks for whole when it opens one of the task.

    Args:
        config: the run's.
        model: the base, without adapters.
        adalora: as `adalora_config_for` returns it.

    Raises:
        UserError: something is left out of modules_to_save.
    """
    saved = modules_to_save(model, adalora)
    for name in find_task(config.task).opened_in_full(model):
        if not is_inside(name, saved):
            raise UserError(
                f"adalora.modules_to_save leaves out '{name}', which PEFT takes for a part of the head, by its name: "
                f"it could not open the adapter. Add '{name}' to adalora.modules_to_save."
            )


def describe(absent: Sequence[str]) -> str:
    """Return the line that names what is drawn at random."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] or name for name in absent))
    rest = f" and {len(modules) - 3} more" if len(modules) > 3 else ""
    return f"not in the checkpoint, drawn at random, trained and saved: {', '.join(modules[:3])}{rest}"


def _new_modules(model: nn.Module, absent: Sequence[str]) -> list[str]:
    """Name what lacks as a whole beside the base: children of the model, and poolers; not layers or embeddings."""
    base = getattr(model, "base_model_prefix", "")
    beside = [name for name, _ in model.named_children() if name != base]
    poolers = [name for name, _ in model.named_modules() if name.split(".")[-1] == _POOLER and "." in name]
    lacking = set(absent)

    def lacks(name: str) -> bool:
        own = [f"{name}.{leaf}" for leaf, _ in model.get_submodule(name).named_parameters(remove_duplicate=False)]
        return bool(own) and lacking.issuperset(own)

    return [name for name in [*beside, *poolers] if lacks(name)]
