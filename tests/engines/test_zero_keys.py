"""Keys of DeepSpeed's configuration: what a run cannot have, and what DeepSpeed cannot read, is one line before it."""

import json

import pytest
import torch

from adalora_scale.engines.zero_keys import check_keys, check_read, deepspeed_refusals
from adalora_scale.errors import Unsupported, UserError
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs" / "deepspeed").glob("*.json"))


def tree(zero=None, **keys):
    return {"zero_optimization": {"stage": 3, **(zero or {})}, "bf16": {"enabled": "auto"}, **keys}


REFUSED = [
    (tree(tensor_parallel={"autotp_size": 2}), "tensor_parallel is not supported: .*stage 3"),
    (tree(pipeline={"stages": 2}), "pipeline is not supported"),
    (tree(sequence_parallel_size=2), "sequence_parallel_size is not supported"),
    (tree(data_efficiency={"enabled": True}), "data_efficiency is not supported: .*rows"),
    (tree(hybrid_engine={"enabled": True}), "hybrid_engine"),
    (tree(elasticity={"enabled": True}), "elasticity .*resume_from_checkpoint"),
    (tree(gradient_allreduce_op="sum"), "gradient_allreduce_op"),
    (tree(curriculum_learning={"enabled": True}), "curriculum_learning.* no longer"),
    (tree(gradient_acumulation_steps=2), "none of DeepSpeed's.*Did you mean 'gradient_accumulation_steps'"),
    (tree(nonsense=1), "'nonsense' is none of DeepSpeed's"),
    (tree(optimizer="AdamW"), "optimizer must be"),
    (tree(optimizer={"type": "AdamW"}), "optimizer.params is missing"),
    (tree(scheduler={"type": "WarmupLR", "params": 3}), "scheduler.params is missing"),
    (tree({"offload_optimizer": {"device": "nvme"}}), "offload_optimizer.device=nvme needs nvme_path"),
    (tree({"offload_param": {"device": "nvme", "nvme_path": ""}}), "offload_param.device=nvme needs nvme_path"),
    (tree({"zenflow": {"topk_ratio": 0.1}}), "zenflow is not supported"),
    (tree({"stage3_use_all_reduce_for_fetch_params": True}), "fetch_params is not supported: .*dtype"),
    (tree({"zero_hpz_partition_size": 3}), "zero_hpz_partition_size=3 does not divide the number of ranks .4."),
]


@pytest.mark.parametrize(("configuration", "said"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_a_run_cannot_have_is_refused_by_name(monkeypatch, configuration, said):
    """Else DeepSpeed passes over it in silence, or fails after the model was loaded."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises((Unsupported, UserError), match=said) as caught:
        check_keys(configuration)
    assert "\n" not in str(caught.value)


UNREADABLE = [
    (tree({"nonsense": 1}), "zero_optimization.nonsense is none of DeepSpeed's"),
    (tree({"overlap_com": True}), "Did you mean 'overlap_comm'"),
    (tree({"mics_shard_size": 4}), "mics_shard_size"),
    (tree({"overlap_comm": "abc"}), "overlap_comm: .*boolean"),
    (tree({"offload_optimizer": {"device": "gpu"}}), "offload_optimizer.device"),
    (tree(communication_data_type="nonsense"), "communication_data_type"),
    (tree(torch_autocast={"enabled": True, "dtype": "nonsense"}), "nonsense"),
    (tree(bf16={"enabled": "abc"}), "enabled: .*boolean"),
]


@pytest.mark.parametrize(("configuration", "said"), UNREADABLE, ids=lambda value: str(value)[:60])
def test_what_deepspeed_cannot_read_is_one_line(configuration, said):
    check_keys(configuration)
    with pytest.raises(UserError, match=said) as caught:
        check_read(configuration)
    assert str(caught.value).startswith("engine.config: ") and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the operators")
def test_quantised_gradients_need_a_gpu():
    """Else the first step ends in a traceback."""
    with pytest.raises(UserError, match="zero_quantized_gradients=true needs a GPU"):
        check_read(tree({"zero_quantized_gradients": True}))


def test_keys_of_stage_3_are_named_at_other_stages(capsys):
    check_read(tree({"stage": 2, "zero_hpz_partition_size": 2, "offload_param": {"device": "none"}}))
    out = capsys.readouterr()
    said = out.out + out.err
    assert "zero_hpz_partition_size has no effect at stage 2" in said and "offload_param" not in said


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_shipped_configurations_are_read(path):
    configuration = json.loads(path.read_text())
    check_keys(configuration)
    check_read(configuration)


def test_what_is_off_or_a_comment_is_let_through():
    off = {"data_efficiency": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}, "sparse_gradients": False}
    check_keys(tree(**off, _comment="of ours", steps_per_print=10))


def test_other_errors_stay_as_they_are():
    """A fault of this project, or of a model, is no fault of the configuration."""
    with pytest.raises(AssertionError, match="ours"), deepspeed_refusals():
        raise AssertionError("ours")
