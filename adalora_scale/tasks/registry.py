"""Every task by name. The names are the config's (`TaskName`); a task of that name is the file of that name here."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, get_args

from torch import nn

from adalora_scale.config.options import TaskName
from adalora_scale.errors import UserError, nearest
from adalora_scale.tasks.task import Task

if TYPE_CHECKING:
    from adalora_scale.data.rows import Wanted

TASKS: dict[str, Task] = {name: import_module(f"{__package__}.{name}").TASK for name in get_args(TaskName)}
"""Name → task."""


def find_task(name: str) -> Task:
    """Return the task that the config names.

    Raises:
        UserError: there is none of that name.
    """
    if name not in TASKS:
        raise UserError(f"task={name} is unknown.{nearest(name, TASKS)} Known: {', '.join(TASKS)}.")
    return TASKS[name]


def task_of_class(class_name: str) -> Task | None:
    """Return the task of a model's class, by the class's name; None for classes of other kinds."""
    return next((task for task in TASKS.values() if task.builds(class_name)), None)


def task_of_model(model: nn.Module) -> Task | None:
    """Return a model's task: by its own class, or else by the architectures that its config names."""
    # fully_shard puts FSDP before a class's name.
    own = type(model).__name__.removeprefix("FSDP")
    names = [own, *(getattr(getattr(model, "config", None), "architectures", None) or [])]
    return next((task for name in names if (task := task_of_class(name)) is not None), None)


def task_of_peft(peft_type: str | None) -> Task | None:
    """Return the task that PEFT calls so; None for others of PEFT's."""
    return next((task for task in TASKS.values() if task.peft_type == peft_type), None)


def wanted_rows(task: Task) -> Wanted:
    """Return what the data room must know of a task, and which task takes the rows that this one does not."""
    from adalora_scale.data.rows import Wanted

    takers = {layout: other.name for other in TASKS.values() for layout in other.layouts}
    return Wanted(task=task.name, layouts=task.layouts, takers=takers)
