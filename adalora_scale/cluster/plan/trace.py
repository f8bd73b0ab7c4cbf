"""One training step of the real model under fake tensors: what every block leaves behind, and where memory peaks.

The model is built with two blocks at full width; every block of a transformer has the same shapes, so a third would
leave what the second left. Fake tensors have shapes and storages and no data: the operations of the real forward, loss
and backward run, checkpointing included, and the bytes of every storage are counted from its making to its end.
Parameters, and gradients once they are complete, are counted elsewhere.

What fake tensors on the CPU cannot show is added by `memory.py`: the workspace of a fused 4-bit product.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trl.kernels import chunked_logprob

from adalora_scale.cluster.plan.model import build, is_flash
from adalora_scale.cluster.plan.request import Request
from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.errors import Unsupported
from adalora_scale.tasks.registry import find_task

BLOCKS = 2
"""Blocks of the traced model."""


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch, beside weights and gradients."""

    per_block: int
    """What a block's forward leaves for its backward."""
    outside: int
    """What the embeddings, the mask and the rotary tables leave."""
    forward_peak: int
    """What a block's forward needs on top, at its worst."""
    loss_peak: int
    """What head and loss need on top of everything left, forward and backward."""
    backward_peak: int
    """What a block's backward needs on top, the computing again included."""

    def transient(self) -> int:
        """The largest of the peaks; they do not coincide."""
        return max(self.forward_peak, self.loss_peak, self.backward_peak)

    def total(self, blocks: int) -> int:
        """The most that a step needs with so many blocks."""
        return self.outside + blocks * self.per_block + self.transient()


def trace_step(
    request: Request,
    *,
    sequences: int,
    checkpointing: bool,
    autocast: bool,
    hooked: bool = False,
    gpu: bool = True,
    model: Any = None,
) -> Activations:
    """Trace one micro-batch.

    Args:
        request: what model, sequence length and precision.
        sequences: the micro-batch.
        checkpointing: compute blocks again in the backward pass.
        autocast: float32 adapters and torch's autocast (one process, DDP); else every weight has the compute dtype, as
            FSDP2 and DeepSpeed make it.
        hooked: every layer is called through hooks, as ZeRO-3 has it; else a product and its update are one function.
        gpu: as kernels on a GPU need memory; else as on the CPU.
        model: two blocks with other adapters than ours, to compare with; None: the run's own.
    """
    model = build(request, layers=BLOCKS) if model is None else model
    if request.bf16 and not autocast:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    for module in model.modules() if hooked else ():
        module.register_forward_hook(lambda *_: None)
    task = find_task(request.config.task)
    task.prepare_trace(model, whole_logits=request.whole_logits)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        length, masked = request.config.data.max_length, not is_flash(request.config.model.attn_implementation)
        inputs = task.trace_batch(sequences, length, whole_logits=request.whole_logits, masked=masked)
        cast = torch.autocast("cpu", torch.bfloat16) if request.bf16 and autocast else nullcontext()
        try:
            with _tiles_in_place() if gpu else nullcontext():
                return _run(model, inputs, cast)
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise Unsupported(
                f"cannot plan a {model.config.model_type}: what its forward does depends on values, not on sizes alone "
                f"({error}); measure it with a few steps (run.json has peak_memory_by_rank)."
            ) from None


@contextlib.contextmanager
def _tiles_in_place() -> Iterator[None]:
    """Let TRL's tiled loss (1.16) take the memory it takes on a GPU: Triton kernels fold a tile of logits in place, and
    a product is added to float32 without a copy of its operands; its functions for the CPU make temporaries instead."""
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    before = {name: getattr(chunked_logprob, name) for name in names}
    for name in names:
        setattr(chunked_logprob, name, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(chunked_logprob, name, function)


def _run(model: Any, inputs: dict[str, Any], cast: Any) -> Activations:
    live = LiveBytes(own=[*model.parameters(), *model.buffers()])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda done: live.forget(done.grad))
    marks: list[tuple[int, int]] = []

    def mark() -> None:
        """Note (live, peak since the last mark)."""
        marks.append((live.now, live.peak))
        live.peak = live.now

    _wrap_blocks(model, mark)
    with live:
        mark()
        with cast:
            loss = model(**inputs).loss
        loss.backward()
        mark()
    # marks: start, after each block's forward, before each block's backward (last first), end
    (_, _), (first, _), (second, forward_peak), (_, loss_peak), (_, backward_peak), (_, rest_peak) = marks
    per_block = second - first
    return Activations(
        per_block=per_block,
        outside=max(second - BLOCKS * per_block, 0),
        forward_peak=max(forward_peak - second, 0),
        loss_peak=max(loss_peak - second, 0),
        # The first block's backward runs with one block's share less.
        backward_peak=max(backward_peak - second, rest_peak - first, 0),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed.

    Args:
        own: tensors that are not counted.
    """

    def __init__(self, own: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, tuple[Any, int]] = {}
        for tensor in own:
            self._watch(tensor.untyped_storage(), counted=False)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch(leaf.untyped_storage())
        return result

    def forget(self, tensor: Tensor | None) -> None:
        """Count a tensor no longer."""
        if tensor is not None and (key := tensor.untyped_storage()._cdata) in self._known:
            reference, size = self._known[key]
            self._known[key] = (reference, 0)
            self.now -= size

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Follow memory that was given or taken under a tensor, which is no operation."""
        key = storage._cdata
        if key not in self._known:
            self._watch(storage)
            return
        reference, before = self._known[key]
        self._known[key] = reference, storage.nbytes()
        self.now += storage.nbytes() - before
        self.peak = max(self.peak, self.now)

    def _watch(self, storage: torch.UntypedStorage, *, counted: bool = True) -> None:
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if counted else 0
            self._known[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
            self.now += size
            self.peak = max(self.peak, self.now)

    def _freed(self, key: int) -> None:
        _, size = self._known.pop(key)
        self.now -= size


class _Mark(torch.autograd.Function):
    """The identity; calls `mark` when a block's output is made and when its gradient arrives."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, mark: Callable[[], None]) -> Tensor:
        ctx.mark = mark
        mark()
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.mark()
        return gradients[0], None


class _Marked(nn.Module):
    """A block whose output carries a `_Mark`."""

    def __init__(self, block: nn.Module, mark: Callable[[], None]) -> None:
        super().__init__()
        self.block = block
        self.mark = mark

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        if isinstance(output, Tensor):
            return _Mark.apply(output, self.mark)
        return (_Mark.apply(output[0], self.mark), *output[1:])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # models read a block's attributes


def _wrap_blocks(model: nn.Module, mark: Callable[[], None]) -> None:
    blocks = {id(block) for block in transformer_blocks(model)}
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for index, child in enumerate(module):
                if id(child) in blocks:
                    module[index] = _Marked(child, mark)
