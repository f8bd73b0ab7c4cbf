"""What must not change between a run and its continuation, and the refusal that names what did."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.state import score_of
from adalora_scale.errors import UserError, nearest

_FIXED = ("total_step", "adalora.init_r", "adalora.budget_unit")
"""What cannot differ even where `training.resume_allow_changed` names it: what was saved does not fit then."""
_MODULES = ("adalora.target_modules", "adalora.exclude_modules", "adalora.modules_to_save")
"""Likewise, where they lead to other modules than were saved."""


def plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values as they come back from JSON, so that a saved identity compares equal."""
    return dict(json.loads(json.dumps(dict(identity), default=str)))


def saved_identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a checkpoint says its run was, with the values of keys that were added after it was written.

    Else those keys would be taken from today's preset, which begins and scales otherwise.
    """
    saved = dict(checkpoint.manifest["identity"])
    if not any(key.startswith("adalora.") for key in saved):
        return saved
    score = score_of(checkpoint.manifest["allocator"])
    return {"adalora.init_weights": "adalora", "adalora.budget_unit": "triplets", "adalora.score": score} | saved


def require_same_run(
    checkpoint: Checkpoint, identity: Mapping[str, Any], allowed: Collection[str], *, same_modules: bool = True
) -> list[str]:
    """Compare a run's identity with its checkpoint's.

    Args:
        checkpoint: what the run goes on from.
        identity: key → value of everything that decides what is trained; keys that one side lacks are left out.
        allowed: keys that may differ (`training.resume_allow_changed`), those apart that cannot.
        same_modules: whether the run adapts the modules that were saved.

    Returns:
        The allowed keys that did change.

    Raises:
        UserError: another key differs, or one that cannot, with both values and the way out; or an allowed key does
            not exist.
    """
    saved, now = saved_identity(checkpoint), plain(identity)
    keys = [*now, *(key for key in saved if key not in now)]
    for key in allowed:
        if key not in keys:
            raise UserError(f"training.resume_allow_changed: '{key}' is not compared at resume.{nearest(key, keys)}")
    common = [key for key in keys if key in now and key in saved]
    changed = {key: (saved[key], now[key]) for key in common if saved[key] != now[key]}
    refused = [key for key in changed if key not in allowed]
    if fixed := [key for key in changed if key in (_FIXED if same_modules else _FIXED + _MODULES)]:
        diff = ", ".join(f"{key}: {changed[key][0]} → {changed[key][1]}" for key in fixed)
        raise UserError(
            f"the checkpoint {checkpoint.directory} is of another run ({diff}), which cannot differ: the schedule of "
            f"pruning, the scores and the mask belong to it. Resume with the old values; to train on, let the run end "
            f"and start a new one from its adapter: model.adapter_path={checkpoint.directory.parent} and another "
            f"training.output_dir."
        )
    if refused:
        diff = ", ".join(f"{key}: {changed[key][0]} → {changed[key][1]}" for key in refused)
        raise UserError(
            f"the checkpoint {checkpoint.directory} is of another run ({diff}). Resume with the old values, or allow "
            f"these keys: training.resume_allow_changed=[{','.join(refused)}]."
        )
    return list(changed)
