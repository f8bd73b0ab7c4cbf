"""A task is one object, found by the name its file has; the config's list of names is the registry's."""

from pathlib import Path
from typing import get_args

import pytest
from torch import nn
from transformers import BertConfig, GPT2Config, GPT2LMHeadModel

from adalora_scale import tasks
from adalora_scale.config.options import TaskName
from adalora_scale.errors import UserError
from adalora_scale.tasks.registry import TASKS, find_task, task_of_class, task_of_model, task_of_peft, wanted_rows

NOT_TASKS = {"__init__", "building", "registry", "task", "own_head", "vocabulary", "label_metrics"}


def test_names_in_the_config_are_the_files_of_the_room():
    """Else a task exists that nobody can ask for, or one can be asked for that does not exist."""
    files = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")} - NOT_TASKS
    assert files == set(TASKS) == set(get_args(TaskName))
    assert all(task.name == name for name, task in TASKS.items())


def test_peft_and_rows_tell_tasks_apart():
    """Else an adapter is read back as another task's."""
    assert all(task_of_peft(task.peft_type) is task for task in TASKS.values())
    assert task_of_peft("SEQ_2_SEQ_LM") is None and task_of_peft(None) is None
    assert all(set(task.layouts) <= wanted_rows(task).takers.keys() for task in TASKS.values())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("LlamaForCausalLM", "causal_lm"),
        ("GPT2LMHeadModel", "causal_lm"),
        ("BertForSequenceClassification", "sequence_classification"),
        ("T5ForConditionalGeneration", None),
    ],
)
def test_a_class_belongs_to_one_task(name, expected):
    """Else adapter_config.json names a class for PEFT that the model is not of."""
    task = task_of_class(name)
    assert (task.name if task else None) == expected
    assert sum(other.builds(name) for other in TASKS.values()) == (expected is not None)


def test_a_models_class_counts_before_the_checkpoints():
    """Else a language model over a classifier's checkpoint is saved as a classifier."""
    shape = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=16, architectures=["GPT2ForSequenceClassification"])
    assert task_of_model(GPT2LMHeadModel(shape)) is find_task("causal_lm")
    unknown = nn.Linear(1, 1)
    assert task_of_model(unknown) is None
    unknown.config = BertConfig(architectures=["BertForSequenceClassification"])
    assert task_of_model(unknown) is find_task("sequence_classification")


def test_an_unknown_task_is_answered_with_the_nearest():
    """Else a caller from Python gets a KeyError."""
    with pytest.raises(UserError, match=r"task=causal_ml is unknown\. Did you mean 'causal_lm'\?"):
        find_task("causal_ml")
