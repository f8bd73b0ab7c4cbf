"""Runs over a mixture of experts through `adalora-scale train`, a rank of which is killed: the same command goes on.

The mixture is the matrix's, whose routing does not hang on rounding (`verify/mixture.py`), so that another engine can
be compared too.
"""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.cli import main
from adalora_scale.verify.mixture import EXPERTS, mixture
from benchmarks.chaos.verdict import differences
from tests.distributed.launcher import RankFailure, run_ranks
from tests.distributed.test_trainer_engines import PER_TENSOR, TOGETHER, distances
from tests.distributed.workers import killed_run

WORKER = Path(killed_run.__file__)
STEPS, FINAL, EVERY = 20, 12, 4
"""A checkpoint every fourth step; tinit is 2, the final allocation at 12."""
ENGINES = {"fsdp2": ["engine.name=fsdp2"], "zero3": ["--deepspeed", "configs/deepspeed/zero3.json"]}
PRESETS = {"16": "paper", "4": "default"}
"""By bits of the base: what keeps statistics of every weight, and what people use."""
STORED = "stored"
"""In 4 bits on disk already, and not quantised while it is loaded."""
END_S = 240
"""A start may take that long, the end of a group whose rank was killed included."""
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The mixture with a tokenizer of bytes, and a few rows."""
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    mixture().save_pretrained(folder / "base")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", "<pad>", *letters[:-3]]  # the last three stand for bytes that no text here has
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder / "base")
    rows = [{"prompt": f"{n * 37 % 101} + {n} is", "completion": f" {n * 37 % 101 + n}."} for n in range(120)]
    assert main(["quantize", str(folder / "base"), str(folder / STORED), "--compute-dtype", "float32"]) == 0
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def train(base, request):
    """Run the command on two ranks into a folder; `at` is when the last rank is killed, after which all end."""

    def start(engine, bits, folder, *extra, at="never", launcher="warm"):
        if engine == "zero3":
            request.getfixturevalue("deepspeed_ops")
        tree = {
            "model": {"model_name_or_path": str(base / (STORED if bits == STORED else "base")),
                      "torch_dtype": "float32"},
            "data": {"train": str(base / "rows.jsonl"), "format": "prompt_completion", "max_length": 48},
            "adalora": {"init_r": 6, "target_r": 4, "lora_alpha": 12, "tinit": 2, "tfinal": STEPS - FINAL, "deltaT": 2,
                        "preset": PRESETS.get(bits, "default")},
            "training": {"max_steps": STEPS, "learning_rate": 3e-4, "per_device_train_batch_size": 4,
                         "logging_steps": 1, "save_steps": EVERY, "save_total_limit": 20, "seed": 3,
                         "resume_from_checkpoint": "auto"},
        }  # fmt: skip
        if bits != "16":
            tree["model"] |= {"load_in_4bit": bits == "4", "bnb_4bit_compute_dtype": "float32"}
        (base / f"{bits}.json").write_text(json.dumps(tree))
        env = {"DS_ACCELERATOR": "cpu"} if engine == "zero3" else {}
        command = [at, "--config", base / f"{bits}.json", *ENGINES[engine], f"training.output_dir={folder}", *extra]
        if at == "never":
            return run_ranks(WORKER, 2, command, launcher=launcher, timeout=END_S, env=env)[0].output
        with pytest.raises(RankFailure, match="failed with exit code") as failed:  # and not that it hung
            run_ranks(WORKER, 2, command, launcher=launcher, timeout=END_S, env=env)
        assert failed.value.ranks[1].output.endswith("killed\n"), failed.value.ranks[1].output
        return failed.value.ranks[0].output

    return start


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """The folder of a run that nobody disturbs, its experts adapted and as many bits as asked for."""

    @functools.cache
    def run(engine, bits):
        folder = tmp_path_factory.mktemp("undisturbed") / "out"
        said = train(engine, bits, folder)
        assert ("4-bit base: 85.3% of the linear weights" in said) == (bits != "16")  # 16.5 % without experts
        final = allocations(folder)[FINAL]
        assert len({final[f"model.layers.1.mlp.experts.{e}.down_proj"] for e in range(EXPERTS)}) > 1
        return folder

    return run


def allocations(folder):
    """Step → ranks of every matrix."""
    rows = map(json.loads, (folder / "ranks.jsonl").read_text().splitlines())
    return {row["step"]: row["ranks"] for row in rows}


def until(step, folder, to):
    """Copy a run's folder as it was when its checkpoint of a step was the last."""
    shutil.copytree(folder, to)
    for path in to.glob("checkpoint-*"):
        if int(path.name.partition("-")[2]) > step:
            shutil.rmtree(path)
    return to


def newest(folder):
    return max(int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*"))


def adapters_apart(folder, other):
    return distances(*(load_file(path / "adapter_model.safetensors") for path in (folder, other)))


@pytest.mark.shows(
    "features",
    feature="killed over experts in 4 bits, same end",
    engine=lambda given: given["engine"] if given["bits"] == "4" else None,
)
@pytest.mark.parametrize("bits", PRESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_killed_run_ends_bit_for_bit_as_the_undisturbed_one(undisturbed, train, tmp_path, engine, bits):
    """Else a preempted run is another run, or the ranks that are left wait for the one that is gone."""
    whole, folder = undisturbed(engine, bits), tmp_path / "out"
    train(engine, bits, folder, at="update:7", launcher="torchrun")
    assert newest(folder) == EVERY
    said = train(engine, bits, folder, at=f"saving:{FINAL + EVERY}")  # the mask is frozen by then
    assert f"(step {EVERY} of {STEPS}" in said and newest(folder) == FINAL
    assert list(folder.glob(f".checkpoint-{FINAL + EVERY}*"))
    assert f"(step {FINAL} of {STEPS}" in train(engine, bits, folder)
    assert differences(whole, folder) == []


@pytest.mark.parametrize("bits", PRESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_killed_at_pruned_ranks_goes_on_bit_for_bit(undisturbed, train, tmp_path, engine, bits):
    """Else padding of one expert comes back as another's triplet."""
    wide, asked = undisturbed(engine, bits), "training.resume_compact=true"
    straight, killed = (until(FINAL, wide, tmp_path / name) for name in ("straight", "killed"))
    assert "built at their pruned ranks" in train(engine, bits, straight, asked)
    train(engine, bits, killed, asked, at=f"forward:{STEPS - 2}")
    assert newest(killed) == FINAL + EVERY and Checkpoint(killed / f"checkpoint-{FINAL + EVERY}").manifest["compact"]
    assert f"(step {FINAL + EVERY} of {STEPS}" in train(engine, bits, killed, asked)
    assert differences(straight, killed) == []
    together, worst = adapters_apart(straight, wide)
    print(f"{engine}, {bits} bits: pruned and wide {together:.1e}, worst tensor {worst:.1e}")
    assert together <= TOGETHER and worst <= PER_TENSOR


@pytest.mark.parametrize("engine", ENGINES)
def test_experts_stored_in_4_bits_train_the_same_adapter_and_are_killed_likewise(undisturbed, train, tmp_path, engine):
    """Else quantising once, offline, is another base than quantising at every start."""
    made, whole, folder = undisturbed(engine, "4"), undisturbed(engine, STORED), tmp_path / "out"
    assert adapters_apart(made, whole) == (0, 0)
    train(engine, STORED, folder, at="update:7")
    assert f"(step {EVERY} of {STEPS}" in train(engine, STORED, folder)
    assert differences(whole, folder) == []


@pytest.mark.parametrize("step", [EVERY * 2, FINAL])
@pytest.mark.parametrize(
    ("source", "target", "bits"), [("fsdp2", "zero3", "4"), ("zero3", "fsdp2", "4"), ("fsdp2", "zero3", "16")]
)
def test_another_engine_goes_on_to_the_same_adapter(undisturbed, train, tmp_path, source, target, bits, step):
    """Else experts are cut where the other engine does not look, or a 4-bit base is another one there."""
    whole, folder = undisturbed(source, bits), tmp_path / "out"
    said = train(target, bits, folder, f"training.resume_from_checkpoint={whole / f'checkpoint-{step}'}")
    assert f"(step {step} of {STEPS}" in said and ("built at their pruned ranks" in said) == (step == FINAL)
    expected = {at: ranks for at, ranks in allocations(whole).items() if at > step}
    assert {at: ranks for at, ranks in allocations(folder).items() if at > step} == expected
    assert bool(expected) == (step < FINAL)
    together, worst = adapters_apart(folder, whole)
    print(f"{source} to {target} at {step}, {bits} bits: together {together:.1e}, worst tensor {worst:.1e}")
    assert together <= TOGETHER and worst <= PER_TENSOR
