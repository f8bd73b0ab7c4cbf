"""Scores against the cut, margins and prices: worked out by hand for a toy."""

import json

import numpy as np
import pytest

from adalora_scale.errors import UserError
from adalora_scale.report.run_files import read_scored
from adalora_scale.report.score_lines import encode
from adalora_scale.report.why import decision, find_module


def scored(folder, scores, kept, *, budget, unit, sides=((1, 2), (4, 5), (1, 2))):
    """Three matrices a, b, c of two triplets each; a triplet of a and c costs 4 parameters, one of b 10."""
    modules = ["m.0.a", "m.0.b", "m.1.a"]
    head = {"step": 0, "format": 1, "score": "taylor", "unit": unit, "r": 2, "every": 1, "modules": modules}
    line = {"step": 9, "budget": budget, "spent": 0, "gap": 0.5}
    line |= encode(np.array(scores, dtype=np.float32), np.array(kept, dtype=bool))
    (folder / "scores.jsonl").write_text("".join(json.dumps(x) + "\n" for x in (head | {"sides": sides}, line)))
    return read_scored(folder)


def test_margins_and_prices_in_triplets(tmp_path):
    """8 6 5 | 4 2 1 with three bought: the cut is 4."""
    found = decision(scored(tmp_path, [8, 4, 6, 5, 2, 1], [1, 0, 1, 1, 0, 0], budget=3, unit="triplets"))
    a, b, c = found.standings.values()
    assert (found.cut, found.spent, found.of_each, found.gap) == (4.0, 3, 3, 0.5)
    assert (a.kept, a.dropped, a.best, a.worst, a.next, a.needs) == ([8], [4], 1.0, 1.0, 0.0, 1)
    assert (b.kept, b.dropped, b.best, b.worst, b.next, b.needs) == ([6, 5], [], 0.5, 0.25, None, None)
    assert (c.kept, c.dropped, c.best, c.worst, c.next, c.needs) == ([], [2, 1], None, None, -0.5, 2)
    assert (a.size, b.size, a.cost, b.cost) == (4, 10, 1, 1)


def test_margins_and_prices_in_parameters_with_what_is_left(tmp_path):
    """Scores per parameter 5 (a, 4) · 4 (b, 10) | 3 (b, 10) · 2 (c, 4) · 1 (a, 4) · ½ (c, 4), and a budget of 18.

    14 are spent until b's second triplet does not fit; the 4 left buy c's first, below the cut.
    """
    found = decision(scored(tmp_path, [20, 4, 40, 30, 8, 2], [1, 0, 1, 0, 1, 0], budget=18, unit="params"))
    a, b, c = found.standings.values()
    assert (found.cut, found.spent, found.of_each) == (3.0, 18, 18)
    assert (b.worst, b.next) == (pytest.approx(1 / 3), 0.0)
    assert c.worst == pytest.approx(-1 / 3)  # bought with what was left
    # 4 + 10 + 10 = 24 surely buy b's second; 24 + 4 + 4 = 32 a's second; everything costs 36.
    assert (b.needs, a.needs, c.needs) == (24 - 18, 32 - 18, 36 - 18)


def test_a_budget_for_everything_has_no_cut(tmp_path):
    """Before pruning begins nothing is dropped."""
    found = decision(scored(tmp_path, [1, 2, 3, 4, 5, 6], [1] * 6, budget=36, unit="params"))
    assert found.cut is None
    assert all((one.best, one.worst, one.next, one.needs) == (None,) * 4 for one in found.standings.values())


def test_scores_of_zero_give_no_margin(tmp_path):
    """Nothing is a multiple of zero; a division would show infinity."""
    found = decision(scored(tmp_path, [0] * 6, [1, 1, 1, 0, 0, 0], budget=3, unit="triplets"))
    assert found.cut == 0.0 and {one.best for one in found.standings.values()} == {None}


def test_a_matrix_is_found_by_a_part_of_its_name():
    """Nobody types model.layers.3.self_attn.q_proj; a wrong guess would explain another matrix."""
    modules = ["model.layers.1.q_proj", "model.layers.11.q_proj", "model.layers.1.k_proj", "q_proj"]
    assert find_module("q_proj", modules) == "q_proj"
    assert find_module("layers.1.q_proj", modules) == "model.layers.1.q_proj"
    assert find_module("11", modules) == "model.layers.11.q_proj"
    with pytest.raises(UserError, match=r"means 2 matrices \(model\.layers\.1\.q_proj, model\.layers\.1\.k_proj\)"):
        find_module("rs.1.", modules)
    with pytest.raises(
        UserError, match=r"no adapted matrix has that in its name. Did you mean 'model.layers.1.k_proj'"
    ):
        find_module("model.layer.1.k_proj", modules)
