"""DDP's `join()` lets ranks run out of batches; an optimizer step that sums over ranks cannot go on without them.

A rank that has joined repeats the collectives of DDP's forward and backward. It does not know of those inside our
optimizer step, so the ranks that still train would wait for it for ever.
"""

from __future__ import annotations

import gc
import weakref

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adalora_scale.engines.ranks import several_ranks
from adalora_scale.errors import Unsupported


class JoinWatch:
    """Sees whether the DDP module around a model is in a join context; made after wrapping.

    Args:
        model: the wrapped model, or the one that was wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._wrappers = [weakref.ref(wrapper) for wrapper in ddp_around(model)] if several_ranks() else []

    def require_none(self) -> None:
        """See that no join context is open, before this step's first collective.

        Raises:
            Unsupported: there is one.
        """
        for reference in self._wrappers:
            wrapper = reference()
            if wrapper is not None and wrapper._join_config.enable:
                raise Unsupported(
                    "DistributedDataParallel.join() (accelerate's join_uneven_inputs) is not supported: the optimizer "
                    "step sums over all ranks and would wait for those that ran out of batches. Give every rank the "
                    "same number of batches (drop_last=True, or pad; accelerate: even_batches=True) and leave it out."
                )


def ddp_around(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the DDP modules in or around a model."""
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if found:
        return found
    # DDP leaves no trace on the module that it wraps: look for a DDP object that holds this very one.
    everything = [thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)]
    return [wrapper for wrapper in everything if any(module is model for module in wrapper.modules())]
