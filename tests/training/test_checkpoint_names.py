"""Checkpoints are copied, renamed, linked, half deleted: a run goes on rightly, or says what is wrong; never from 0."""

import json
import os
import shutil

import pytest

from adalora_scale.checkpoint.format import CheckpointError, checkpoints
from adalora_scale.training.history import best_so_far
from adalora_scale.training.run import train
from tests.training.short_run import STEPS, assert_same, config, records


def goes_on(folder, *overrides, asked="auto"):
    train(config(folder, f"training.resume_from_checkpoint={asked}", *overrides))


def names(folder):
    return sorted(path.name for path in folder.glob("*checkpoint-*"))


def test_a_renamed_number_is_taken_for_the_step_that_it_is(crashed, straight, capsys):
    """checkpoint-4 called checkpoint-12 would win over checkpoint-6, be moved while it is read, and lose steps."""
    folder = crashed(6)
    os.rename(folder / "checkpoint-4", folder / "checkpoint-12")
    goes_on(folder)
    assert "checkpoint-6 (step 6 of 14" in capsys.readouterr().out
    assert_same(folder, straight)
    assert "abandoned-checkpoint-12" not in names(folder) or (folder / "checkpoint-12").is_dir()


def test_a_renamed_checkpoint_that_is_asked_for_stays_until_its_name_is_wanted(crashed, straight, capsys):
    folder = crashed(4)
    os.rename(folder / "checkpoint-4", folder / "checkpoint-12")
    goes_on(folder, asked=folder / "checkpoint-12")
    assert "checkpoint-12 (step 4 of 14" in capsys.readouterr().out
    assert_same(folder, straight)
    assert json.loads((folder / "checkpoint-12" / "manifest.json").read_text())["step"] == 12
    assert json.loads((folder / "abandoned-checkpoint-12" / "manifest.json").read_text())["step"] == 4


def test_what_was_abandoned_is_gone_on_from_and_nothing_abandoned_is_deleted(crashed, straight):
    """The name that a checkpoint gets when it is left may be that of the one that the run goes on from."""
    folder = crashed(6)
    os.rename(folder / "checkpoint-4", folder / "abandoned-checkpoint-6")
    goes_on(folder, asked=folder / "abandoned-checkpoint-6")
    assert_same(folder, straight)
    assert json.loads((folder / "abandoned-checkpoint-6" / "manifest.json").read_text())["step"] == 4
    assert json.loads((folder / "abandoned-checkpoint-6-2" / "manifest.json").read_text())["step"] == 6


@pytest.mark.parametrize("limit", [1, 20])
def test_of_a_link_the_link_goes_and_the_target_stays(limit, crashed, straight, tmp_path):
    """Checkpoints on another disk; rotation deleted the target's manifest and left the link."""
    folder = crashed(6)
    for step in (4, 6):
        shutil.move(folder / f"checkpoint-{step}", tmp_path / f"kept-{step}")
        (folder / f"checkpoint-{step}").symlink_to(tmp_path / f"kept-{step}")
    before = {path: path.read_bytes() for step in (4, 6) for path in (tmp_path / f"kept-{step}").iterdir()}
    goes_on(folder, f"training.save_total_limit={limit}")
    assert {path: path.read_bytes() for path in before} == before
    assert_same(folder, straight)
    assert os.path.lexists(folder / "checkpoint-6") == (limit > 1)


def test_a_link_to_a_later_number_is_left_and_its_target_too(crashed, straight):
    folder = crashed(6)
    (folder / "checkpoint-12").symlink_to(folder / "checkpoint-6")
    goes_on(folder, asked=folder / "checkpoint-6")
    assert_same(folder, straight)
    assert not (folder / "checkpoint-12").is_symlink() and (folder / "checkpoint-6" / "manifest.json").exists()


def test_in_a_new_folder_the_history_comes_along(crashed, straight, tmp_path):
    """Else metrics.jsonl begins in the middle, and the curve of the run is lost with the old folder."""
    folder = crashed(6)
    goes_on(tmp_path / "new", asked=folder / "checkpoint-6")
    assert_same(tmp_path / "new", straight)
    assert checkpoints(folder)[0].name == "checkpoint-6"


def test_the_history_of_another_run_is_not_taken_for_this_ones(crashed, straight, tmp_path):
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "metrics.jsonl").write_text('{"step": 1, "loss": 99}\n' * 50)
    goes_on(tmp_path / "new", asked=crashed(6) / "checkpoint-6")
    assert_same(tmp_path / "new", straight)
    assert (tmp_path / "new" / "abandoned-metrics.jsonl").read_text().count("99") == 50


def test_a_checkpoint_that_was_put_elsewhere_leaves_the_history_where_it_is(crashed, straight, tmp_path):
    """Its new folder has no metrics; those of the run were emptied for that."""
    folder = crashed(6)
    shutil.move(folder / "checkpoint-6", tmp_path / "backup" / "checkpoint-6")
    goes_on(folder, asked=tmp_path / "backup" / "checkpoint-6")
    assert_same(folder, straight)


def test_the_best_of_another_run_is_not_taken_for_this_ones(tmp_path):
    for name in ("theirs", "ours"):
        (tmp_path / name / "checkpoint-4").mkdir(parents=True)
    said = str(tmp_path / "theirs" / "checkpoint-4")
    assert best_so_far(said, [tmp_path / "theirs", tmp_path / "ours"]) == said


def test_a_copied_folder_goes_on_alone(crashed, straight, tmp_path):
    folder = crashed(6)
    shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(folder)
    goes_on(tmp_path / "copy")
    assert_same(tmp_path / "copy", straight)


@pytest.mark.parametrize("lines", [0, 1])
def test_a_lost_history_is_named(lines, crashed, straight, capsys):
    folder = crashed(6)
    if lines:
        kept = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)[:lines]
        (folder / "metrics.jsonl").write_text("".join(kept))
    else:
        (folder / "metrics.jsonl").unlink()
    goes_on(folder)
    assert f"metrics.jsonl has {lines} of the 2 lines before this checkpoint" in capsys.readouterr().out
    assert (
        records(folder / "metrics.jsonl")
        == records(straight / "metrics.jsonl")[:lines] + records(straight / "metrics.jsonl")[2:]
    )


def test_a_history_that_was_lost_and_begun_anew_has_no_line_twice(crashed, straight):
    """Two lines stood there before checkpoint-6; those of steps 9 and 12, written since, are not these two."""
    folder = crashed(6)
    (folder / "metrics.jsonl").unlink()
    goes_on(folder)
    begun = records(folder / "metrics.jsonl")
    goes_on(folder, asked=folder / "checkpoint-6")
    assert records(folder / "metrics.jsonl") == begun == records(straight / "metrics.jsonl")[2:]


def test_auto_never_starts_anew_where_checkpoints_are(crashed):
    """Half-deleted folders, or those of a run with save_only_model, were put aside, and the run began at step 0."""
    folder = crashed(2)
    (folder / "checkpoint-2" / "manifest.json").unlink()
    before = names(folder)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 has no manifest.json: .*Starting anew would overwrite the run"
    ):
        goes_on(folder)
    assert names(folder) == before


def test_a_half_deleted_newest_one_is_passed_over(crashed, straight):
    folder = crashed(6)
    (folder / "checkpoint-6" / "manifest.json").unlink()
    goes_on(folder)
    assert_same(folder, straight)
    assert "abandoned-checkpoint-6" in names(folder)


def test_a_clock_that_went_back_changes_nothing(crashed, straight):
    """Which checkpoint is the newest is its step's business."""
    folder = crashed(6)
    for number, step in enumerate((2, 4, 6)):
        for path in [folder / f"checkpoint-{step}", *(folder / f"checkpoint-{step}").iterdir()]:
            os.utime(path, (2e9 - 1e6 * number, 2e9 - 1e6 * number))
    goes_on(folder)
    assert_same(folder, straight)


BEST = (
    "training.eval_strategy=steps", "training.eval_steps=2", "training.load_best_model_at_end=true",
    "training.metric_for_best_model=eval_loss", "training.greater_is_better=true", "data.max_eval_samples=8",
)  # fmt: skip
"""The highest loss is the first one at the budget: that of checkpoint-10."""


def best_of(folder):
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    return state["best_model_checkpoint"], state["best_metric"]


@pytest.mark.parametrize("kept", [True, False], ids=["moved", "gone"])
def test_the_best_checkpoint_is_found_where_it_was_moved_to_or_is_named(kept, tmp_path, capsys):
    """transformers forgets a best checkpoint whose old path is gone, and keeps its figure: nothing later wins."""
    folder, moved = tmp_path / "out", tmp_path / "moved"
    train(config(folder, *BEST))
    assert best_of(folder)[0] == str(folder / "checkpoint-10")
    for path in (folder / f"checkpoint-{STEPS}", *([] if kept else [folder / "checkpoint-10"])):
        shutil.rmtree(path)
    before = (folder / "adapter_model.safetensors").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
        (folder / name).unlink()
    os.rename(folder, moved)
    goes_on(moved, *BEST)
    assert best_of(moved)[0] == str(moved / ("checkpoint-10" if kept else f"checkpoint-{STEPS}"))
    assert ("is gone: the best to come is taken" in capsys.readouterr().out) == (not kept)
    assert ((moved / "adapter_model.safetensors").read_bytes() == before) == kept
