"""`adalora-scale rehearse`: what a rank of many asks for, by the code of a real run, without the others."""

import json

import pytest
import torch

from adalora_scale import cli
from adalora_scale.cluster.rehearsal.counted import Counted
from tests.experts.models import EXPERTS
from tests.experts.models import tiny as mixture

CONFIG = ["--config", "configs/recipes/quickstart.yaml"]


@pytest.fixture
def answer(stories260k, capsys):
    def ask(*words):
        code = cli.main(["rehearse", *CONFIG, "--json", f"model.model_name_or_path={stories260k}", *words])
        return code, json.loads(capsys.readouterr().out)

    return ask


def test_fsdp2_at_two_sizes_asks_for_the_same(answer):
    """Else a step or an attach that grows with the ranks shows first on a cluster that costs thousands an hour."""
    words = ("--no-growth", "--rank", "3", "engine.name=fsdp2", "adalora.preset=paper", "adalora.init_r=16")
    (code, few), (_, many) = answer("--gpus", "8", *words), answer("--gpus", "512", *words)
    assert code == 0 and few["engine"] == "fsdp2" and few["matrices"] == 35 and not few["by_rule"]
    for phase in ("attach", "step", "allocation", "final allocation"):
        for key in ("operations", "reads", "collectives"):
            assert many["ranks"]["3"][phase][key] <= few["ranks"]["3"][phase][key], (phase, key)
    step = few["ranks"]["3"]["step"]
    # The Grams of 70 factors and two sums of squares, in one all-reduce, whatever the number of ranks.
    assert (step["collectives"], step["reads"], step["bytes"]) == (1, 1, 4 * (70 * 16 * 16 + 2))
    assert many["ranks"]["3"]["step"]["bytes"] == step["bytes"]
    assert few["ranks"]["3"]["final allocation"]["reads"] <= 4  # on a GPU each is a wait, and there are 35 modules
    # 172 rows are not divided by 4 and 8 alike: a rank's rows may lie in more than two files, not in hundreds.
    assert max(resumed["files"] for resumed in (*few["resumes"], *many["resumes"])) <= 6


def test_hsdp_has_a_copy_a_node(answer):
    """Of the copies the first writes, so that whoever resumes opens no file of the others for its rows."""
    words = ("--no-growth", "--rank", "63", "engine.name=fsdp2")
    code, found = answer("--gpus", "64", "--nodes", "8", *words)
    assert code == 0 and found["engine"] == "hsdp" and found["elements_written"] == {"63": 0}
    assert max(resumed["files"] for resumed in found["resumes"]) <= 4
    assert found["ranks"]["63"]["step"]["collectives"] == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_by_its_rules(stage, answer):
    """Else what DeepSpeed's cuts cost at scale shows first at scale; what is a rule and not its code is said."""
    words = ("--no-growth", "--rank", "3", "--deepspeed", f"configs/deepspeed/zero{stage}.json")
    code, found = answer("--gpus", "64", *words)
    assert code == 0 and found["engine"] == f"zero{stage}" and "its optimizer is not built" in found["by_rule"]
    step = found["ranks"]["3"]["step"]
    assert (step["collectives"], step["reads"], step["bytes"]) == (1, 1, 8)
    assert max(resumed["files"] for resumed in found["resumes"]) <= 6


@pytest.mark.parametrize("engine", [["engine.name=fsdp2"], ["--deepspeed", "configs/deepspeed/zero3.json"]])
def test_a_mixture_is_cut_by_its_experts_tensors(engine, tmp_path, capsys):
    """Else the rule of the rehearsal and the engine's own pieces differ wherever a tensor holds several matrices."""
    mixture("qwen3_moe", dtype=torch.float32).save_pretrained(tmp_path / "base")
    words = ["--gpus", "4", "--rank", "1", "--no-growth", f"model.model_name_or_path={tmp_path}/base", *engine]
    assert cli.main(["rehearse", *CONFIG, "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["matrices"] == 2 * (4 + 2 * EXPERTS)


def test_what_grows_is_said(stories260k, capsys):
    """Else a reader compares a dozen figures by hand."""
    words = ["--gpus", "4", "--rank", "0", f"model.model_name_or_path={stories260k}", "engine.name=fsdp2"]
    assert cli.main(["rehearse", *CONFIG, *words]) == 0
    out = capsys.readouterr().out
    assert "grows from half the ranks to all: " in out and "grows from half the layers to all: attach operations" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "1"], "--gpus is 1; rehearse takes 2"),
        (["--gpus", "8", "--nodes", "2"], "--nodes 2 is for engine.name=fsdp2"),
        (["--gpus", "8", "--nodes", "3", "engine.name=fsdp2"], "cannot be spread evenly"),
        (["--gpus", "8", "--rank", "8", "engine.name=fsdp2"], "--rank is 8; the 8 ranks are 0 to 7"),
        (["--gpus", "8", "--nodes", "2", "engine.name=fsdp2", "engine.config.replicate=4"], "disagrees with"),
        (["--gpus", "8"], "rehearse shows engines that shard adapters"),
    ],
)
def test_wrong_use_is_one_line(words, said, stories260k, capsys):
    """Else a traceback hides which option to change."""
    assert cli.main(["rehearse", *CONFIG, f"model.model_name_or_path={stories260k}", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_the_counter_sees_memory_that_comes_and_goes_under_a_tensor():
    """Else what the arena takes in a step, and FSDP2 for a gathered block, would not be in the peak."""
    import torch

    with (counted := Counted()):
        kept = torch.empty(1000, device="meta")
        kept.untyped_storage().resize_(0)
        torch.empty(500, device="meta")
        kept.untyped_storage().resize_(2400)
    assert counted.counts().peak_bytes == 4000 and counted.counts().operations == 2
