"""Training on an engine as a user writes it by hand, without a trainer: `verify-engines` compares engines so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a hand-written loop brings."""

    model: nn.Module
    """With its adapters, on this rank's device, not wrapped."""
    optimizer: Callable[[nn.Module], Optimizer]
    """Makes the torch optimizer of a model's adapters."""
    ranks: int
    device: torch.device
    micro_batch: int
    """Sequences a rank works on at a time."""
    accumulation: int
    """Micro-batches an optimizer step."""
    max_grad_norm: float | None
    """Clip to it; None does not clip."""
    bf16: bool
    """Compute in bfloat16."""
    elements: int
    """Elements of all adapters."""


class ByHand:
    """A wrapped model with its optimizer: the loop of plain PyTorch, which engines change where they differ.

    Args:
        bench: the loop's.
        model: the wrapped model.
    """

    def __init__(self, bench: Bench, model: nn.Module) -> None:
        self._max_grad_norm = bench.max_grad_norm
        self.model: Any = model
        self.adapted: nn.Module = model
        """What RankAllocator takes."""
        self.optimizer: Optimizer = bench.optimizer(model)
        """The torch optimizer whose step changes the weights."""
        self.target: Any = self.optimizer
        """What `attach` takes."""

    def begin(self, *, last: bool) -> None:
        """Say before a micro-batch's forward whether it is the step's last, which reduces gradients over ranks."""

    def backward(self, loss: Tensor) -> None:
        """Take gradients of a micro-batch's share of the loss."""
        loss.backward()

    def step(self, *, last: bool) -> None:
        """Update the weights after the last micro-batch."""
        if not last:
            return
        if self._max_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Remove what the engine keeps in the process."""
