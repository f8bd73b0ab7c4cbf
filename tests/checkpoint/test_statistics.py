"""Every score's statistics through a checkpoint's files, under the names that the score gives them."""

import pytest

from adalora_scale.checkpoint.format import Checkpoint, CheckpointError
from adalora_scale.checkpoint.state import ADAPTER, allocator_position, gather, scatter
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.config import SCORES
from tests.controller.test_allocator import Run, assert_same, options

AT = 8


def written(run, folder):
    gathered = gather(run.model, run.allocator.sharding, run.allocator)
    return Checkpoint(write_checkpoint(folder, AT, gathered, {}, {"allocator": allocator_position(run.allocator)}, {}))


@pytest.mark.parametrize("score", sorted(set(SCORES) - {"magnitude"}))  # which remembers nothing
def test_a_run_goes_on_from_the_files_bit_for_bit(tmp_path, score):
    """Else a resumed run forgets what its score has seen, or takes it for the optimizer's state."""
    config = options(score=score)
    straight = Run(config).train(AT)
    checkpoint = written(straight, tmp_path)
    resumed = Run(config).train(2)  # what was not loaded would show
    scatter(checkpoint, resumed.model, resumed.allocator.sharding, resumed.allocator)
    assert_same(resumed.allocator.statistics, straight.allocator.statistics)
    resumed.calls = AT
    assert_same(resumed.train().trainable(), straight.train().trainable())
    assert {t: mask for t, mask in straight.masks.items() if t > AT} == resumed.masks
    assert resumed.allocator.frozen


def test_names_on_disk_are_those_of_checkpoints_written_before(tmp_path):
    """Else a run that was interrupted before an update of the package cannot go on."""
    kinds = written(Run().train(AT), tmp_path).kinds(ADAPTER)
    assert set(kinds) == {"weight", "exp_avg", "exp_avg_sq", "sensitivity", "uncertainty"}


def test_another_score_cannot_go_on_from_it(tmp_path):
    """Else a run whose score was changed goes on with statistics that are none of its own."""
    checkpoint = written(Run().train(AT), tmp_path)
    other = Run(options(score="taylor"))
    before = {name: weight.clone() for name, weight in other.trainable().items()}
    with pytest.raises(CheckpointError, match=r"has no 'taylor': it is of adalora\.score=sensitivity_uncertainty"):
        scatter(checkpoint, other.model, other.allocator.sharding, other.allocator)
    assert_same(other.trainable(), before)


def test_a_module_unfrozen_after_attach_goes_through_a_checkpoint(tmp_path):
    """Else a run that unfreezes step by step ends at its next checkpoint, with advice that is already followed."""

    def unfrozen(run):
        run.model.head.requires_grad_(True)
        run.optimizer.add_param_group({"params": list(run.model.head.parameters())})
        return run

    straight = unfrozen(Run().train(2)).train(AT)
    checkpoint = written(straight, tmp_path)
    resumed = unfrozen(Run())
    scatter(checkpoint, resumed.model, resumed.allocator.sharding, resumed.allocator)
    resumed.calls = straight.calls
    assert_same(resumed.train().trainable(), straight.train().trainable())
    assert "head.weight" in resumed.trainable()
