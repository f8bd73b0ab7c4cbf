"""What a frozen base is: no weight of it moves, and no running statistic either."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def freeze(model: nn.Module, trained: Iterable[str]) -> None:
    """Freeze every weight, and the running statistics of every BatchNorm that is not trained in full.

    BatchNorm's running mean and variance are buffers that a forward in training mode changes, whatever requires_grad
    says, and no adapter holds them: the saved adapter over a fresh base would compute with other ones. So they stay the
    base's; training normalises by the batch's own statistics and evaluation by the running ones, as ever.

    Args:
        model: the base.
        trained: names of modules that are trained in full; theirs are saved with them.
    """
    model.requires_grad_(False)
    own = {id(inner) for name in trained for inner in model.get_submodule(name).modules()}
    for module in model.modules():
        if not isinstance(module, _NormBase) or not module.track_running_stats or id(module) in own:
            continue
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False  # looked at in training alone, where there are buffers
        else:
            module.momentum = 0.0  # InstanceNorm would leave its buffers in evaluation too
