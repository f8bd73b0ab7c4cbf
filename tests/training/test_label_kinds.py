"""Numbers as targets and several labels a row, from rows to a model that transformers opens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers as hf

from adalora_scale.cli import main
from adalora_scale.config import RunConfig, load_config
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.tasks.label_metrics import HIGHER_IS_BETTER, METRICS
from adalora_scale.training.run import prepare, train
from tests.conftest import ROOT

WORDS = ["list", "sort", "file", "open", "dict", "key"]


def config(folder, rows, **training) -> RunConfig:
    base = folder / "base"
    if not base.exists():
        torch.manual_seed(0)
        tokenizer = hf.AutoTokenizer.from_pretrained(ROOT / "launch" / "quickstart" / "base_model")
        tokenizer.save_pretrained(base)
        shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        # A base that was trained for another kind of label: what it says must not decide this run's loss.
        options = {"problem_type": "multi_label_classification", "num_labels": 5, "num_key_value_heads": 2}
        hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(tokenizer), **shape, **options)).save_pretrained(base)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "task": "sequence_classification",
        "model": {"model_name_or_path": str(base)},
        "data": {"train": str(folder / "rows.jsonl"), "eval": str(folder / "rows.jsonl"), "max_length": 32},
        "adalora": {"init_r": 4, "target_r": 2, "deltaT": 2},
        "training": {
            "output_dir": str(folder / "out"), "max_steps": 10, "per_device_train_batch_size": 8, "save_strategy": "no",
            "learning_rate": 0.02, "per_device_eval_batch_size": 5, **training,
        },
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(tree))
    return load_config(folder / "run.json", [])


def pairs():
    """As STS-B has them: two texts and a number."""
    for index in range(24):
        a, b = WORDS[index % 6], WORDS[index * 5 % 6]
        yield {"sentence1": f"{a} a thing", "sentence2": f"{b} a thing", "label": 4.75 if a == b else index % 3 / 2}


def tagged():
    for index in range(24):
        tags = [word for place, word in enumerate(WORDS[:3]) if index >> place & 1]
        yield {"text": " ".join(tags or ["nothing"]), "label": tags}


@torch.no_grad()
def predicted(model, tokenizer, rows):
    texts = [[row["sentence1"], row["sentence2"]] if "sentence1" in row else [row["text"]] for row in rows]
    return torch.cat([model.eval()(**tokenizer(*text, return_tensors="pt")).logits for text in texts]).float().numpy()


@pytest.mark.parametrize(
    ("make", "kind", "problem", "size"),
    [(pairs, "numbers", "regression", 1), (tagged, "several", "multi_label_classification", 3)],
)
def test_a_run_ends_in_a_model_that_says_what_it_predicts(tmp_path, make, kind, problem, size):
    """Else the loss is another problem's, or transformers opens the result as one with classes."""
    rows = list(make())
    summary = train(config(tmp_path, rows))
    first = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] > 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "merged"), "--format", "merged"]) == 0
    merged = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert (merged.config.problem_type, merged.config.num_labels) == (problem, size)
    if kind == "several":
        assert merged.config.id2label == dict(enumerate(sorted(WORDS[:3])))
        wanted = np.array([[word in row["label"] for word in sorted(WORDS[:3])] for row in rows], dtype=np.float32)
    else:
        wanted = np.array([row["label"] for row in rows], dtype=np.float32)
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    figures = METRICS[kind]((predicted(merged, tokenizer, rows), wanted))
    assert figures.keys() == HIGHER_IS_BETTER[kind].keys()
    for name, value in figures.items():
        assert summary["final"][f"eval_{name}"] == pytest.approx(value, abs=2e-3), name
    logits = torch.from_numpy(predicted(merged, tokenizer, rows))
    loss = torch.nn.functional.mse_loss if kind == "numbers" else torch.nn.functional.binary_cross_entropy_with_logits
    target = torch.from_numpy(wanted).view_as(logits)
    whole = torch.tensor([loss(logits[i : i + 5], target[i : i + 5]) for i in range(0, 24, 5)])
    weights = torch.tensor([5, 5, 5, 5, 4]) / 24
    assert summary["final"]["eval_loss"] == pytest.approx(float((whole * weights).sum()), rel=1e-3)
    base = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=size)
    assert load_adapter(base, tmp_path / "out").config.problem_type == problem


def test_labels_that_cannot_be_learnt_are_refused_before_the_model(tmp_path):
    """One class alone would be trained as a number by transformers; label smoothing needs one class a row."""
    with pytest.raises(UserError, match=r"every row of data\.train has the label 'a'"):
        prepare(config(tmp_path, [{"text": "x", "label": "a"}] * 4))
    with pytest.raises(UserError, match=r"label_smoothing_factor is for one class a row.*several"):
        prepare(config(tmp_path, tagged(), label_smoothing_factor=0.1))
