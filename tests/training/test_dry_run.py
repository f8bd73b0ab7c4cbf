"""Values of the training section that ended in a traceback or in nothing: one line before the model is loaded."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState

from adalora_scale.config import load_config
from adalora_scale.errors import UserError
from adalora_scale.training.run import prepare
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "launch" / "quickstart" / "base_model")
    tokenizer.save_pretrained(folder / "base")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "base")
    rows = [{"prompt": f"Q {index}", "completion": f" a{index}"} for index in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def prepared(folder, **training):
    AcceleratorState._reset_state(True)  # each run has its own precision
    tree = {
        "model": {"model_name_or_path": str(folder / "base")},
        "data": {"train": str(folder / "rows.jsonl"), "max_length": 32},
        "adalora": {"init_r": 4, "target_r": 2, "deltaT": 2},
        "training": {
            "output_dir": str(folder / "out"), "max_steps": 6, "per_device_train_batch_size": 4, "save_strategy": "no",
            **training,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(tree))
    return prepare(load_config(folder / "run.json", []))


REFUSED = [
    ({"optim_args": "abc"}, "training.optim"),
    ({"adam_beta1": 1.5}, "adam_beta1"),
    ({"adam_epsilon": -1.0}, "adam_epsilon"),
    ({"optim": "nonsense"}, "training"),
    ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr .*min_lr"),
    ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_kwargs.*num_decay_steps"),
    ({"lr_scheduler_type": "cosine_warmup_with_min_lr"}, "lr_scheduler_kwargs.*min_lr"),
    ({"lr_scheduler_kwargs": {"foo": 1}}, "lr_scheduler_kwargs.*foo"),
    ({"lr_scheduler_kwargs": "abc"}, "lr_scheduler_kwargs"),
    ({"torch_compile_mode": "nonsense"}, "torch_compile_mode=nonsense .*Known"),
    ({"torch_compile_backend": "nonsense"}, "torch_compile_backend=nonsense .*Known"),
    ({"train_sampling_strategy": "by_length"}, "train_sampling_strategy=by_length"),
    ({"include_num_input_tokens_seen": "nonsense"}, "include_num_input_tokens_seen=nonsense"),
    ({"log_level": "nonsense"}, "log_level=nonsense"),
    ({"loss_type": "nonsense"}, "loss_type=nonsense"),
    ({"dataloader_num_workers": -1}, "dataloader_num_workers is -1"),
    ({"dataloader_persistent_workers": True}, "dataloader_persistent_workers"),
    ({"dataloader_prefetch_factor": 2}, "prefetch_factor"),
    ({"accelerator_config": "missing.json"}, "missing.json"),
    ({"save_strategy": "best"}, "metric_for_best_model"),
    ({"metric_for_best_model": "f1", "load_best_model_at_end": True}, "=f1 is no .*eval_mean_token_accuracy"),
    ({"metric_for_best_model": "eval_acuracy"}, "eval_acuracy is no figure"),
    ({"metric_for_best_model": "entropy", "prediction_loss_only": True}, "prediction_loss_only=true"),
    ({"label_names": ["foo"]}, "training.label_names .*data.label_column"),
    ({"batch_eval_metrics": True}, "batch_eval_metrics"),
    ({"include_for_metrics": ["inputs"]}, "include_for_metrics"),
    ({"push_to_hub": True}, "push_to_hub=true: the hub does not take this run"),
    ({"seed": -1}, "training.seed is -1"),
    ({"seed": 2**40}, "training.seed"),
    ({"data_seed": -1}, "training.data_seed is -1"),
    ({"weight_decay": -1.0}, "weight_decay is -1"),
    ({"label_smoothing_factor": 5.0}, "label_smoothing_factor is 5"),
    ({"eval_accumulation_steps": 0}, "eval_accumulation_steps is 0"),
    ({"eval_on_start": True}, "eval_on_start needs evaluation data"),
    ({"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0"),
    ({"eos_token": "nonsense"}, "eos_token=nonsense"),
    ({"pad_token": "nonsense"}, "pad_token=nonsense"),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}},
        "gradient_checkpointing_kwargs.foo",
    ),
    ({"gradient_checkpointing_kwargs": "abc"}, "gradient_checkpointing_kwargs"),
    ({"report_to": "nonsense"}, "report_to=nonsense"),
]


@pytest.mark.parametrize(("training", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_run_is_one_line(folder, training, said):
    """Else a traceback, most of them after the model was loaded."""
    with pytest.raises(UserError, match=said) as caught:
        prepared(folder, **training)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has what is refused")
def test_activations_stay_where_there_is_no_gpu(folder):
    with pytest.raises(UserError, match="activation_offloading=true needs a GPU"):
        prepared(folder, activation_offloading=True)


@pytest.mark.parametrize(
    "training",
    [
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
        {"optim": "sgd", "optim_args": "momentum=0.9"},
        {"warmup_steps": 0.1},
        {"max_grad_norm": -1.0},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"train_sampling_strategy": "group_by_length"},
    ],
    ids=str,
)
def test_what_runs_is_let_through(folder, training):
    assert prepared(folder, **training).steps == 6


@pytest.mark.parametrize(
    ("metric", "higher"), [("loss", False), ("eval_mean_token_accuracy", True), ("entropy", False)]
)
def test_the_better_end_of_a_figure_is_kept(folder, metric, higher):
    """transformers takes the higher end of whatever is not called loss."""
    assert prepared(folder, metric_for_best_model=metric).arguments.greater_is_better is higher


def test_keys_without_effect_are_named(folder, capsys):
    """Else a user believes that they do something."""
    keys = {
        "do_train": False, "packing_strategy": "wrapped", "hub_model_id": "a/b", "shuffle_dataset": True,
        "metric_for_best_model": "mean_token_accuracy", "fp16": True,
    }  # fmt: skip
    prepared(folder, **keys)
    out = capsys.readouterr()
    for key in keys:
        assert f"training.{key} has no effect" in out.out + out.err
