"""More rows for a model's tables of tokens: the embedding, and the output head where there is one.

transformers' `resize_token_embeddings` says which tensors grow; what the new rows begin as is drawn here, because a
base may lie on the meta device or in shards, and every rank and engine must begin with the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.errors import Unsupported
from adalora_scale.messages import cause

MULTIPLE = 64
"""Rows are added up to a multiple of this, which tensor cores and sharding want."""
_SPREAD = 1e-9
"""Covariance of new rows as a share of the old ones', as in transformers' `resize_token_embeddings`."""
_PIECE = 4096
"""Rows that are read at a time."""


def rows_for(tokens: int) -> int:
    """Return the rows of a table that has one for each of `tokens` tokens."""
    return math.ceil(tokens / MULTIPLE) * MULTIPLE


def token_table(model: nn.Module) -> tuple[str, nn.Embedding] | None:
    """Return the name and the module of a model's embedding of tokens; None where it has none."""
    getter = getattr(model, "get_input_embeddings", None)
    try:
        table = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    if not isinstance(table, nn.Embedding):
        return None
    return next(((name, table) for name, module in model.named_modules() if module is table), None)


def grow(model: nn.Module, rows: int) -> dict[str, int]:
    """Give a model's embedding and output head `rows` rows, in place; the new ones hold no values of use yet.

    Args:
        model: of transformers, without adapters, in memory or on the meta device.
        rows: more than it has.

    Returns:
        name → rows until now, of every parameter that grew, under each of its names.

    Raises:
        Unsupported: it has no embedding of tokens, another table of as many tokens, or a head that cannot grow.
    """
    found = token_table(model)
    kind = type(model).__name__
    if found is None:
        raise Unsupported(f"model.resize_token_embeddings: {kind} has no embedding of tokens; remove the key.")
    had = found[1].num_embeddings
    before = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
    try:
        # Rows that are drawn here are replaced: the run's own generator must not notice.
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            model.resize_token_embeddings(rows, mean_resizing=False)  # type: ignore[operator]
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        said = cause(error)
        raise Unsupported(f"model.resize_token_embeddings: {kind} cannot be enlarged ({said}).") from None
    grown: dict[str, int] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.shape == before.get(name):
            continue
        old = before.get(name, torch.Size())
        if len(old) != parameter.dim() or old[1:] != parameter.shape[1:] or old[0] >= parameter.shape[0]:
            raise Unsupported(f"model.resize_token_embeddings: '{name}' of {kind} is no table with a row a token.")
        grown[name] = old[0]
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module.num_embeddings == had and f"{name}.weight" not in grown:
            raise Unsupported(
                f"model.resize_token_embeddings: '{name}' of {kind} is another table of tokens, which transformers "
                f"does not enlarge; name a tokenizer that fits, or enlarge the base by hand."
            )
    return grown


def grown_modules(grown: Iterable[str]) -> list[str]:
    """Return the names of the modules that parameters of `grow` belong to."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in grown))


@torch.no_grad()
def added_rows(read: Callable[[int, int], Tensor], rows: int, added: int, *, seed: int) -> Tensor:
    """Draw the rows that a table is given, (added, …): the mean of the old ones and a little of their spread.

    new = μ + √(1e-9 / n) · Z (X − μ) with Z standard normal has the distribution that transformers draws from, mean μ
    and covariance 1e-9 · cov(X), without that matrix: X (n, columns) is read twice in pieces and never is whole.

    Args:
        read: returns rows [start, stop) of the old table, in the dtype that the run has it in.
        rows: n.
        added: how many rows to draw.
        seed: the same on every rank.
    """
    starts = range(0, rows, _PIECE)
    total = sum((read(start, min(start + _PIECE, rows)).double().sum(0) for start in starts), torch.zeros(()))
    mean = total / rows  # (…)
    generator = torch.Generator().manual_seed(seed)
    spread = torch.zeros(added, *mean.shape, dtype=torch.float64)
    for start in starts:
        piece = read(start, min(start + _PIECE, rows))
        drawn = torch.randn(added, piece.shape[0], generator=generator, dtype=torch.float64)
        spread += torch.tensordot(drawn, piece.double() - mean, dims=1)
        dtype = piece.dtype
    return (mean + math.sqrt(_SPREAD / rows) * spread).to(dtype)


@torch.no_grad()
def grow_in_memory(model: nn.Module, rows: int, *, seed: int) -> dict[str, int]:
    """Do what `grow` does and draw the new rows of a model that is in memory.

    Raises:
        Unsupported: as `grow`.
    """
    grown = grow(model, rows)
    for name, parameter in model.named_parameters():  # a tied one once, by its first name
        if (old := grown.get(name)) is not None:
            values = parameter.detach()[:old].clone()
            parameter[old:] = added_rows(lambda a, b, old=values: old[a:b], old, parameter.shape[0] - old, seed=seed)  # type: ignore[misc]
    return grown


def fit_rows(model: nn.Module, shapes: Mapping[str, Any]) -> dict[str, int]:
    """Give a base the rows that an adapter's embedding has, in place, where those are more; the adapter fills them.

    Args:
        model: the base, without adapters.
        shapes: shape of every tensor that the adapter holds beside its factors, by its name in the model.

    Returns:
        As `grow`; empty where nothing had to grow.
    """
    found = token_table(model)
    if found is None or not callable(getattr(model, "resize_token_embeddings", None)):
        return {}
    name, table = found
    held = shapes.get(f"{name}.weight")
    if held is None or len(held) != 2 or held[0] <= table.num_embeddings or held[1] != table.embedding_dim:
        return {}
    return grow(model, int(held[0]))
