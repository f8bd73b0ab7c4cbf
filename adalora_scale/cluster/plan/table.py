"""The plan as text."""

from __future__ import annotations

from adalora_scale.cluster.plan.planner import Plan
from adalora_scale.cluster.plan.request import ASSUMED_GPU, Hardware
from adalora_scale.messages import printable


def table(plan: Plan) -> str:
    """Return the parts of the run's engine, the engines side by side, and the recommendation."""
    return "\n".join([*_header(plan), "", *_parts(plan), "", *_engines(plan), "", *_advice(plan)])


def _header(plan: Plan) -> list[str]:
    request, config = plan.request, plan.request.config
    bits = "4-bit" if config.model.load_in_4bit else config.model.torch_dtype
    nodes = f" on {request.nodes} nodes" if request.nodes > 1 else ""
    return [
        f"{printable(config.model.model_name_or_path)}, {bits} base, {config.adalora.init_r} triplets a matrix at the "
        "start",
        f"{request.gpus} GPU{'s' * (request.gpus > 1)}{nodes}: {_gpu(request.hardware)}",
        f"{request.sequences} sequences of "
        f"{config.data.max_length} tokens a micro-batch, {request.accumulation} micro-batches a step, activations "
        f"{'recomputed' if request.checkpointing else 'kept'}",
    ]


def _gpu(hardware: Hardware) -> str:
    """Name the GPU of the plan, and say so where the user did not."""
    memory = f"{_gb(hardware.gpu.memory)} GB"
    if hardware.name is not None:
        return f"{hardware.name}, {memory}"
    return f"{ASSUMED_GPU} assumed, {memory}; name yours with --gpu"


def _parts(plan: Plan) -> list[str]:
    memory = plan.own_row.memory
    lines = [f"{plan.own}: bytes on the fullest GPU, at its worst moment ({memory.moment})"]
    for part in memory.peak_parts():
        lines.append(f"  {part.name:<30} {_gb(part.bytes):>9} GB   {part.note}".rstrip())
    room = plan.request.hardware.gpu.memory
    lines.append(f"  {'sum':<30} {_gb(memory.device):>9} GB   of {_gb(room)} GB")
    if memory.host:
        lines.append(f"  {'on the host, a rank':<30} {_gb(memory.host):>9} GB")
    kept = "with activations kept" if plan.request.checkpointing else "with activations recomputed"
    lines.append(f"  {kept:<30} {_gb(plan.without_checkpointing):>9} GB")
    first, last = plan.adapter_bytes
    lines.append(f"  all adapters: {_gb(first)} GB at init_r, {_gb(last)} GB once pruned to target_r and compacted")
    return lines


def _engines(plan: Plan) -> list[str]:
    heads = ("engine", "device GB", "fits", "micro-batch ≤", "gather GB", "reduce GB", "step s", "tokens/s")
    form = "{:<9} {:>10} {:>5} {:>14} {:>10} {:>10} {:>8} {:>10} {:>9} {:>14}"
    lines = [form.format(*heads, "load s", "host GB a node")]
    for row in plan.rows:
        speed, load = row.speed, row.load
        timed = speed.means_something(plan.request)
        lines.append(
            form.format(
                row.engine,
                _gb(row.memory.device),
                "yes" if row.fits else "no",
                row.largest_micro_batch or "-",
                _gb(speed.gathered),
                _gb(speed.reduced),
                f"{speed.step_s:.2f}" if timed else "-",
                f"{speed.tokens_per_s:,.0f}" if timed else "-",
                f"{load.seconds:.0f}",
                _gb(load.host_bytes),
            )
        )
    hardware = plan.request.hardware
    if not hardware.timed:
        lines.append(
            f"gather and reduce: a rank, a step. No seconds and tokens/s: {ASSUMED_GPU}'s would not be your card's; "
            f"give --gpu or --peak-tflops."
        )
        return lines
    if not any(row.speed.means_something(plan.request) for row in plan.rows):
        lines.append(
            "No seconds and tokens/s: steps this short are bound by the start of kernels, which is not planned."
        )
    lines.append(
        f"gather and reduce: a rank, a step. Times assume {hardware.gpu.tflops:g} TFLOP/s x {hardware.efficiency:g}, "
        f"{hardware.gpu.link_bandwidth / 1e9:g} GB/s between GPUs of a node, {hardware.node_bandwidth / 1e9:g} GB/s a "
        f"GPU between nodes, {hardware.disk_bandwidth / 1e9:g} GB/s of disk a node."
    )
    return lines


def _advice(plan: Plan) -> list[str]:
    row, room = plan.own_row, plan.request.hardware.gpu.memory
    lines = []
    if (a_node := plan.request.gpus // plan.request.nodes) > 8:
        lines.append(
            f"note: --nodes {plan.request.nodes} puts {a_node} GPUs into a node, at the speed of links within it"
        )
    if row.fits:
        lines.append(
            f"fits: {_gb(room - row.memory.device)} GB to spare; largest micro-batch {row.largest_micro_batch}"
        )
    else:
        lines.append(f"does not fit: {_gb(row.memory.device - room)} GB too much on every GPU")
        lines += [f"  would fit: {way}" for way in plan.ways_out] or ["  nothing that was tried would fit"]
    if plan.smallest is not None:
        count, engine, needed = plan.smallest
        lines.append(f"fewest GPUs: {count} with {engine} and one sequence a micro-batch ({_gb(needed)} GB each)")
    return lines


def _gb(count: float) -> str:
    return f"{count / 1e9:,.2f}" if count < 1e11 else f"{count / 1e9:,.0f}"
