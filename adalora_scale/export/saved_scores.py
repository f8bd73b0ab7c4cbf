"""The run's own score of every triplet, from the statistics that a checkpoint holds until the final allocation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from adalora_scale.adalora.matrices import matrix_names
from adalora_scale.adalora.score import ScoredPiece
from adalora_scale.adalora.scores import score_named
from adalora_scale.checkpoint.format import MANIFEST_NAME, Checkpoint, CheckpointError
from adalora_scale.checkpoint.state import score_of
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import CONFIG_NAME
from adalora_scale.export.from_checkpoint import adalora_options, masks


def saved_scores(directory: Path) -> dict[str, Tensor]:
    """Return matrix → (r,) float32 score of every triplet, as the run's next allocation would have begun with.

    Raises:
        UserError: the folder holds no scores: an adapter never does, a checkpoint only until the final allocation.
    """
    why = "an adapter has none"
    if not (directory / CONFIG_NAME).is_file() and (directory / MANIFEST_NAME).is_file():
        checkpoint = Checkpoint(directory)
        if not checkpoint.manifest["allocator"]["frozen"]:
            return _scores(checkpoint)
        why = "they are not kept after the final allocation"
    raise UserError(
        f"--by scores: {directory} holds no scores, {why}; name a checkpoint-N from before the final allocation, or "
        f"use --by singular-values."
    )


def _scores(checkpoint: Checkpoint) -> dict[str, Tensor]:
    options = adalora_options(checkpoint)
    score = score_named(score_of(checkpoint.manifest["allocator"]))(options)
    scores: dict[str, Tensor] = {}
    for module, mask in masks(checkpoint).items():
        matrices = e[0] if len(e := checkpoint.shapes("adapter")[f"{module}.lora_E"]) > 1 else 1
        r = len(mask) // matrices
        weights, pieces = [], []
        for factor in score.factors:
            name = f"{module}.{factor}"
            flat: dict[str, Tensor] = {}
            for kind in ("weight", *score.statistics):
                value = checkpoint.read_whole("adapter", kind, name)
                if value is None:
                    raise CheckpointError(f"the checkpoint {checkpoint.directory} holds no '{kind}' of '{name}'.")
                flat[kind] = value.flatten()
            weights.append(flat.pop("weight"))
            pieces.append(ScoredPiece(factor, weights[-1].numel() // (matrices * r), flat))
        each = torch.zeros(matrices, r, dtype=torch.float32)
        for value in score.contributions(pieces, weights):
            each += value.view(matrices, -1, r).sum(1)
        scores |= zip(matrix_names(module, matrices), each.unbind(0), strict=True)
    return scores
