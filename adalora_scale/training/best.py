"""Which evaluation of a run is its best: the figure that `training.metric_for_best_model` names, and its direction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainingArguments

from adalora_scale.errors import UserError, nearest
from adalora_scale.messages import say


def settle_best(
    arguments: TrainingArguments, training: Mapping[str, Any], higher_is_better: Mapping[str, bool]
) -> None:
    """See that evaluation has the figure, and that the better end of it is meant.

    transformers looks for the figure at the first evaluation, and takes the higher value of whatever is not called
    loss to be better, mean squared errors too.

    Args:
        arguments: of the run; `greater_is_better` is settled here.
        training: the section, converted.
        higher_is_better: the figures of an evaluation without prefix.

    Raises:
        UserError: there is no such figure.
    """
    if not (asked := training.get("metric_for_best_model")):
        return
    name = asked.removeprefix("eval_")
    if name not in higher_is_better:
        known = [f"eval_{figure}" for figure in higher_is_better]
        raise UserError(
            f"training.metric_for_best_model={asked} is no figure of this run's evaluation."
            f"{nearest(f'eval_{name}', known)} Known: {', '.join(known)}."
        )
    if arguments.prediction_loss_only and name != "loss":
        raise UserError(
            f"training.metric_for_best_model={asked} and training.prediction_loss_only=true, which leaves the loss "
            "alone, exclude each other; remove one of them."
        )
    higher = higher_is_better[name]
    if training.get("greater_is_better") is None:
        arguments.greater_is_better = higher
    elif training["greater_is_better"] != higher and arguments.process_index == 0:
        end = "lowest" if higher else "highest"
        say(f"note: training.greater_is_better={str(not higher).lower()} keeps the {end} eval_{name}, the worst")
