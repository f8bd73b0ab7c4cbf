"""Everything engines differ in: one object an engine, registered by name, which the rest of the package asks.

`engine.py` says what is asked, `registry.py` finds the engine. What an engine holds of the adapters is its `Sharding`:
everything the controller does is the same on every engine; a `Sharding` only says which pieces this rank's optimizer
owns, where their reduced gradients are, and how to sum a small buffer over the ranks that hold different pieces.
"""

from __future__ import annotations

from adalora_scale.engines.engine import Engine
from adalora_scale.engines.pieces import Piece, PieceState, trained_parameters, whole_shape
from adalora_scale.engines.registry import base_optimizer
from adalora_scale.engines.span import AdapterTensor, Sharding, Span, adapter_tensors

__all__ = [
    "AdapterTensor",
    "Engine",
    "Piece",
    "PieceState",
    "Sharding",
    "Span",
    "adapter_tensors",
    "base_optimizer",
    "trained_parameters",
    "whole_shape",
]
