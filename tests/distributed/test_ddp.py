"""DDP on two ranks is one process: a loop written by hand on a real model against the float64 reference."""

import functools
from pathlib import Path

import pytest
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from adalora_scale.verify.problem import reference_options
from adalora_scale.verify.reference import ReferenceAdaLora
from tests.distributed.launcher import RankFailure, run_ranks
from tests.distributed.workers import ddp_loop
from tests.sizes import assert_spent
from tests.toy import adapters_of

WORKER = Path(ddp_loop.__file__)


@pytest.fixture(scope="module")
def reference_of(stories260k, data_dir):
    """The reference trained on the same global batches, with clipping or without."""
    batches = ddp_loop.batches_of(stories260k, data_dir / "sgd_chat")

    @functools.cache
    def train(clip):
        config = ddp_loop.CONFIG
        reference = ReferenceAdaLora(
            adapters_of(ddp_loop.model_of(stories260k)),
            reference_options(
                config, ddp_loop.STEPS, lr=ddp_loop.LR, weight_decay=ddp_loop.WEIGHT_DECAY, max_grad_norm=clip
            ),
        )
        base = AutoModelForCausalLM.from_pretrained(stories260k).double().requires_grad_(False)
        for ids in batches:
            reference.train_step(base, lambda call, ids=ids: F.cross_entropy(
                call(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))  # fmt: skip
        return reference

    return train


@pytest.fixture(scope="module")
def outcomes(stories260k, data_dir, tmp_path_factory):
    """Trains variants on ranks in one start; returns {variant: [(masks, gaps, weights) of each rank]}."""

    def train(world_size, *names):
        folder = tmp_path_factory.mktemp("ddp")
        ranks = run_ranks(WORKER, world_size, [stories260k, data_dir / "sgd_chat", folder, *names], timeout=400)
        return {
            name: [
                (rank[name]["masks"], rank[name]["gaps"], load_file(folder / f"{name}.{rank.rank}.safetensors"))
                for rank in ranks
            ]
            for name in names
        }

    return train


@pytest.fixture(scope="module")
def two_ranks(outcomes):
    return outcomes(2, "plain", "everything")


def distance(weights, reference):
    """(over all adapters together, worst single tensor) of ‖w − w_ref‖ / ‖w_ref‖."""
    difference = total = worst = 0.0
    for name, adapter in reference.adapters.items():
        for factor, expected in adapter.weight.items():
            d = (weights[f"{name} {factor}"].double() - expected).square().sum().item()
            n = expected.square().sum().item()
            difference, total = difference + d, total + n
            worst = max(worst, (d / n) ** 0.5 if n > 0 else float("inf") if d > 0 else 0.0)
    return (difference / total) ** 0.5, worst


def assert_equals_the_reference(ranks, reference):
    expected = {str(step): mask for step, mask in reference.masks.items()}
    assert len(expected) >= 10
    for masks, gaps, weights in ranks:
        assert masks == expected, gaps
        together, worst = distance(weights, reference)
        assert together <= 1e-5
        assert worst <= 5e-5
    final = {module: sum(row) for module, row in list(expected.values())[-1].items()}
    assert_spent(final, ddp_loop.CONFIG.target_r)
    assert len(set(final.values())) >= 3


def clip_of(name):
    return ddp_loop.VARIANTS[name].get("clip")


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_two_ranks_equal_one_process_in_float64(two_ranks, reference_of, name):
    """`everything` adds accumulation, clipping and checkpointing: each changes what the hooks could see."""
    assert_equals_the_reference(two_ranks[name], reference_of(clip_of(name)))
    first, second = (weights for _, _, weights in two_ranks[name])
    assert all(first[key].equal(second[key]) for key in first)


def test_clipping_takes_part_in_the_comparison(reference_of):
    """A clip that never binds would prove nothing about clipped gradients."""
    plain, clipped = reference_of(None), reference_of(ddp_loop.CLIP)
    weights = {f"{n} {f}": w for n, a in plain.adapters.items() for f, w in a.weight.items()}
    assert distance(weights, clipped)[0] > 1e-4
    assert plain.masks != clipped.masks


def test_gradients_that_nobody_reduces_are_refused(outcomes):
    """Without DDP each rank would train alone; the mask is rank 0's on both, so it cannot show it."""
    with pytest.raises(RankFailure, match="ranks have different gradients of the adapters: nobody reduces them"):
        outcomes(2, "unreduced")


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_variant_on_every_number_of_ranks(outcomes, reference_of, world_size):
    """One option that only works at two ranks, or only beside others, would pass the short tests."""
    names = ["plain", "clipping", "checkpointing"]
    if world_size < 4:  # four ranks hold two rows each, which four micro-batches do not divide
        names += ["accumulation", "everything"]
    for name, ranks in outcomes(world_size, *names).items():
        assert_equals_the_reference(ranks, reference_of(clip_of(name)))
