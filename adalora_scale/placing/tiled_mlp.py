"""Long rows: a block's MLP on one part of the sequence after the other, so that its wide tensors are never there whole.

An MLP works on every token by itself, so a part of the sequence gives a part of the output. In the backward pass every
part is computed again (torch's non-reentrant checkpoint), and what it needs is freed before the next one. Gradients of
parameters are sums over parts that autograd makes before anybody sees them: every engine gets one gradient a parameter,
as without tiles. What tiling costs is the MLP's forward once more.

Source: Snowflake's ALST (arXiv 2506.13996, "Tiled MLP") and `deepspeed.runtime.sequence_parallel.ulysses_sp.TiledMLP`,
which accumulates gradients part by part instead and has to tell each engine which one is the last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.errors import Unsupported

NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "ff")
"""What models call the MLP of a block."""
KEY = "training.tiled_mlp"
_TRIED = 8
"""Tokens on which it is seen that the parts give what the whole gives."""


def tile_mlps(model: nn.Module, tiles: int) -> list[nn.Module]:
    """Let every block's MLP work on `tiles` parts of the sequence in turn, in place, and return these MLPs.

    A sequence of fewer tokens than tiles is left whole (generation's, one token at a time).

    Args:
        model: any transformers model, sharded or not, with its adapters or without.
        tiles: parts; 1 leaves all as it is.

    Raises:
        Unsupported: the blocks have no MLP of their own, or a router that wants to see whole batches.
    """
    if tiles == 1:
        return []
    name = type(model).__name__
    settings: Any = getattr(model, "config", None)
    if getattr(getattr(settings, "get_text_config", lambda: settings)(), "output_router_logits", False):
        raise Unsupported(
            f"{KEY}={tiles} does not go with output_router_logits of {name}: the router's loss is over whole batches; "
            f"remove one of them."
        )
    found = []
    for block in transformer_blocks(model):
        own = [child for leaf, child in block.named_children() if leaf in NAMES and _computes(child)]
        if len(own) == 1:
            found.append(own[0])
    if not found:
        raise Unsupported(
            f"{KEY}={tiles}: the blocks of {name} have no MLP of their own ({', '.join(NAMES)}); remove it."
        )
    for mlp in found:
        mlp.forward = _Tiled(mlp, tiles)
    return found


def tiled(model: nn.Module) -> dict[nn.Module, int]:
    """Return the MLPs that work in parts, and in how many."""
    forwards = {module: vars(module).get("forward") for module in model.modules()}
    return {module: forward.tiles for module, forward in forwards.items() if isinstance(forward, _Tiled)}


def _computes(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList | nn.ModuleDict)


class _Tiled:
    """The forward of one MLP.

    Args:
        mlp: the module.
        tiles: parts of the sequence.
    """

    def __init__(self, mlp: nn.Module, tiles: int) -> None:
        self._mlp, self._whole, self.tiles = mlp, mlp.forward, tiles
        self._seen = False

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not isinstance(x, Tensor) or x.dim() < 2:
            raise Unsupported(f"{KEY}: {type(self._mlp).__name__} takes more than its tokens; remove it.")
        if x.shape[-2] < self.tiles:
            return self._whole(x)
        if not self._seen:
            self._seen = True
            self._require_same(x.detach())
        parts = x.chunk(self.tiles, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([self._part(part) for part in parts], dim=-2)
        return torch.cat([checkpoint(self._part, part, use_reentrant=False) for part in parts], dim=-2)

    def _part(self, part: Tensor) -> Any:
        return self._whole(part.contiguous())  # of several sequences it is not; GPT-2's layers take views

    @torch.no_grad()
    def _require_same(self, x: Tensor) -> None:
        """See on few tokens that the module works on each by itself; without dropout, which draws anew.

        Raises:
            Unsupported: it does not.
        """
        few = x[..., : min(_TRIED, x.shape[-2]), :]
        training = {module: module.training for module in self._mlp.modules()}
        self._mlp.eval()
        try:
            whole = self._part(few)
            parts = [self._part(part) for part in few.split(max(few.shape[-2] // 2, 1), dim=-2)]
        finally:
            for module, mode in training.items():
                module.training = mode
        if isinstance(whole, Tensor) and whole.shape == few.shape:
            together = torch.cat(parts, dim=-2)
            # Sums of other shapes round otherwise; a module that mixes tokens differs by as much as it gives.
            if isinstance(whole, FakeTensor):  # a plan's, which has shapes alone
                return
            tolerance = 16 * torch.finfo(whole.dtype).eps * whole.abs().max().clamp_min(1e-30)
            if bool(((whole - together).abs() <= tolerance).all()) or not bool(whole.isfinite().all()):
                return
        raise Unsupported(
            f"{KEY}: {type(self._mlp).__name__} does not work on each token by itself, or gives something else than a "
            f"tensor of its input's shape; remove it."
        )
