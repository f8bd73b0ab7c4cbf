"""A frozen layer's product and the update on it, as one autograd function.

Left to autograd, the update is a second way beside the base's: another tensor of the output's size, the input's two
gradients as two tensors that are then added, and a dozen nodes. Here the update's products add onto what the base's
made, forward and backward. `AdaLoraLayer.plain` says the same in plain operations; it is what is computed wherever
this is not, and what this is tested against.

Sources: LoRAFusion (arXiv 2510.00206), which fuses the same products; peft/tuners/lora/layer.py for the plain form.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.nn.modules import module as hooked
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

_LINEAR = F.linear


class Product(ABC):
    """How a type of base layer multiplies its input."""

    kind: ClassVar[type[nn.Module]]
    """Whose forward it is; a subclass with another one is called."""

    def __init__(self) -> None:
        # Looked up once: some packages put a forward of theirs in the class's place, before this is imported or after.
        forward: Any = self.kind.forward
        own = getattr(forward, "__globals__", None) is vars(sys.modules[self.kind.__module__])
        self._forward = forward if own else None

    @abstractmethod
    def dtype(self, base: Any, frozen: Sequence[Tensor]) -> torch.dtype:
        """Return what it computes in."""

    @abstractmethod
    def frozen(self, base: Any) -> tuple[Tensor, ...]:
        """Return the tensors of the matrix."""

    @abstractmethod
    def multiply(self, base: Any, x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        """Return the layer's output, (tokens, out_features), for x (tokens, in_features), in memory of its own."""

    @abstractmethod
    def multiply_back(self, base: Any, gradient: Tensor, frozen: Sequence[Tensor]) -> Tensor:
        """Return ∂L/∂x, (tokens, in_features), of ∂L/∂y, (tokens, out_features), in memory of its own."""

    def fusible(self, base: nn.Module, x: Tensor) -> tuple[Tensor, ...] | None:
        """Return `frozen` where nothing but the product happens when the layer is called with x, all in one dtype.

        A hook may do what it likes (ZeRO-3 brings the weight in one), and what traces, replays or differentiates in
        other ways wants operations, not functions. This runs in every forward of every layer.
        """
        dtype = x.dtype
        if (
            type(base).forward is not self._forward
            or type(x) not in _KNOWN
            or "forward" in vars(base)
            or "parametrizations" in base._modules
            or base._forward_pre_hooks or base._forward_hooks or base._backward_pre_hooks or base._backward_hooks
            or hooked._has_any_global_hook()
            or not dtype.is_floating_point
            or autocast_dtype(x) not in (None, dtype)
            or not (x.dim() == 2 or x.is_contiguous())  # saved, it would keep what it is a part of
            or F.linear is not _LINEAR
            or torch._C._len_torch_function_stack()
            or (torch._C._len_torch_dispatch_stack() and _is_replayed())
            or torch.jit.is_tracing()
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
        ):  # fmt: skip
            return None
        frozen, bias = self.frozen(base), base.bias
        if self.dtype(base, frozen) is not dtype or not (bias is None or _plain(bias, dtype)):
            return None
        return frozen if all([_plain(tensor, dtype) for tensor in frozen]) else None


_KNOWN = (Tensor, nn.Parameter, FakeTensor)
"""Tensors whose operations are torch's own; others have their own ideas of a product."""


def _plain(tensor: Any, dtype: torch.dtype) -> bool:
    """Whether it is frozen and torch's own, of this dtype where it holds numbers."""
    return type(tensor) in _KNOWN and not tensor.requires_grad and tensor.dtype in (dtype, torch.uint8)


def _is_replayed() -> bool:
    """Whether selective checkpointing keeps what operations return, which then nothing may add to."""
    replaying = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)
    return any(isinstance(mode, replaying) for mode in _get_current_dispatch_mode_stack())


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return what autocast would compute a product of x in; None where it is off, or knows no such device (meta)."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def adapted(layer: Any, product: Product, x: Tensor) -> Tensor | None:
    """Return ``base(x) + s · ((x A) ⊙ E) Bᵀ``, (..., out_features); None where plain operations have to compute it.

    Args:
        layer: an `AdaLoraLayer`.
        product: its adaptable's.
        x: (..., in_features).
    """
    if torch.compiler.is_compiling():
        return None  # a compiler fuses by itself
    a = layer.lora_A
    if type(layer.dropout) is not nn.Identity or (torch.is_grad_enabled() and not a.requires_grad):
        return None  # the adapter's input is another than the base's; a frozen adapter's need not be kept
    base = layer.base_layer
    frozen = product.fusible(base, x)
    if frozen is None:
        return None
    y: Tensor = _Adapted.apply(product, base, layer.scaling, x, a, layer.lora_E, layer.lora_B, *frozen)
    return y


class _Adapted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        product: Product,
        base: Any,
        scaling: float,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        *frozen: Tensor,
    ) -> Tensor:
        dtype, flat = x.dtype, x.dim() == 2
        rows = x if flat else x.reshape(-1, a.shape[0])
        low_a, low_e, low_b = _in(dtype, a), _in(dtype, e * scaling), _in(dtype, b)
        inner = rows @ low_a
        y = product.multiply(base, rows, frozen, base.bias).addmm_(inner * low_e, low_b.T)
        if not flat:  # as matmul does: model code could not change what is a view to autograd in place
            y = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], b.shape[0]))
        ctx.product, ctx.base, ctx.scaling, ctx.frozen = product, base, scaling, len(frozen)
        kept = frozen if ctx.needs_input_grad[3] else ()
        ctx.save_for_backward(x, a, e, b, inner, low_a, low_e, low_b, *kept)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if autocast_dtype(gradient) is not None:  # a backward called under autocast: dtypes are the forward's
            with torch.autocast(gradient.device.type, enabled=False):
                return _Adapted.backward(ctx, gradient)
        x, a, e, b, inner, low_a, low_e, low_b, *frozen = ctx.saved_tensors
        needs_x, _, needs_e, needs_b = ctx.needs_input_grad[3:7]
        none = [None] * ctx.frozen
        if torch.is_grad_enabled():  # the gradient will be differentiated: by autograd, through plain operations
            return None, None, None, *_differentiable(ctx, gradient, (x, a, e, b), frozen), *none
        flat = gradient.dim() == 2
        rows = gradient if flat else gradient.reshape(-1, b.shape[0])
        outer = rows @ low_b  # (tokens, r): ∂L/∂(the product with E)
        of_x = of_e = of_b = None
        if needs_b:
            of_b = rows.T @ (inner * low_e)
        if needs_e:
            of_e = (outer * inner).sum(0, dtype=e.dtype).mul_(ctx.scaling)
        outer *= low_e
        of_a = (x if flat else x.reshape(-1, a.shape[0])).T @ outer
        if needs_x:
            of_x = ctx.product.multiply_back(ctx.base, rows, frozen).addmm_(outer, low_a.T)
            of_x = of_x if flat else of_x.view(x.shape)
        return None, None, None, of_x, of_a, of_e, of_b, *none


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _differentiable(
    ctx: Any, gradient: Tensor, inputs: tuple[Tensor, ...], frozen: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of x, A, E and B with a graph of their own.

    They are taken of aliases: what is upstream of the inputs, and hooks on them, is the outer backward's.
    """
    x, a, e, b = aliases = [tensor.view_as(tensor) for tensor in inputs]
    rows = x.reshape(-1, a.shape[0])
    update = ((rows @ _in(x.dtype, a)) * _in(x.dtype, e * ctx.scaling)) @ _in(x.dtype, b).T
    y = update + ctx.product.multiply(ctx.base, rows, frozen, None) if frozen else update
    needs = ctx.needs_input_grad[3:7]
    needed = [alias for alias, needed in zip(aliases, needs, strict=True) if needed]
    found = iter(torch.autograd.grad(y.view(gradient.shape), needed, gradient, create_graph=True))
    return [next(found) if needed else None for needed in needs]
