"""A mixture's order in real runs: the same global batches at any number of ranks, and after a kill."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from adalora_scale.config import load_config
from adalora_scale.data.rows import load_raw
from adalora_scale.tasks.registry import find_task, wanted_rows
from tests.distributed.launcher import RankFailure, run_ranks
from tests.distributed.workers import rows_worker

WORKER = Path(rows_worker.__file__)
STEPS, BATCH, SAVED = 16, 6, 9
full = pytest.mark.full


@pytest.fixture
def config(stories260k, tmp_path):
    """A run over two sources, 3 to 1, whose epoch of 40 rows no batch divides: 7 steps, so that 9 lie in the second."""
    for name, rows in (("a", 30), ("b", 7)):
        lines = [json.dumps({"text": f"{name} {number} " + "word " * (number % 5)}) for number in range(rows)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tree = {
        "model": {"model_name_or_path": str(stories260k), "torch_dtype": "float32"},
        "data": {
            "train": [
                {"path": str(tmp_path / "a.jsonl"), "weight": 3},
                {"path": str(tmp_path / "b.jsonl"), "weight": 1},
            ],
            "max_length": 64,
        },
        "adalora": {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 2},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": STEPS,
            "global_batch_size": BATCH,
            "save_steps": SAVED,
            "use_cpu": True,
        },
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def expected(path, *overrides):
    """The global batch of each step, from the order itself."""
    config = load_config(path, list(overrides))
    task = find_task(config.task)
    raw = load_raw(config.data, wanted_rows(task), seed=42)
    tokenizer = AutoTokenizer.from_pretrained(config.model.model_name_or_path)
    data = task.prepare(raw, tokenizer, config.data, seed=42)
    if data.stream is not None:
        drawn = [data.stream[place] for place in range(STEPS * BATCH)]
    else:
        drawn = [data.train[int(item)] for item in data.mixture.order(0, STEPS * BATCH, seed=42)]
    names = [rows_worker.rows_of({"input_ids": _Rows([row["input_ids"]])})[0] for row in drawn]
    return {step: sorted(names[step * BATCH : (step + 1) * BATCH]) for step in range(STEPS)}


class _Rows(list):
    def tolist(self):
        return list(self)


def batches(ranks):
    steps = {int(step) for rank in ranks for step in rank["seen"]}
    return {step: sorted(row for rank in ranks for row in rank["seen"].get(str(step), [])) for step in steps}


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_killed_run_goes_on_with_the_same_rows_on_other_ranks(streaming, config):
    """Else some rows are trained twice and others never, which no figure shows."""
    overrides = [f"data.streaming={streaming}"]
    wanted = expected(config, *overrides)
    with pytest.raises(RankFailure) as killed:
        run_ranks(WORKER, 3, [config, 11, *overrides])
    before = batches(killed.value.ranks)
    assert before.keys() >= set(range(11)) and all(before[step] == wanted[step] for step in range(11))
    overrides.append("training.resume_from_checkpoint=auto")
    after = batches(run_ranks(WORKER, 2, [config, -1, *overrides]))
    assert after == {step: wanted[step] for step in range(SAVED, STEPS)}
    assert after[SAVED] != wanted[SAVED % 7], "the second epoch has an order of its own"


@full
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("mixing", ["weight", "rows", "streaming"])
def test_every_number_of_ranks_sees_the_same_batches(ranks, mixing, config):
    overrides = [f"data.streaming={json.dumps(mixing == 'streaming')}"]
    if mixing == "rows":
        parts = [
            {"path": str(config.parent / "a.jsonl"), "rows": 10},
            {"path": str(config.parent / "b.jsonl"), "rows": 9},
        ]
        overrides.append(f"data.train={json.dumps(parts)}")
    assert batches(run_ranks(WORKER, ranks, [config, -1, *overrides])) == expected(config, *overrides)


@full
def test_another_mixture_is_refused_at_resume(config):
    """The rows are the same, the order is not: the run would go on in the middle of another one."""
    run_ranks(WORKER, 1, [config, -1])
    parts = [{"path": str(config.parent / f"{name}.jsonl"), "weight": 1} for name in "ab"]
    with pytest.raises(RankFailure, match=r"data\.mixing"):
        run_ranks(WORKER, 1, [config, -1, f"data.train={json.dumps(parts)}", "training.resume_from_checkpoint=auto"])
