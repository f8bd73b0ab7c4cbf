"""What `inspect` says of experts."""

from __future__ import annotations

from pathlib import Path

from adalora_scale import save_adapter
from adalora_scale.export.inspection import describe, inspect_folder
from tests.experts.models import EXPERTS
from tests.experts.test_saving import trained


def test_experts_share_a_cell_and_have_a_summary(tmp_path: Path) -> None:
    """Else a table of 128 columns a layer, in which nobody sees who got the budget."""
    model = trained("mixtral")
    save_adapter(model, tmp_path, named=False)
    found = inspect_folder(tmp_path)
    layers = {f"model.layers.{n}.mlp.experts.*.{leaf}_proj" for n in range(2) for leaf in ("gate_up", "down")}
    assert found["experts"].keys() == layers
    for layer, own in found["experts"].items():
        before, _, last = layer.rpartition(".*.")
        ranks = sorted(found["ranks"][f"{before}.{number}.{last}"] for number in range(EXPERTS))
        assert own == {
            "experts": EXPERTS, "min": ranks[0], "median": ranks[2], "max": ranks[-1],
            "share_at_0": ranks.count(0) / EXPERTS,
        }  # fmt: skip
    text = describe(found).splitlines()
    heads = next(line for line in text if line.split()[:1] == ["layer"]).split()
    assert heads == ["layer", "q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj", "sum"]
    summary = text[text.index("ranks of experts") + 1 :]
    assert summary[0].split() == ["experts", "of", "number", "min", "median", "max", "at", "0"]
    assert len(summary) == 1 + len(layers)
    assert f"over {len(found['ranks'])} matrices" in "\n".join(text)
