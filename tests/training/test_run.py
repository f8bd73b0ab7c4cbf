"""The command users type, on a real model and real dialogues: what it learns and what it leaves behind."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.controller import RankAllocator
from adalora_scale.export.peft_adalora import load_adapter
from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks
from tests.distributed.workers.shadowed_run import shadowed_run
from tests.export.adapters import scaled_as_by_peft
from tests.sizes import LARGEST, MATRICES, ONE_OF_EACH, assert_spent, parameters_of

RECIPE = ROOT / "configs" / "recipes" / "sgd_chat_stories260k.yaml"
STEPS = 60
METRICS = {
    "step", "loss", "grad_norm", "learning_rate", "epoch", "tokens_per_second", "adalora/budget", "adalora/spent",
    "adalora/rank_total",
    "adalora/rank_min", "adalora/rank_max", "adalora/zero_rank_modules", "adalora/orth_loss", "adalora/masks_digest",
}  # fmt: skip


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def paths(stories260k, data_dir):
    return [
        f"model.model_name_or_path={stories260k}",
        f"data.train={data_dir}/sgd_chat/train.jsonl",
        f"data.eval={data_dir}/sgd_chat/dev.jsonl",
    ]


@pytest.fixture(scope="module", params=["one process", "two ranks"])
def run(request, stories260k, data_dir, tmp_path_factory):
    """The recipe, a little shorter than it is, through launch/train.py; returns (world size, output folder, output)."""
    folder = tmp_path_factory.mktemp("run") / "out"
    arguments = ["--config", str(RECIPE), *paths(stories260k, data_dir), f"training.output_dir={folder}"]
    arguments += [f"training.max_steps={STEPS}", "training.eval_steps=30", "data.max_length=192"]
    script, environment = ROOT / "launch" / "train.py", {"ADALORA_REPORT": "1", "OMP_NUM_THREADS": "1"}
    if request.param == "two ranks":
        ranks = run_ranks(script, 2, [*arguments, "training.per_device_train_batch_size=4"], env=environment)
        assert ranks[1].output == "", "only rank 0 speaks"
        return 2, folder, ranks[0].output
    result = subprocess.run(
        [sys.executable, str(script), *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return 1, folder, result.stdout


@pytest.mark.shows(
    "training",
    task="causal_lm",
    engine=lambda given: {"one process": "one process", "two ranks": "ddp"}[given["run"]],
    base="float32",
)
def test_training_loss_falls_and_evaluation_beats_the_untouched_base(run):
    """A trainer that trains nothing, or trains on the wrong tokens, would still write all its files."""
    _, folder, _ = run
    records = lines_of(folder / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS
    tenth = STEPS // 10
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    assert last <= 0.85 * first, (first, last)
    evaluations = {record["step"]: record["eval_loss"] for record in records if "eval_loss" in record}
    assert set(evaluations) == {0, 30, STEPS}
    assert evaluations[STEPS] < evaluations[30] < evaluations[0]


def test_output_dir_holds_what_the_design_lists_and_nothing_of_the_base(run, stories260k):
    """Whole models in every run's folder fill disks; pickles run code; a missing file breaks every later step."""
    _, folder, _ = run
    checkpoints = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
    assert [path.name for path in checkpoints] == [f"checkpoint-{STEPS}"]
    assert {path.suffix for path in checkpoints[0].iterdir()} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in checkpoints[0].iterdir()) < 6 * 4 * 12 * 35 * 2 * 172  # five adapters
    found = {path.name for path in folder.iterdir()} - {f"checkpoint-{STEPS}"}
    assert found == {
        "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "ranks.jsonl", "scores.jsonl", "run.json",
        "report.html", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "library_name: peft" in card and f"triplets over {MATRICES} matrices" in card and "eval loss" in card
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name.rsplit(".", 1)[1] for name in tensors} == {"lora_A", "lora_E", "lora_B"}
    assert len(tensors) == 3 * MATRICES
    base = {value.numpy().tobytes() for value in load_file(stories260k / "model.safetensors").values()}
    assert not any(value.numpy().tobytes() in base for value in tensors.values())


def test_metrics_have_every_key_at_every_step(run):
    """Dashboards and the report read these names."""
    _, folder, _ = run
    steps = [record for record in lines_of(folder / "metrics.jsonl") if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    for record in steps:
        assert set(record) >= METRICS, METRICS - set(record)
        assert all(value is not None for value in record.values()), record
        assert record["adalora/budget"] - LARGEST < record["adalora/spent"] <= record["adalora/budget"]
        assert record["adalora/rank_min"] <= record["adalora/rank_total"] / MATRICES <= record["adalora/rank_max"]
        assert record["tokens_per_second"] > 0
    assert steps[0]["adalora/budget"] == steps[0]["adalora/spent"] == 16 * ONE_OF_EACH
    assert steps[-1]["adalora/budget"] == 8 * ONE_OF_EACH
    assert len({record["adalora/masks_digest"] for record in steps}) >= 5
    # Every rank's tokens are counted: 8 rows of at most 192 tokens a step.
    tokens = [record["num_tokens"] for record in steps]
    assert 0.5 * 8 * 192 <= tokens[0] <= 8 * 192


def test_tokens_per_second_leaves_evaluation_out(run):
    """A run that evaluates often would look slower than it trains, and plans made from the figure would be wrong."""
    _, folder, _ = run
    records = lines_of(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    tokens = [0.0] + [record["num_tokens"] for record in steps]
    seconds = sum((tokens[i + 1] - tokens[i]) / record["tokens_per_second"] for i, record in enumerate(steps))
    evaluating = sum(record["eval_runtime"] for record in records if "eval_runtime" in record)
    (whole,) = (record["train_runtime"] for record in records if "train_runtime" in record)
    assert evaluating > 0.3
    assert 0.5 * (whole - evaluating) < seconds <= whole - evaluating + 0.1


def test_ranks_follow_the_schedule_and_end_in_the_frozen_allocation(run):
    """An off-by-one here is a model with another size than the user asked for."""
    _, folder, _ = run
    allocations = lines_of(folder / "ranks.jsonl")
    tinit, end = 6, 30  # 10 % and 50 % of 60
    assert [a["step"] for a in allocations] == [t for t in range(tinit + 1, end) if t % 2 == 0] + [end]
    for allocation in allocations:
        assert set(allocation) == {"step", "budget", "spent", "ranks"}
        left = 1 - (allocation["step"] - tinit) / (end - tinit)
        assert allocation["budget"] == int(8 * ONE_OF_EACH * left**3 + 8 * ONE_OF_EACH)
        spent = parameters_of(allocation["ranks"])
        assert allocation["budget"] - LARGEST < allocation["spent"] == spent <= allocation["budget"]
    final = allocations[-1]["ranks"]
    assert len(final) == MATRICES
    assert len(set(final.values())) >= 3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADALORA"
    assert {name.removesuffix(".lora_E"): sum(row) for name, row in config["rank_pattern"].items()} == final


def test_the_report_is_this_runs_and_finished(run):
    """What a newcomer opens first; one of an earlier run, or from before the end, would mislead."""
    world_size, folder, _ = run
    page = (folder / "report.html").read_text()
    summary = json.loads((folder / "run.json").read_text())
    assert f"{folder}: finished" in page and f">{sum(summary['ranks'].values())}<" in page
    assert page.count("<svg ") == 13 and "no scores.jsonl" not in page
    assert (">ddp<" in page) == (world_size == 2)
    assert [line["step"] for line in lines_of(folder / "scores.jsonl")[1:]] == [
        line["step"] for line in lines_of(folder / "ranks.jsonl")
    ]


def test_run_json_says_what_ran_where(run):
    """A figure whose config, versions and hardware are unknown cannot be repeated."""
    world_size, folder, output = run
    summary = json.loads((folder / "run.json").read_text())
    assert summary["world_size"] == world_size
    assert summary["engine"] == ("ddp" if world_size == 2 else "one process")
    assert summary["total_step"] == STEPS
    assert summary["config"]["training"]["max_steps"] == STEPS
    assert summary["config"]["adalora"]["init_r"] == 16
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["hardware"]["device"] == "cpu"
    assert summary["wall_time_s"] > 0
    assert len(summary["peak_memory_by_rank"]) == world_size
    assert all(rank["resident_bytes"] > 50e6 for rank in summary["peak_memory_by_rank"])
    assert summary["ranks"] == lines_of(folder / "ranks.jsonl")[-1]["ranks"]
    assert summary["data"]["train_examples"] == 420
    records = lines_of(folder / "metrics.jsonl")
    assert summary["final"]["eval_loss"] == [r["eval_loss"] for r in records if "eval_loss" in r][-1]
    assert "of the linear weights adapted" in output
    assert f"done: {sum(summary['ranks'].values())} triplets over {MATRICES} matrices" in output
    assert f"step {STEPS}/{STEPS}  loss" in output


def test_adapter_gives_the_same_logits_here_and_in_peft(run, stories260k):
    """An adapter that loads without an error but computes something else is the worst outcome."""
    _, folder, _ = run
    # In float64, so that the two orders of summation leave no rounding beside a true difference.
    base = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Find me a bus to Fresno."}], tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        untouched = base(ids).logits
        ours = scaled_as_by_peft(load_adapter(copy.deepcopy(base), folder).double(), folder)
        peft = PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval()
        expected = ours(ids).logits
        assert (peft(ids).logits - expected).abs().max() <= 1e-5
        assert (expected - untouched).abs().max() > 0.1
    assert_spent({name: layer.r for name, layer in adapter_layers(ours)}, 8)


SHORT = ["training.max_steps=36", "adalora.deltaT=1", "training.eval_strategy=no", "training.eval_on_start=false",
         "data.max_length=96", "training.logging_steps=12", "adalora.init_r=8", "adalora.target_r=5",
         "training.eval_steps=null"]  # fmt: skip


@pytest.fixture(scope="module")
def short_run(stories260k, data_dir, tmp_path_factory):
    """Run in this process with the reference beside it."""

    def train(*overrides):
        folder = tmp_path_factory.mktemp("short")
        return shadowed_run(
            RECIPE, [*paths(stories260k, data_dir), *SHORT, f"training.output_dir={folder}", *overrides]
        )

    return train


@pytest.fixture(scope="module")
def one_process(short_run):
    return short_run()


def assert_follows_the_reference(seen):
    assert len(seen["masks"]) >= 10
    assert list(seen["masks"]) == list(seen["reference_masks"])
    for step, mask in seen["masks"].items():
        assert mask == seen["reference_masks"][step], f"allocation at step {step}, gaps {seen['gaps']}"
        spent = parameters_of({name: sum(row) for name, row in mask.items()})
        assert seen["budgets"][step] - LARGEST < spent <= seen["budgets"][step]
    ranks = {sum(row) for row in list(seen["masks"].values())[-1].values()}
    assert len(ranks) >= 3


@pytest.mark.shows("training", task="causal_lm", engine="one process", base="float32")
def test_every_mask_of_the_trainer_is_the_references(one_process):
    """The Trainer's clipping, accumulation or order of calls could part from the method without any visible sign."""
    assert_follows_the_reference(one_process[1])


@pytest.mark.shows("training", task="causal_lm", engine="ddp", base="float32")
def test_masks_are_equal_on_both_ranks_and_the_references(one_process, stories260k, data_dir, tmp_path):
    """Ranks that keep different triplets train different models; ranks whose gradients are not reduced do too."""
    ranks = run_ranks(
        "tests.distributed.workers.shadowed_run", 2,
        [RECIPE, *paths(stories260k, data_dir), *SHORT, "training.per_device_train_batch_size=4",
         f"training.output_dir={tmp_path / 'out'}"],
    )  # fmt: skip
    for rank in ranks:
        assert rank["world_size"] == 2
        assert_follows_the_reference(rank.values)
    assert ranks[0]["masks"] == ranks[1]["masks"]
    assert ranks[0]["weight_sum"] == ranks[1]["weight_sum"]
    assert ranks[0]["gradient_norms"] == ranks[1]["gradient_norms"]
    # The same global batches in one process: the first gradient is the mean over the tokens of both ranks.
    expected = one_process[1]["gradient_norms"][0]
    assert math.isclose(ranks[0]["gradient_norms"][0], expected, rel_tol=1e-4)


@pytest.mark.shows("features", feature="gradient accumulation", engine="one process")
def test_accumulation_gives_the_masks_of_the_bigger_batch(one_process, short_run):
    """A loss averaged over micro-batches in place of tokens, or an allocator counting micro-batches, would differ."""
    trainer, seen = short_run("training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4")
    assert_follows_the_reference(seen)
    assert seen["masks"] == one_process[1]["masks"]
    assert math.isclose(seen["weight_sum"], one_process[1]["weight_sum"], rel_tol=1e-3)
    assert trainer.allocator.step == 36


def test_shuffled_scores_end_with_another_rank_pattern(one_process, short_run, monkeypatch):
    """If the allocation ignored the scores, or the comparison could not see them, this mutant would pass."""
    scores = RankAllocator._scores

    def shuffled(self):
        values = scores(self)
        return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(self.step))]

    monkeypatch.setattr(RankAllocator, "_scores", shuffled)
    trainer, seen = short_run()
    assert trainer.allocator.rank_pattern() != one_process[0].allocator.rank_pattern()
    assert seen["masks"] != seen["reference_masks"]
