"""The plan's sum of parts against independent measurements: torch's own memory tracker, and real runs on the CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker

from adalora_scale.cluster.plan.memory import describe, memory_of
from adalora_scale.cluster.plan.model import build, pieces
from adalora_scale.cluster.plan.request import Hardware, Request
from adalora_scale.cluster.plan.trace import trace_step
from adalora_scale.cluster.plan.weights import pretended_ranks, sharded_weights
from adalora_scale.config import Fsdp2Config, load_config
from adalora_scale.engines.fsdp2_place import Fsdp2, row_weights, shard_fsdp2
from adalora_scale.engines.planned import SCORE_STATISTICS
from tests.conftest import ROOT
from tests.distributed.launcher import build_deepspeed_ops, run_ranks

TOLERANCE = 0.05
WORKER = Path(__file__).parent / "workers" / "weigh_run.py"


def write_shape(folder, **changes):
    shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    shape |= {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
    path = folder / f"shape{len(list(folder.iterdir()))}.json"
    path.write_text(json.dumps(shape | changes))
    return str(path)


def request(folder, *overrides, **options):
    config = load_config(
        ROOT / "configs" / "recipes" / "llama3_70b_qadalora.yaml",
        [
            f"model.model_name_or_path={write_shape(folder)}",
            "data.max_length=256",
            "training.per_device_train_batch_size=2",
            "training.gradient_accumulation_steps=1",
            *overrides,
        ],
    )
    options = {"gpus": 4, "whole_logits": True} | options
    return Request(config=config, hardware=Hardware(context=0), **options)


def planned(asked, engine, *, gpu=False):
    """Return the plan's bytes without the score's statistics, which torch's trackers do not run."""
    model = describe(build(asked))
    activations = trace_step(
        asked,
        sequences=asked.sequences,
        checkpointing=asked.checkpointing,
        autocast=engine == "ddp",
        hooked=engine == "zero3",
        gpu=gpu,
    )
    if not gpu:
        model = dataclasses.replace(model, workspace=0)  # the CPU's kernel needs none in the forward
    memory = memory_of(engine, asked, model, activations)
    memory.parts = [part for part in memory.parts if part.name != SCORE_STATISTICS]
    return memory


def peak_total(tracker):
    return next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]


@pytest.mark.parametrize(
    ("checkpointing", "bits", "ranks", "vocabulary"),
    [
        ("true", "true", 16, 1000),  # few logits: the blocks decide
        pytest.param("true", "true", 2, 1000, marks=pytest.mark.full),
        *(
            pytest.param(checkpointing, bits, ranks, 8000, marks=pytest.mark.full)
            for checkpointing in ("true", "false")
            for bits in ("true", "false")
            for ranks in (2, 16)
        ),
    ],
)
def test_fsdp2_agrees_with_a_fake_tensor_trace_of_the_sharded_model(tmp_path, checkpointing, bits, ranks, vocabulary):
    """Else the plan's all-gather buffers, or its two blocks, are a story."""
    shape = write_shape(tmp_path, vocab_size=vocabulary)
    options = [f"training.gradient_checkpointing={checkpointing}", f"model.load_in_4bit={bits}"]
    asked = request(tmp_path, *options, f"model.model_name_or_path={shape}", gpus=ranks)
    with pretended_ranks(ranks):
        model = build(asked)
        if checkpointing == "true":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        shard_fsdp2(model, Fsdp2Config(), device_type="cpu", bf16=True)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            tracker = FSDPMemTracker(model, optimizer)
            ids = torch.zeros(2, 256, dtype=torch.long)
            mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
            tracker.track_inputs((ids, mask))
            with tracker:
                for step in range(2):  # Adam's moments appear in the first
                    model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if step == 0:
                        tracker.reset_mod_stats()
    traced = peak_total(tracker)
    assert planned(asked, "fsdp2").device == pytest.approx(traced, rel=TOLERANCE)


class Tracker(MemTracker):
    """torch 2.13's puts hooks on frozen parameters too, which fails; they only sort bytes into kinds."""

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)


@pytest.mark.parametrize("checkpointing", ["true", pytest.param("false", marks=pytest.mark.full)])
def test_one_process_agrees_with_a_fake_tensor_trace_of_all_blocks(tmp_path, checkpointing):
    """Else two blocks do not stand for six."""
    asked = request(tmp_path, f"training.gradient_checkpointing={checkpointing}", gpus=1)
    model = build(asked)
    if checkpointing == "true":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        tracker = Tracker()
        tracker.track_external(model, optimizer)
        ids = torch.zeros(2, 256, dtype=torch.long)
        mask = torch.ones(2, 1, 256, 256, dtype=torch.bool)
        with tracker:
            for step in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
    assert planned(asked, "ddp").device == pytest.approx(peak_total(tracker), rel=TOLERANCE)


@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_the_rule_for_row_shards_is_what_fully_shard_does(tmp_path, ranks):
    """Else the search for the smallest cluster uses other bytes than the plan."""
    asked = request(tmp_path, gpus=ranks)
    shard = Fsdp2().sharder(device_type="cpu", bf16=True)
    assert row_weights(pieces(build(asked)), ranks) == sharded_weights(asked, shard)
    assert not dist.is_initialized()


ZERO = {"bf16": {"enabled": True}, "zero_force_ds_cpu_optimizer": False}
ZERO2 = ZERO | {"zero_optimization": {"stage": 2, "reduce_bucket_size": 200000, "overlap_comm": False}}
ZERO3 = ZERO | {
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": 200000,
        "stage3_prefetch_bucket_size": 200000,
        "stage3_param_persistence_threshold": 5120,
        "stage3_max_live_parameters": 3000000,
        "stage3_max_reuse_distance": 3000000,
    }
}


@pytest.mark.parametrize(
    ("engine", "ranks", "checkpointing", "tiles"),
    [
        ("ddp", 1, "true", 1),
        ("fsdp2", 2, "true", 1),
        ("ddp", 1, "false", 4),
        pytest.param("ddp", 1, "true", 4, marks=pytest.mark.full),
        pytest.param("ddp", 1, "false", 1, marks=pytest.mark.full),
        pytest.param("fsdp2", 2, "false", 1, marks=pytest.mark.full),
        pytest.param("fsdp2", 2, "true", 4, marks=pytest.mark.full),
        pytest.param("fsdp2", 3, "true", 1, marks=pytest.mark.full),
        pytest.param("zero2", 2, "true", 1, marks=pytest.mark.full),
        pytest.param("zero3", 2, "true", 1, marks=pytest.mark.full),
    ],
)
def test_a_real_run_on_the_cpu_takes_the_planned_bytes(tmp_path, engine, ranks, checkpointing, tiles):
    """Else the plan is right about itself only."""
    options = [f"training.gradient_checkpointing={checkpointing}", f"training.tiled_mlp={tiles}"]
    if engine.startswith("zero"):
        build_deepspeed_ops()
        options.append("engine.name=deepspeed")
        options.append(f"engine.config={json.dumps(ZERO2 if engine == 'zero2' else ZERO3)}")
    asked = request(tmp_path, *options, gpus=ranks)
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps(asked.config.to_dict()))
    measured = max(rank["peak"] for rank in run_ranks(WORKER, ranks, [engine, str(config)], timeout=400))
    model = dataclasses.replace(describe(build(asked)), workspace=0)
    hooked = engine == "zero3"
    traced = trace_step(
        asked, sequences=2, checkpointing=asked.checkpointing, autocast=engine == "ddp", hooked=hooked, gpu=False
    )
    memory = memory_of(engine, asked, model, traced)
    assert memory.device == pytest.approx(measured, rel=TOLERANCE), memory.peak_parts()
