"""Cells of the contract suite: for every engine the vendor's options that move memory, reorder parameters or round.

A cell with a `key` may be refused instead of being right, if the message contains that key; a cell without one must
equal one process. `precision` says what "equal" means, see `TOLERANCES` in workers/contract.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One configuration of one engine."""

    zero: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's `zero_optimization`, or arguments of fully_shard or DistributedDataParallel."""
    config: dict[str, Any] = field(default_factory=dict)
    """The rest of DeepSpeed's configuration."""
    key: str | None = None
    precision: str = "exact"
    between: str | None = None
    """What happens after a step: "offload:STATES" moves an engine's states away and back at every step; "load" writes
    DeepSpeed's checkpoint and reads it back after step 5, "assign" gives a model new parameters then."""
    wrap: str | None = None
    """How FSDP2 wraps the model, or what DDP is combined with."""
    ranks: tuple[int, ...] = (2, 3, 4)


BF16 = {"bf16": {"enabled": True}}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
OPTIMIZER_ON_CPU = {"offload_optimizer": {"device": "cpu"}}
PARAMETERS_ON_CPU = {"offload_param": {"device": "cpu"}}

_FLAT = {
    "plain": Cell(),
    "round-robin": Cell(zero={"round_robin_gradients": True}, key="round_robin_gradients"),
    "alignment": Cell(zero={"parameter_alignment": True}, key="parameter_alignment"),
    "round-robin-alignment": Cell(
        zero={"round_robin_gradients": True, "parameter_alignment": True}, key="round_robin_gradients"
    ),
    "round-robin-offload": Cell(zero={"round_robin_gradients": True, **OPTIMIZER_ON_CPU}, key="round_robin_gradients"),
    "round-robin-bf16": Cell(
        zero={"round_robin_gradients": True}, config=BF16, precision="bf16", key="round_robin_gradients"
    ),
    "no-contiguous": Cell(zero={"contiguous_gradients": False}),
    "no-reduce-scatter": Cell(zero={"reduce_scatter": False}),
    "overlap": Cell(zero={"overlap_comm": True}),
    "no-allgather-partitions": Cell(zero={"allgather_partitions": False}),
    "single-rank-buckets": Cell(zero={"use_multi_rank_bucket_allreduce": False}),
    "small-buckets": Cell(zero={"reduce_bucket_size": 64, "allgather_bucket_size": 64}),
    "communicate-bf16": Cell(config={"communication_data_type": "bf16"}, precision="rounded-gradients"),
    "communicate-fp32": Cell(config={"communication_data_type": "fp32"}),
    "predivide": Cell(zero={"reduce_scatter": False}, config={"prescale_gradients": True}),
    "offload": Cell(zero=OPTIMIZER_ON_CPU),
    "offload-overlap": Cell(zero={**OPTIMIZER_ON_CPU, "overlap_comm": True}),
    "bf16": Cell(config=BF16, precision="bf16"),
    "bf16-offload": Cell(zero=OPTIMIZER_ON_CPU, config=BF16, precision="bf16"),
    "bf16-communicate-fp32": Cell(config=BF16 | {"communication_data_type": "fp32"}, precision="bf16"),
    "bf16-fp32-sums": Cell(config=BF16 | FP32_SUMS, precision="bf16"),
    "autocast": Cell(config={"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, precision="bf16"),
    "loaded": Cell(between="load", key="load_checkpoint"),
    "states-away": Cell(between="offload:all", key="offload_states"),
    "masters-away": Cell(between="offload:hp_params", key="offload_states"),
    "copies-away": Cell(between="offload:lp_params", key="offload_states"),
    "moments-away": Cell(between="offload:optim_states", key="offload_states"),
    "states-away-unpinned": Cell(between="offload:all:unpinned", key="offload_states"),
    "bf16-states-away": Cell(config=BF16, precision="bf16", between="offload:all", key="offload_states"),
}

CELLS: dict[str, dict[str, Cell]] = {
    "zero1": _FLAT
    | {
        "immediate": Cell(
            config={"bf16": {"enabled": True, "immediate_grad_update": True}} | FP32_SUMS,
            precision="bf16",
            key="immediate_grad_update",
        ),
        "immediate-bf16-sums": Cell(
            config={"bf16": {"enabled": True, "immediate_grad_update": True}},
            precision="bf16",
            key="immediate_grad_update",
        ),
        "fp32-sums-loaded": Cell(config=BF16 | FP32_SUMS, precision="bf16", between="load", key="load_checkpoint"),
    },
    "zero2": _FLAT,
    "zero3": {
        "plain": Cell(),
        "sub-groups": Cell(zero={"sub_group_size": 200}),
        "persistent-none": Cell(zero={"stage3_param_persistence_threshold": 0}),
        "persistent-all": Cell(zero={"stage3_param_persistence_threshold": 1_000_000}),
        "persistent-some": Cell(
            zero={"stage3_param_persistence_threshold": 1000, "stage3_model_persistence_threshold": 200}
        ),
        "hpz": Cell(zero={"zero_hpz_partition_size": 2}, key="zero_hpz_partition_size", ranks=(2, 4)),
        "hpz-bf16": Cell(
            zero={"zero_hpz_partition_size": 2},
            config=BF16,
            precision="bf16",
            key="zero_hpz_partition_size",
            ranks=(2, 4),
        ),
        "overlap": Cell(zero={"overlap_comm": True}),
        "no-overlap": Cell(zero={"overlap_comm": False}),
        "no-contiguous": Cell(zero={"contiguous_gradients": False}),
        "no-reduce-scatter": Cell(zero={"reduce_scatter": False}, key="reduce_scatter"),
        "round-robin": Cell(zero={"round_robin_gradients": True}, key="round_robin_gradients"),
        "small-buckets": Cell(zero={"reduce_bucket_size": 64, "stage3_prefetch_bucket_size": 64}),
        "few-live": Cell(zero={"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}),
        "fetch-by-all-reduce": Cell(zero={"stage3_use_all_reduce_for_fetch_params": True}),
        "communicate-bf16": Cell(config={"communication_data_type": "bf16"}, precision="rounded-gradients"),
        "communicate-fp32": Cell(config={"communication_data_type": "fp32"}),
        "offload": Cell(zero=OPTIMIZER_ON_CPU),
        "offload-parameters": Cell(zero={**OPTIMIZER_ON_CPU, **PARAMETERS_ON_CPU}),
        "offload-parameters-sub-groups": Cell(zero={**OPTIMIZER_ON_CPU, **PARAMETERS_ON_CPU, "sub_group_size": 200}),
        "bf16": Cell(config=BF16, precision="bf16"),
        "bf16-fp32-sums": Cell(config=BF16 | FP32_SUMS, precision="bf16"),
        "bf16-sub-groups-offload": Cell(
            zero={**OPTIMIZER_ON_CPU, "sub_group_size": 200}, config=BF16, precision="bf16"
        ),
        "gradients-away": Cell(between="offload:lp_grads", key="offload_states"),
        "buckets-away": Cell(between="offload:contiguous_grad_buffer", key="offload_states"),
        "loaded": Cell(between="load", key="load_checkpoint"),
        "cache-emptied": Cell(between="empty_partition_cache"),
    },
    "fsdp2": {
        "plain": Cell(),
        "root-only": Cell(wrap="root"),
        "nested": Cell(wrap="nested"),
        "reshard": Cell(zero={"reshard_after_forward": True}),
        "no-reshard": Cell(zero={"reshard_after_forward": False}),
        "reshard-to-1": Cell(zero={"reshard_after_forward": 1}),
        "reshard-to-2": Cell(zero={"reshard_after_forward": 2}, ranks=(4,)),
        "offload": Cell(zero={"offload": True}),
        "compute-bf16": Cell(zero={"param": "bfloat16"}, precision="bf16"),
        "reduce-bf16": Cell(zero={"reduce": "bfloat16"}, precision="rounded-gradients"),
        "compute-bf16-reduce-fp32": Cell(zero={"param": "bfloat16", "reduce": "float32"}, precision="bf16"),
        "compute-bf16-no-reshard": Cell(
            zero={"param": "bfloat16", "reduce": "float32", "reshard_after_forward": False}, precision="bf16"
        ),
        "replicated": Cell(wrap="mesh:replicate", ranks=(2, 3)),
        "hybrid-by-one": Cell(wrap="mesh:shard", ranks=(2, 3)),
        "hybrid": Cell(wrap="mesh:hybrid", ranks=(4,)),
        "hybrid-offload": Cell(wrap="mesh:hybrid", zero={"offload": True}, ranks=(4,)),
        "hybrid-reshard-to-1": Cell(wrap="mesh:hybrid", zero={"reshard_after_forward": 1}, ranks=(4,)),
        "replicated-offload": Cell(wrap="mesh:replicate", zero={"offload": True}, ranks=(2, 3)),
        "head-by-columns": Cell(zero={"columns": True}, key="Shard(0)", ranks=(2,)),
        "unsharded-between-steps": Cell(wrap="keep-unsharded", key="reshard"),
        "fused": Cell(wrap="fused"),
    },
    "ddp": {
        "plain": Cell(),
        "bucket-views": Cell(zero={"gradient_as_bucket_view": True}),
        "static-graph": Cell(zero={"static_graph": True}),
        "no-broadcast-buffers": Cell(zero={"broadcast_buffers": False}),
        "tiny-buckets": Cell(zero={"bucket_cap_mb": 0.0001}),
        "tiny-bucket-views": Cell(zero={"bucket_cap_mb": 0.0001, "gradient_as_bucket_view": True}),
        "find-unused": Cell(zero={"find_unused_parameters": True}),
        "compressed": Cell(wrap="fp16-hook", precision="rounded-gradients"),
        "redundancy": Cell(wrap="redundancy", key="ZeroRedundancyOptimizer"),
        "redundancy-views": Cell(wrap="redundancy-views", key="ZeroRedundancyOptimizer"),
        "fused": Cell(wrap="fused"),
        "replaced": Cell(between="assign", key="attach"),
    },
}


def cells_for(engine: str, ranks: int) -> list[str]:
    """Return the names of an engine's cells that this number of ranks can run."""
    return [name for name, cell in CELLS[engine].items() if ranks in cell.ranks]
