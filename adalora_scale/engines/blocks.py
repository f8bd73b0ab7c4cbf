"""Where a model's transformer blocks are."""

from __future__ import annotations

from torch import nn


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: what stands in the outermost ModuleLists."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            found += [block for block in module if any(True for _ in block.parameters())]
        else:
            found += transformer_blocks(module)
    return found
