"""What is raised about a checkpoint."""

from __future__ import annotations

from adalora_scale.errors import UserError


class CheckpointError(UserError):
    """A checkpoint cannot be used: the message names the file and what is wrong with it."""
