"""A continued run is the uninterrupted one: weights, masks, metrics; what cannot be continued says so."""

import json
import math
import os
import random
import resource
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from adalora_scale.checkpoint.format import Checkpoint, CheckpointError, checkpoints
from adalora_scale.errors import INTERRUPTED_EXIT_CODE, Interrupted, UserError
from adalora_scale.export.exporting import export_adapter
from adalora_scale.export.request import Request
from adalora_scale.training.run import make_trainer, prepare, train
from tests.conftest import ROOT
from tests.training.short_run import STEPS, assert_same, config, records


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.shows("features", feature="resumed bit for bit on as many ranks", engine="one process")
@pytest.mark.parametrize("step", [2, 6, 8, 10, 12, STEPS])
def test_continued_run_is_the_uninterrupted_one_bit_for_bit(step, crashed, straight):
    """PEFT's AdaLoRA loses Ī and Ū at a resume; stock trainers restart the sums of a log line."""
    folder = crashed(step)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')  # the line that was being written
    (folder / f".checkpoint-{step + 2}.partial").mkdir()
    train(config(folder, "training.resume_from_checkpoint=auto"))
    assert_same(folder, straight)
    assert not list(folder.glob(".checkpoint*"))


def test_auto_starts_where_there_is_nothing(tmp_path, straight):
    """The same command starts a run and goes on with it, so a scheduler can just start it again."""
    train(config(tmp_path / "out", "training.resume_from_checkpoint=auto"))
    assert_same(tmp_path / "out", straight)


def test_a_checkpoint_of_another_folder_continues_here(tmp_path, straight):
    """Branching a run must leave the original alone."""
    before = sorted(path.name for path in straight.iterdir())
    train(config(tmp_path / "new", f"training.resume_from_checkpoint={straight}/checkpoint-6"))
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "new" / adapter).read_bytes() == (straight / adapter).read_bytes()
    assert sorted(path.name for path in straight.iterdir()) == before
    assert records(tmp_path / "new" / "metrics.jsonl") == records(straight / "metrics.jsonl")


def distances(folder, straight):
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, straight))
    assert ours.keys() == theirs.keys()
    squares = {
        n: ((ours[n].double() - w.double()).square().sum(), w.double().square().sum()) for n, w in theirs.items()
    }
    together = math.sqrt(sum(d for d, _ in squares.values()) / sum(w for _, w in squares.values()))
    return together, max(math.sqrt(d / w) if w > 0 else d for d, w in squares.values())


SMOOTH = "adalora.lora_dropout=0.0"
"""Another micro-batch draws other dropout."""


@pytest.fixture(scope="module")
def smooth(tmp_path_factory):
    """The uninterrupted run without dropout."""
    folder = tmp_path_factory.mktemp("smooth") / "out"
    train(config(folder, SMOOTH))
    return folder


def test_another_micro_batch_and_pruned_ranks_meet_the_criterion(smooth, tmp_path, capfd):
    """After the final allocation a continued run must cost less, and end at the same adapter."""
    reference = smooth
    for step, built in ((6, False), (10, True), (12, True)):
        folder = tmp_path / f"micro-{step}"
        shutil.copytree(reference, folder)
        micro = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=4"]
        train(config(folder, SMOOTH, *micro, f"training.resume_from_checkpoint={folder}/checkpoint-{step}"))
        assert ("at their pruned ranks" in capfd.readouterr().out) == built
        together, worst = distances(folder, reference)
        assert together <= 1e-5 and worst <= 5e-5
        assert records(folder / "ranks.jsonl") == records(reference / "ranks.jsonl")
        last = Checkpoint(folder / f"checkpoint-{STEPS}")
        masks = last.manifest["allocator"]["mask"]
        for name, shape in last.shapes("adapter").items():
            kept = masks[name.rpartition(".")[0]].count("1")
            assert shape[-1] == (kept if built else 6)
        assert any(set(bits) == {"0"} for bits in masks.values())  # some module was left without a triplet


def test_pruned_ranks_continue_bit_for_bit_too(smooth, tmp_path):
    """A compacted run that is interrupted again must find its own ranks."""
    first, second = tmp_path / "first", tmp_path / "second"
    start = f"training.resume_from_checkpoint={smooth}/checkpoint-12"
    train(config(first, SMOOTH, start, "training.resume_compact=true", "training.save_steps=1"))
    shutil.copytree(first, second)
    shutil.rmtree(second / f"checkpoint-{STEPS}")
    (second / "adapter_model.safetensors").unlink()
    train(config(second, SMOOTH, "training.resume_from_checkpoint=auto"))
    adapter = "adapter_model.safetensors"
    assert (second / adapter).read_bytes() == (first / adapter).read_bytes()
    third = tmp_path / "third"  # and back to full columns
    train(
        config(third, SMOOTH, f"training.resume_from_checkpoint={first}/checkpoint-13", "training.resume_compact=false")
    )
    assert distances(third, smooth)[1] <= 5e-5
    last = second / f"checkpoint-{STEPS}"
    assert Checkpoint(last).manifest["compact"]
    folders = [tmp_path / name for name in ("of-run", "of-checkpoint")]
    for adapter, folder in zip((second, last), folders, strict=True):  # which has nothing of a module of rank 0
        export_adapter(Request(adapter=adapter, output=folder, format="merged", fidelity=False))
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert not Checkpoint(third / f"checkpoint-{STEPS}").manifest["compact"]


def test_pruned_ranks_draw_the_same_dropout(straight, tmp_path, capfd):
    """Modules that are left out draw none; so must those that keep zero columns, else the two part."""
    start = f"training.resume_from_checkpoint={straight}/checkpoint-12"
    train(config(tmp_path / "out", start, "training.resume_compact=true"))
    assert "at their pruned ranks" in capfd.readouterr().out
    together, worst = distances(tmp_path / "out", straight)
    assert together <= 1e-5 and worst <= 5e-5


CHANGED = {
    "learning rate": ("training.learning_rate=1e-3", "training.learning_rate"),
    "schedule": ("adalora.deltaT=3", "adalora.deltaT"),
    "rows": ("data.max_train_samples=60", "data_fingerprint"),
    "global batch": ("training.gradient_accumulation_steps=1", "global_batch"),
    "seed": ("training.seed=5", "training.seed"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_run_is_refused_with_what_changed(case, crashed):
    """Going on with other data or another schedule gives a model that no config describes."""
    override, key = CHANGED[case]
    folder = crashed(6)
    with pytest.raises(UserError) as caught:
        train(config(folder, "training.resume_from_checkpoint=auto", override))
    assert key in str(caught.value) and "training.resume_allow_changed" in str(caught.value)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]


FIXED = {
    "steps": ("training.max_steps=20", "total_step"),
    "triplets": ("adalora.init_r=8", "adalora.init_r"),
    "unit": ("adalora.budget_unit=triplets", "adalora.budget_unit"),
    "modules": ("adalora.target_modules=[q_proj]", "adalora.target_modules"),
}


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("case", FIXED)
def test_what_cannot_differ_is_not_offered(case, allow, crashed):
    """An offer that ends in the next refusal is none; the way that works is named."""
    override, key = FIXED[case]
    folder = crashed(6)
    allowed = [f"training.resume_allow_changed=[{key}]"] if allow else []
    with pytest.raises(UserError, match=f"{key}.*cannot differ.*model.adapter_path={folder}") as caught:
        train(config(folder, "training.resume_from_checkpoint=auto", override, *allowed))
    assert "resume_allow_changed=" not in str(caught.value)


def test_another_base_is_refused(crashed, tmp_path):
    """The same names and shapes with other weights must not pass for the same model."""
    from safetensors.torch import save_file

    folder, base = crashed(6), tmp_path / "base"
    shutil.copytree(ROOT / "launch" / "quickstart" / "base_model", base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    weights[name] = weights[name] + 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="base_fingerprint"):
        train(config(folder, "training.resume_from_checkpoint=auto", f"model.model_name_or_path={base}"))


def test_allowed_changes_take_effect_from_the_checkpoint_on(crashed):
    """A user who lowers the learning rate on purpose must get the lower one, on the schedule's place."""
    folder = crashed(6)
    allow = "training.resume_allow_changed=[training.learning_rate]"
    old = records(folder / "metrics.jsonl")
    train(config(folder, "training.resume_from_checkpoint=auto", "training.learning_rate=1e-3", allow))
    new = records(folder / "metrics.jsonl")
    ratio = 1e-3 / config(folder).training["learning_rate"]
    assert new[:2] == old[:2]
    for before, after in zip(old[2:4], new[2:4], strict=True):
        assert after["learning_rate"] == pytest.approx(before["learning_rate"] * ratio)
    with pytest.raises(UserError, match=r"resume_allow_changed: 'learning_rate'.*training\.learning_rate"):
        train(config(folder, "training.resume_from_checkpoint=auto", "training.resume_allow_changed=[learning_rate]"))


def damage(path, draw):
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    if draw.random() < 0.3:
        content = content[:place]
    else:
        content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def test_damage_is_refused_by_name_or_skipped_by_auto(crashed, straight, capfd):
    """A checkpoint half written to a failing disk must cost two steps, not the run."""
    folder = crashed(8)
    path = folder / "checkpoint-8" / "pieces-00000-of-00001.safetensors"
    damage(path, random.Random(1))
    for asked in (folder / "checkpoint-8", "true"):
        with pytest.raises(CheckpointError, match=str(path)):
            train(config(folder, f"training.resume_from_checkpoint={asked}"))
    train(config(folder, "training.resume_from_checkpoint=auto"))
    assert f"skipped: {path} is damaged" in capfd.readouterr().out
    assert_same(folder, straight)
    assert (folder / "abandoned-checkpoint-8").is_dir() and (folder / "checkpoint-8").is_dir()
    for left in checkpoints(folder):
        damage(left / "manifest.json", random.Random(2))
    with pytest.raises(CheckpointError, match="starting anew would overwrite"):
        train(config(folder, "training.resume_from_checkpoint=auto"))


def test_nothing_to_resume_is_said_before_the_model_is_loaded(tmp_path):
    """Else a typing error in the path costs the loading of a 70 B model."""
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        prepare(config(tmp_path / "out", "training.resume_from_checkpoint=true"))
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(UserError, match="not complete"):
        prepare(config(tmp_path / "out", f"training.resume_from_checkpoint={tmp_path}/checkpoint-3"))


def test_a_byte_of_the_base_that_changed_is_named(crashed, straight, tmp_path):
    """Samples of each weight do not see it, and the run trains on over another base and ends as done."""
    folder, base = crashed(6), tmp_path / "base"
    shutil.copytree(ROOT / "launch" / "quickstart" / "base_model", base)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    first = 8 + int.from_bytes(whole[:8], "little")
    options = (f"model.model_name_or_path={base}", "training.resume_from_checkpoint=auto")
    for place in (0.001, 0.999, 0.5):
        at = first + int(place * (len(whole) - first))
        weights.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(
            UserError, match=r"the base's model.safetensors is not the file .*allow_changed=\[base_files\]"
        ):
            train(config(folder, *options))
    train(config(folder, *options, "training.resume_allow_changed=[base_files]"))
    shutil.rmtree(folder)
    weights.write_bytes(whole)
    train(config(crashed(6), *options))
    assert_same(folder, straight)


class SendSignal:
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number, step):
        self.number, self.step = number, step

    def __call__(self, trainer):
        inner = trainer.training_step

        def training_step(*args, **kwargs):
            if trainer.state.global_step == self.step:
                os.kill(os.getpid(), self.number)
            return inner(*args, **kwargs)

        trainer.training_step = training_step


@pytest.mark.shows("features", feature="stopped by a signal", engine="one process")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_leaves_a_checkpoint_and_the_code_to_requeue_on(number, tmp_path, straight):
    """Preemption would cost the time since the last checkpoint, and a scheduler could not tell it from a failure."""
    settings = config(tmp_path / "out", "training.save_strategy=no")
    trainer = make_trainer(settings, prepare(settings))
    SendSignal(number, 6)(trainer)
    with pytest.raises(Interrupted) as caught:
        trainer.train()
    assert caught.value.code == INTERRUPTED_EXIT_CODE == 85
    assert signal.getsignal(number) == signal.SIG_DFL
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-7"]
    left = json.loads((tmp_path / "out" / "requeue").read_text())
    assert left == {"step": 7, "signal": number.name}
    train(config(tmp_path / "out", "training.resume_from_checkpoint=auto"))
    assert not (tmp_path / "out" / "requeue").exists()
    assert_same(tmp_path / "out", straight)


def test_a_full_disk_says_so_and_leaves_the_checkpoint_before(crashed, straight):
    """Else the only good checkpoint may go for a half one, or a traceback is all there is to read."""
    folder = crashed(6)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    settings = config(folder, "training.resume_from_checkpoint=auto", "training.save_total_limit=1")
    trainer = make_trainer(settings, prepare(settings))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))  # the kernel then refuses the rest of a file
    try:
        with pytest.raises(CheckpointError, match=r"pieces-00000-of-00001\.safetensors cannot be written: .*[Ff]ile"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-6", "checkpoint-4", "checkpoint-2"]
    assert not list(folder.glob(".checkpoint*"))
    train(config(folder, "training.resume_from_checkpoint=auto"))
    assert_same(folder, straight)


def test_size_is_that_of_the_adapter_and_its_state(straight):
    """Stock checkpoints hold the frozen base, up to twice (95 GB for a 463 MB adapter)."""
    for step in (2, 8, 12):
        folder = straight / f"checkpoint-{step}"
        shapes = Checkpoint(folder).shapes("adapter")
        adapter = 4 * sum(math.prod(shape) for shape in shapes.values())
        size = sum(path.stat().st_size for path in folder.iterdir())
        assert size <= 1.1 * 5 * adapter, (size, adapter)
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_limit_keeps_the_newest(tmp_path):
    """The last good checkpoint must survive whatever the limit is."""
    train(config(tmp_path / "out", "training.save_total_limit=1"))
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"checkpoint-{STEPS}"]
    train(config(tmp_path / "out", "training.overwrite_output_dir=true", "training.save_total_limit=2"))
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 2}"]
    assert (tmp_path / "out" / f"abandoned-checkpoint-{STEPS}").is_dir()
