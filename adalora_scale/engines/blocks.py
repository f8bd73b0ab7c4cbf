"""Where a model's transformer blocks are."""

from __future__ import annotations

from torch import nn


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: what stands in the outermost ModuleLists, or in lists in these (Funnel's)."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if isinstance(block, nn.ModuleList):
                    found += transformer_blocks(nn.ModuleList([block]))
                elif any(True for _ in block.parameters()):
                    found.append(block)
        else:
            found += transformer_blocks(module)
    return found
