"""Nodes with disks of their own: ranks that read other rows under one name are refused, on all ranks, at once.

Nothing else would show it: every rank takes its share of the row numbers out of other rows, and training goes on.
"""

import gzip
import json
import shutil

import pytest

from tests.conftest import ROOT
from tests.distributed.launcher import RankFailure, run_ranks

QUICKSTART = ROOT / "launch" / "quickstart"
RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
ZERO = json.dumps({"zero_optimization": {"stage": 2}})
ENGINES = {"ddp": [], "fsdp2": ["engine.name=fsdp2"], "zero2": ["engine.name=deepspeed", f"engine.config={ZERO}"]}


def rows(name, count):
    return (QUICKSTART / "data" / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]


def nodes(folder, change):
    """Two folders with the same files, but what `change(folder of rank 1)` did."""
    for number in range(2):
        data = folder / f"node{number}" / "data"
        data.mkdir(parents=True)
        (data / "a.jsonl").write_text("".join(rows("train", 40)))
        (data / "b.jsonl").write_text("".join(rows("train", 64)[40:]))
        (data.parent / "eval.jsonl").write_text("".join(rows("test", 8)))
    change(folder / "node1")


def run(folder, engine, *options):
    return run_ranks(
        "tests.distributed.workers.own_disks", 2,
        [folder, "--config", RECIPE, f"model.model_name_or_path={QUICKSTART / 'base_model'}",
         "data.train=data/*.jsonl*", "data.eval=eval.jsonl", "training.max_steps=3", "adalora.tinit=1",
         "adalora.tfinal=1", "adalora.deltaT=1", "training.per_device_train_batch_size=2", "training.save_strategy=no",
         "training.use_cpu=true", f"training.output_dir={folder / 'out'}", *ENGINES[engine], *options],
    )  # fmt: skip


def one_row_less(node):
    (node / "data" / "b.jsonl").write_text("".join(rows("train", 63)[40:]))


def one_letter_other(node):
    path = node / "data" / "a.jsonl"
    path.write_text(path.read_text().replace("e", "E", 1))


def files_swapped(node):
    first, second = node / "data" / "a.jsonl", node / "data" / "b.jsonl"
    texts = first.read_text(), second.read_text()
    first.write_text(texts[1])
    second.write_text(texts[0])


def other_eval(node):
    (node / "eval.jsonl").write_text("".join(rows("test", 7)))


@pytest.mark.parametrize(
    ("engine", "change", "said"),
    [
        ("ddp", one_row_less, "ranks read other rows of data.train: 64 rows on rank 0, 63 rows on rank 1"),
        ("fsdp2", one_letter_other, "ranks read other rows of data.train: 64 rows on rank 0, 64 other rows on rank 1"),
        pytest.param("zero2", other_eval, "of data.eval: 8 rows on rank 0, 7 rows on rank 1", marks=pytest.mark.full),
        pytest.param("ddp", files_swapped, "64 rows on rank 0, 64 other rows on rank 1", marks=pytest.mark.full),
    ],
)
def test_ranks_that_read_other_rows_are_refused_on_every_rank(engine, change, said, tmp_path, request):
    if engine == "zero2":
        request.getfixturevalue("deepspeed_ops")
    nodes(tmp_path, change)
    with pytest.raises(RankFailure) as failure:
        run(tmp_path, engine)
    assert failure.value.returncode is not None, "it hung"
    for rank in failure.value.ranks:
        assert rank["code"] == 2
        (line,) = [line for line in rank.output.splitlines() if "ranks read" in line]
        assert said in line and "put the same files on every node" in line
    assert "Traceback" not in "".join(rank.output for rank in failure.value.ranks)
    assert not (tmp_path / "out" / "run.json").exists()


def test_the_same_rows_in_other_files_are_the_same(tmp_path):
    """Paths, times and packing are no rows: a node whose copy is packed, or was made later, takes part."""

    def packed(node):
        path = node / "data" / "b.jsonl"
        path.with_name("b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()

    nodes(tmp_path, packed)
    ranks = run(tmp_path, "ddp")
    assert [rank["code"] for rank in ranks] == [0, 0]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["train_examples"] == 64


@pytest.mark.full
def test_another_tokenizer_is_refused(tmp_path):
    """The same rows, other tokens: an edited tokenizer on one node."""
    nodes(tmp_path, lambda node: None)
    for number in range(2):
        shutil.copytree(QUICKSTART / "base_model", tmp_path / f"node{number}" / "model")
    path = tmp_path / "node1" / "model" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(tree))
    with pytest.raises(RankFailure) as failure:
        run(tmp_path, "ddp", "model.model_name_or_path=./model")
    for rank in failure.value.ranks:
        assert "rank 1 has other tokens of the same rows than rank 0; give every node the same tokenizer" in rank.output
