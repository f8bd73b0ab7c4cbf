"""`model.save_pretrained` of a model with adapters writes them, never the frozen base under the names of its wrappers.

transformers' and TRL's trainers save through it (`trainer.save_model`, checkpoints). They call it on one process, with
a state_dict where they gathered one, so nothing here is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora_scale.adalora.injection import plain_name
from adalora_scale.errors import Unsupported
from adalora_scale.export.whole_adapter import WholeAdapter, collected

Ready = Callable[[], WholeAdapter | None]


class AdapterSaver:
    """Stands in for one model's `save_pretrained`.

    Args:
        model: with adapters, not wrapped.
        ready: gives the adapter as all ranks put it together at this very step, if they did: one rank cannot read
            what an engine shards, or keeps in float32 beside what the forward computes with.
    """

    def __init__(self, model: nn.Module, ready: Ready | None = None) -> None:
        self.model = model
        self.ready = ready

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **unused: Any,
    ) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`.

        Args:
            save_directory: where.
            is_main_process: only this one writes.
            state_dict: the whole model's, where the trainer gathered one.
            unused: transformers' further keys; they say how a base is split over files, and none is written.

        Raises:
            Unsupported: this rank cannot read the whole adapter.
            UserError: the disk is full or the folder cannot be written.
        """
        if not is_main_process:
            return
        whole = self.ready() if self.ready is not None and not is_readable(self.model) else None
        whole = whole or collected(self.model, self._reader(state_dict or {}))
        if whole is not None:
            whole.write(save_directory)
            whole.name_state(save_directory)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles of the model leave the trainer out."""
        return {"model": self.model, "ready": None}

    def _reader(self, state_dict: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        named = [
            *self.model.named_parameters(remove_duplicate=False),
            *self.model.named_buffers(remove_duplicate=False),
        ]
        names = {id(tensor): plain_name(name) for name, tensor in named}
        given = {plain_name(name): value for name, value in state_dict.items()}

        def read(tensor: Tensor) -> Tensor:
            value = tensor if _is_whole(tensor) else given.get(names.get(id(tensor), ""))
            if value is None or not _is_whole(value):
                raise Unsupported(
                    f"model.save_pretrained on one rank cannot read '{names.get(id(tensor))}', which is sharded or in "
                    f"fewer bits than its master weights; call adalora_scale.save_adapter(model, folder) on every rank."
                )
            return value.detach().cpu()

        return read


def save_adapter_alone(model: nn.Module, ready: Ready | None = None) -> None:
    """Let `model.save_pretrained(folder)` write the adapter alone, in place; other models stay as they are.

    Args:
        model: with adapters, not wrapped.
        ready: see `AdapterSaver`.
    """
    if callable(getattr(type(model), "save_pretrained", None)):
        model.save_pretrained = AdapterSaver(model, ready)  # type: ignore[assignment]  # the stub knows only tensors


def is_readable(model: nn.Module) -> bool:
    """Whether each rank holds all that a model trains, whole and in float32."""
    return all(_is_whole(parameter) for parameter in model.parameters() if parameter.requires_grad)


def _is_whole(tensor: Tensor) -> bool:
    sharded = isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")
    return not sharded and (tensor.dtype == torch.float32 or not tensor.is_floating_point())
