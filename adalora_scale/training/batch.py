"""`training.global_batch_size`: examples an optimizer step over all ranks, whatever their number.

With it a run keeps its steps, and with them its schedule of pruning, when it is started again on more or fewer ranks.
Imports nothing heavy: the launch scripts check it before any rank starts.
"""

from __future__ import annotations

from typing import Any

from adalora_scale.errors import UserError

_LARGEST_MICRO_BATCH = 8  # transformers' default


def batch_sizes(training: dict[str, Any], world_size: int) -> dict[str, int]:
    """Return per_device_train_batch_size and gradient_accumulation_steps for `training.global_batch_size`.

    global_batch_size = world_size x per_device_train_batch_size x gradient_accumulation_steps. Given one of the two
    factors, the other follows; given none, the micro-batch is the largest divisor up to 8.

    Args:
        training: the `training:` section, its values converted.
        world_size: number of ranks.

    Raises:
        UserError: the sizes do not divide each other; the message holds the nearest that do.
    """
    total = training.get("global_batch_size")
    if total is None:
        return {}
    micro, steps = training.get("per_device_train_batch_size"), training.get("gradient_accumulation_steps")
    said = f"training.global_batch_size={total}"
    if total < 1:
        raise UserError(f"{said}; it must be at least 1.")
    if total % world_size:
        sizes = _either(sorted({total - total % world_size, total - total % world_size + world_size} - {0}))
        raise UserError(
            f"{said} cannot be divided over {world_size} ranks; use {_either(_near_divisors(total, world_size))} "
            f"ranks, or training.global_batch_size={sizes}."
        )
    share = total // world_size
    if micro is not None and steps is not None and micro * steps != share:
        raise UserError(
            f"{said} is not {world_size} ranks x training.per_device_train_batch_size={micro} x "
            f"training.gradient_accumulation_steps={steps} = {world_size * micro * steps}; leave out one of the three."
        )
    for key, value in (("per_device_train_batch_size", micro), ("gradient_accumulation_steps", steps)):
        if value is not None and share % value:
            raise UserError(
                f"{said} is {share} examples a rank on {world_size} ranks, which training.{key}={value} does not "
                f"divide; use {_either(_near_divisors(share, value))}."
            )
    if micro is None:
        limit = _LARGEST_MICRO_BATCH if steps is None else share // steps
        micro = max(size for size in range(1, min(share, limit) + 1) if share % size == 0)
    return {"per_device_train_batch_size": micro, "gradient_accumulation_steps": share // micro}


def _near_divisors(number: int, wanted: int) -> list[int]:
    """Return the divisors of `number` next to `wanted`: the one below, the one above."""
    below = max(size for size in range(1, min(wanted, number) + 1) if number % size == 0)
    above = next((size for size in range(wanted + 1, number + 1) if number % size == 0), None)
    return [below] if above is None else [below, above]


def _either(sizes: list[int]) -> str:
    return " or ".join(map(str, sizes))
