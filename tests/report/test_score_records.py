"""scores.jsonl holds the very numbers that an allocation decided on, and stays small."""

from pathlib import Path

import numpy as np
import pytest
import torch

from adalora_scale.adalora.spending import Spending
from adalora_scale.errors import UserError
from adalora_scale.report.run_files import read_scored
from adalora_scale.report.score_lines import decode, encode, every_nth
from adalora_scale.report.why import decision
from adalora_scale.training import score_records
from adalora_scale.training.records import JsonLines
from adalora_scale.training.score_records import write_scores
from tests.controller.test_allocator import ALLOCATIONS, Run, options
from tests.distributed.launcher import run_ranks


@pytest.mark.shows("features", feature="scores recorded are those ranked", engine="one process")
@pytest.mark.parametrize("unit", ["triplets", "params"])
def test_a_run_records_the_scores_that_were_ranked(tmp_path, monkeypatch, unit):
    """Else people read reasons for ranks that were never the reasons."""
    ranked, inner = [], Spending.cut

    def seen(self, scores, step):
        ranked.append(scores.clone())
        return inner(self, scores, step)

    monkeypatch.setattr(Spending, "cut", seen)
    run, lines, masks = Run(options(budget_unit=unit)), JsonLines(tmp_path / "scores.jsonl"), []
    for _ in run.batches:
        before = run.allocator.last_allocation
        run.step()
        if run.allocator.last_allocation is not before:
            write_scores(lines, run.allocator)
            masks.append(run.allocator.mask.clone())
    scored = read_scored(tmp_path)
    assert [line["step"] for line in scored.lines] == ALLOCATIONS
    assert scored.modules == run.allocator.modules
    assert scored.sizes == {
        name: layer.in_features + layer.out_features + 1
        for name, layer in zip(run.allocator.modules, run.allocator._layers, strict=True)
    }
    for line, scores, mask in zip(scored.lines, ranked, masks, strict=True):
        found, kept = decode(line, scores.numel(), "a line")
        assert torch.equal(torch.from_numpy(found), scores) and kept.tolist() == mask.tolist()
        assert scores.unique().numel() > 10
        decided = decision(scored, line)
        assert decided.spent == line["spent"] <= decided.budget == line["budget"]
        # The cut is where the allocator saw it: its gap is measured from there.
        worths = [s / one.cost for one in decided.standings.values() for s in one.kept]
        paid = min(worth for worth in worths if worth >= decided.cut)
        assert line["gap"] == pytest.approx((paid - decided.cut) / paid, rel=1e-5)


@pytest.mark.shows("features", feature="scores recorded are those ranked", engine=lambda given: given["engines"])
@pytest.mark.parametrize("engines", [("ddp", "fsdp2"), ("zero2", "zero3")], ids=", ".join)
def test_every_rank_ranked_what_rank_0_recorded(tmp_path, engines, request):
    """Else the file would hold one rank's part of the sums."""
    zero = engines[0].startswith("zero")
    if zero:
        request.getfixturevalue("deepspeed_ops")
    env = {"DS_ACCELERATOR": "cpu"} if zero else {}
    ranks = run_ranks(
        Path(__file__).parent / "workers" / "scores_of_ranks.py", 2, [tmp_path, *engines], timeout=300, env=env
    )
    alone = Run().train()
    for engine in engines:
        scored = read_scored(tmp_path / engine)
        assert [line["step"] for line in scored.lines] == ALLOCATIONS
        for place, line in enumerate(scored.lines):
            recorded, kept = decode(line, len(scored.modules) * scored.r, "a line")
            for rank in ranks:
                assert len(rank[engine]) == len(ALLOCATIONS)
                assert np.array_equal(np.array(rank[engine][place], dtype=np.float32), recorded)
        np.testing.assert_allclose(alone.allocator.last_allocation.scores.numpy(), recorded, rtol=1e-3)
        assert alone.allocator.mask.tolist() == kept.tolist()


def test_the_file_stays_small_and_has_the_final_allocation(tmp_path, monkeypatch):
    """A run of 100,000 steps over 560 matrices allocates 10,000 times."""
    for allocations, triplets in ((10_000, 560 * 12), (10_000, 560 * 64), (3, 50), (1, 10**7)):
        every = every_nth(allocations, triplets)
        lines = -(-allocations // every) + 1
        assert lines <= 65 and lines * triplets * 5.6 <= max(6e6, 2 * triplets * 5.6)
    assert every_nth(64, 6720) == 1
    monkeypatch.setattr(score_records, "every_nth", lambda *_: 3)
    run, lines = Run(), JsonLines(tmp_path / "scores.jsonl")
    for _ in run.batches:
        run.step()
        if run.allocator.last_allocation is not None and run.allocator.step in ALLOCATIONS:
            write_scores(lines, run.allocator)
    assert [line["step"] for line in read_scored(tmp_path).lines] == [ALLOCATIONS[0], ALLOCATIONS[3], ALLOCATIONS[4]]


def test_a_restored_allocation_is_not_written_again(tmp_path):
    """A checkpoint holds no scores; the line of its allocation is from before."""
    run = Run()
    for _ in range(ALLOCATIONS[1]):
        run.step()
    resumed = Run()
    resumed.allocator.load_state_dict(run.allocator.state_dict())
    lines = JsonLines(tmp_path / "scores.jsonl")
    write_scores(lines, resumed.allocator)
    assert lines.lines == 0 and read_scored(tmp_path) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": "AAAAAA=="}, "holds 1 scores where its first line names 3 triplets"),
        ({"scores": "not base64!"}, "holds no scores"),
        ({"scores": None}, "holds no scores"),
        ({"kept": ""}, "names 3 triplets"),
    ],
)
def test_damaged_lines_are_said(change, message):
    """Else a report shows numbers that nobody computed."""
    line = encode(np.array([1, 2, 3], dtype=np.float32), np.array([True, False, True]))
    assert decode(line, 3, "line")[1].tolist() == [True, False, True]
    with pytest.raises(UserError, match=message):
        decode(line | change, 3, "line")
