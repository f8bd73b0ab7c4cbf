"""Memory and reading while a base loads: peak resident memory of every rank, and bytes read, against their bounds.

    python benchmarks/load_memory.py                            # 1 GB, 2 ranks, FSDP2 and ZeRO-3, 4 bits and bf16
    python benchmarks/load_memory.py --engine zero3 --ranks 4 --four-bit --output FILE

A random Llama's checkpoint is written in bf16 to a temporary folder, file by file, and loaded by `place_model` as
training does, on real ranks (gloo, CPU). Two verdicts, and exit code 1 if one fails:

    peak    resident memory while loading ≤ the interpreter's baseline + what the rank holds in the end + two decoder
            layers in bf16, for every rank (sharded engines)
    read    bytes read ≤ 1.1 × checkpoint / ranks, for every rank (FSDP2)

The baseline is the resident memory after imports, the process group's start and its first collective. The peak is the
kernel's own (VmHWM), reset before loading and after every tensor, so the table can also say where it was.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from adalora_scale.config import AdaLoraConfig, DataConfig, EngineConfig, ModelConfig, RunConfig
from adalora_scale.engines import zero_place
from adalora_scale.engines.registry import engine_for
from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.files import write_json
from adalora_scale.placing import model as placing
from adalora_scale.placing import streaming
from adalora_scale.quantization.base_files import INDEX_NAME
from adalora_scale.quantization.functional import bitsandbytes
from adalora_scale.training.arguments import training_arguments
from adalora_scale.training.records import hardware, versions
from adalora_scale.verify.memory import storage_bytes

ENGINES = ("fsdp2", "zero3", "ddp")
READ_TOLERANCE = 1.1
FILE_BYTES = 200 * 10**6
ZERO3 = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
_ROW = "{:<6} {:<5} {:>4}  {:>9}  {:>9}  {:>9}  {:>9}  {:>9}  {:<5} {:>9}  {:>9}  {:<7} {}"


def main() -> int:
    """Write the checkpoint, start the ranks of every run, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the checkpoint, 1e9 bytes (default 1)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks on this machine (default 2)")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=["fsdp2", "zero3"], help="one run each")
    parser.add_argument("--four-bit", action=argparse.BooleanOptionalAction, help="default: a run each way")
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model (default 1024)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="rows of the embedding (default 32000)")
    parser.add_argument("--checkpoint", type=Path, help="make the checkpoint here, keep it, and use it if it is there")
    parser.add_argument("--timeout", type=int, default=500, help="seconds for the ranks of one run (default 500)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--rank-of", metavar="JSON", help=argparse.SUPPRESS)  # how this script starts its ranks
    arguments = parser.parse_args()
    if arguments.rank_of:
        return run_reporting_errors(lambda: _rank(SimpleNamespace(**json.loads(arguments.rank_of))))
    return run_reporting_errors(lambda: _benchmark(arguments))


def _benchmark(arguments: argparse.Namespace) -> int:
    for option in ("gigabytes", "ranks", "hidden", "vocabulary", "timeout"):
        if getattr(arguments, option) <= 0:
            raise UserError(f"--{option} is {getattr(arguments, option)}; it must be positive.")
    with tempfile.TemporaryDirectory(prefix="load_memory_") as scratch:
        folder = (arguments.checkpoint or Path(scratch) / "checkpoint").absolute()
        if not (folder / INDEX_NAME).is_file():
            write_checkpoint(folder, arguments.gigabytes, arguments.hidden, arguments.vocabulary)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(
            f"checkpoint: {size / 1e9:.3f} GB of bf16 in {len(list(folder.glob('*.safetensors')))} files; figures in MB"
        )
        print(_ROW.format("engine", "base", "rank", "baseline", "shard", "2 layers", "bound", "peak", "", "read",
                          "at most", "", "peak at"))  # fmt: skip
        runs = []
        for engine in arguments.engine:
            for four_bit in [arguments.four_bit] if arguments.four_bit is not None else [True, False]:
                ranks = _start(arguments, folder, Path(scratch), engine, four_bit)
                runs.append(_judged(ranks, engine, four_bit, size))
    passed = all(entry["passed"] for entry in runs)
    print("every bound holds" if passed else "a bound does NOT hold")
    if arguments.output:
        shape = {key: getattr(arguments, key) for key in ("gigabytes", "ranks", "hidden", "vocabulary")}
        figures = {"shape": shape, "checkpoint_bytes": size, "passed": passed, "runs": runs}
        figures |= {"versions": versions(), "hardware": hardware()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, figures)
    return 0 if passed else 1


def write_checkpoint(folder: Path, gigabytes: float, hidden: int, vocabulary: int) -> None:
    """Write a random Llama of about so many gigabytes in bf16 with an index, never more than one file in memory."""
    # 11/4 is TinyLlama's ratio; 64 weights a head as usual.
    shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4, "vocab_size": vocabulary}
    shape |= {"num_attention_heads": max(1, hidden // 64), "num_key_value_heads": max(1, hidden // 64)}
    layer = 2 * (4 * hidden**2 + 3 * hidden * shape["intermediate_size"])
    layers = max(2, round((gigabytes * 1e9 - 4 * hidden * vocabulary) / layer))
    config = LlamaConfig(num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", **shape)
    with init_empty_weights():
        model = LlamaForCausalLM(config)
    files: list[list[tuple[str, Tensor]]] = [[]]
    for name, tensor in model.state_dict().items():
        if files[-1] and 2 * sum(held.numel() for _, held in [*files[-1], (name, tensor)]) > FILE_BYTES:
            files.append([])
        files[-1].append((name, tensor))
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, content in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        drawn = {
            name: torch.randn(tensor.shape, generator=generator).mul_(0.02).to(torch.bfloat16)
            for name, tensor in content
        }
        save_file(drawn, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(drawn, file)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def _start(arguments: argparse.Namespace, folder: Path, scratch: Path, engine: str, four_bit: bool) -> list[Any]:
    """Load on real ranks and return what each measured; none of them outlives the time-out."""
    answer = scratch / "ranks.json"
    # GPUs are hidden: host memory is what is measured here.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")])
    )
    if engine == "zero3":  # compiled once, not within the ranks' time
        build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
        subprocess.run([sys.executable, "-c", build], env=environment, timeout=500, capture_output=True, check=False)
    answer.unlink(missing_ok=True)
    job = {"checkpoint": str(folder), "engine": engine, "four_bit": four_bit, "answer": str(answer)}
    job |= {"scratch": str(scratch), "timeout": arguments.timeout}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "--rank-of", json.dumps(job)]
    log = scratch / "ranks.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = process.wait(arguments.timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun ends its ranks; each also has an alarm of its own
                process.wait(60)
    if code != 0 or not answer.exists():
        what = f"did not end in {arguments.timeout} s" if code is None else f"failed with exit code {code}"
        print(log.read_text(errors="replace")[-6000:], file=sys.stderr)
        raise UserError(f"the ranks of {engine} {what}; their output is above.")
    return cast(list[Any], json.loads(answer.read_text()))


def _judged(ranks: list[dict[str, Any]], engine: str, four_bit: bool, size: int) -> dict[str, Any]:
    """Compare every rank with the bounds and print a line each."""
    passed = True
    allowed = READ_TOLERANCE * size / len(ranks) if engine == "fsdp2" else None
    for rank, own in enumerate(ranks):
        bound = own["baseline_bytes"] + own["shard_bytes"] + own["two_layers_bytes"]
        own |= {"bound_bytes": bound, "peak_verdict": "pass" if own["peak_bytes"] <= bound else "fail"}
        if engine == "ddp":
            own["peak_verdict"] = "none"  # every rank holds all of it: no bound was promised
        own["read_verdict"] = "none" if allowed is None else "pass" if own["bytes_read"] <= allowed else "fail"
        passed &= "fail" not in (own["peak_verdict"], own["read_verdict"])
        figures = (f"{own[key] / 1e6:,.1f}" for key in
                   ("baseline_bytes", "shard_bytes", "two_layers_bytes", "bound_bytes", "peak_bytes"))  # fmt: skip
        read = "" if own["bytes_read"] is None else f"{own['bytes_read'] / 1e6:,.1f}"
        most = "" if allowed is None else f"{allowed / 1e6:,.1f}"
        base = "4-bit" if four_bit else "bf16"
        verdicts = own["peak_verdict"], read, most, own["read_verdict"]
        print(_ROW.format(engine, base, rank, *figures, *verdicts, own["peak_at"]), flush=True)
    return {"engine": engine, "four_bit": four_bit, "ranks": ranks, "passed": passed}


class PeakMeter:
    """The most resident memory since it was made, and during which piece of work.

    Raises:
        UserError: this kernel does not let a process reset its peak.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.where = ""
        self._reset()

    def mark(self, work: str) -> None:
        """Say that a piece of work has ended."""
        if (seen := _status("VmHWM")) > self.peak:
            self.peak, self.where = seen, work
        self._reset()

    def _reset(self) -> None:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present VmRSS
        except OSError as error:
            raise UserError(f"/proc/self/clear_refs cannot be written ({error.strerror}); run this on Linux.") from None


def _rank(job: SimpleNamespace) -> int:
    """Load as training does, and let rank 0 write what every rank measured."""
    signal.alarm(job.timeout + 60)  # ends this process whatever it waits for
    config = _run_config(job)
    engine = engine_for(config.engine)
    arguments = training_arguments(config, engine)
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    set_seed(arguments.seed)
    if job.engine == "zero3":
        import deepspeed

        deepspeed.init_distributed()
    if job.four_bit:
        bitsandbytes()
    dist.all_reduce(torch.ones(1))
    begun: list[streaming.Loading] = []
    begin, advance, partition = streaming.begin, streaming.progress._advance, zero_place.partition_zero3
    started, baseline = time.perf_counter(), _status("VmRSS")
    meter = PeakMeter()

    def noted_begin(*given: Any, **options: Any) -> streaming.Loading:
        begun.append(begin(*given, **options))
        meter.mark("reading headers")
        return begun[-1]

    def noted_advance(self: streaming.progress, slot: Any) -> None:
        advance(self, slot)
        meter.mark(slot.name)

    def noted_partition(parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
        meter.mark("materialising for ZeRO-3")
        partition(parameters, options)
        meter.mark(f"partitioning {sum(p.ds_numel for p in parameters):,} elements")  # type: ignore[attr-defined]

    with (
        mock.patch.object(streaming, "begin", noted_begin),
        mock.patch.object(streaming.progress, "_advance", noted_advance),
        mock.patch.object(zero_place, "partition_zero3", noted_partition),
        engine.loading() as settled,
    ):
        model = placing.place_model(config, settled, arguments)
    meter.mark("the end")
    own = {
        "baseline_bytes": baseline,
        "shard_bytes": storage_bytes(_held(model)),
        "two_layers_bytes": 4 * _layer_weights(job.checkpoint),
        "peak_bytes": meter.peak,
        "peak_at": meter.where,
        "resident_after_bytes": _status("VmRSS"),
        "bytes_read": begun[0].plan.checkpoint.bytes_read if begun else None,
        "seconds": round(time.perf_counter() - started, 2),
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if dist.get_rank() == 0:
        Path(job.answer).write_text(json.dumps(everyone))
    dist.barrier()
    del model
    gc.collect()  # else its meshes keep gloo's threads alive while the interpreter ends (pytorch#179291)
    dist.destroy_process_group()
    return 0


def _run_config(job: SimpleNamespace) -> RunConfig:
    name: Any = "deepspeed" if job.engine == "zero3" else job.engine
    return RunConfig(
        model=ModelConfig(model_name_or_path=job.checkpoint, torch_dtype="bfloat16", load_in_4bit=job.four_bit),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(),
        engine=EngineConfig(name=name, config=ZERO3 if job.engine == "zero3" else None),
        training={"output_dir": job.scratch, "bf16": True},
    )


def _held(model: nn.Module) -> Iterator[Tensor]:
    """Yield every tensor of the model that this rank holds."""
    for parameter in model.parameters():
        yield parameter
        if (partition := getattr(parameter, "ds_tensor", None)) is not None:
            yield partition
    yield from model.buffers()


def _layer_weights(folder: str) -> int:
    """Count the weights of one decoder layer."""
    with init_empty_weights():
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    return sum(parameter.numel() for parameter in model.model.layers[0].parameters())


def _status(field: str) -> int:
    """Read a figure of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise UserError(f"/proc/self/status does not say {field}; run this on Linux.")


if __name__ == "__main__":
    sys.exit(main())
