"""A disk that is full, whatever is being written: one line, exit code 2, and what was there before is whole."""

import json
import os
import signal
import subprocess
import sys

import pytest
import yaml

from adalora_scale.cli import main, train_main
from adalora_scale.data.token_cache import build_once
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.files import replace_text
from adalora_scale.training import run as running
from adalora_scale.training import trainers
from adalora_scale.training.records import JsonLines
from adalora_scale.verify.command import Request
from tests.conftest import ROOT
from tests.disks import fill, small_disk
from tests.export.adapters import base_and_run, copy, export, load, logits, one_error_line

FULL = "No space left on device"


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """A base, and an adapter on it with the base's tokenizer beside it."""
    return base_and_run("stories260k", tmp_path_factory.mktemp("made"), request)


def everything(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def one_line(capsys, call, *words):
    """The call ends with exit code 2 and one line that says the words."""
    said = one_error_line(capsys, call)
    assert all(word in said for word in words), said


@pytest.mark.parametrize("left", [0, 8192])
def test_export_keeps_the_one_before(made, disk, capsys, left):
    """Half an export, or none, in place of the one that is being served."""
    base, run = made
    form = ["--base", base, "--format", "peft-adalora", "--no-fidelity"]
    export(run, disk / "out", *form)
    fill(disk, but=left)
    before = everything(disk)
    one_line(capsys, lambda: main(["export", str(run), str(disk / "out"), *map(str, form), "--overwrite"]), FULL, "out")
    assert everything(disk) == before and sorted(p.name for p in disk.iterdir()) == ["filler", "out"]


@pytest.mark.parametrize("left", [0, 8192, 65536])
def test_quantize_keeps_the_one_before(made, disk, capsys, left):
    """Its shards are written by safetensors, whose error is Rust's and was a traceback."""
    call = ["quantize", str(made[0]), str(disk / "out")]
    assert main(call) == 0
    fill(disk, but=left)
    before = everything(disk)
    one_line(capsys, lambda: main([*call, "--overwrite"]), FULL, "out")
    assert everything(disk) == before and sorted(p.name for p in disk.iterdir()) == ["filler", "out"]


def test_an_adapter_made_smaller_in_a_temporary_folder_is_one_line(made, disk, tmp_path, capsys, monkeypatch):
    """Pruning writes to the system's temporary folder, which is often the smallest disk of all."""
    fill(disk, but=4096)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    call = ["export", str(made[1]), str(tmp_path / "out"), "--format", "peft-lora", "--prune-to", "50%"]
    one_line(capsys, lambda: main([*call, "--no-fidelity"]), FULL, str(disk))
    assert not (tmp_path / "out").exists() and [path.name for path in disk.iterdir()] == ["filler"]


@pytest.mark.parametrize("left", [0, 12288])
def test_saving_an_adapter_keeps_the_one_before(made, disk, tmp_path, left):
    """Two files belong together; half of one, left behind, keeps the disk full."""
    base, run = made
    out = copy(run, disk / "out")
    model = load_adapter(load(base, "stories260k"), run, trainable=True)
    fill(disk, but=left)
    before = everything(disk)
    with pytest.raises(UserError, match=f"out cannot be written: {FULL}"):
        save_adapter(model, out)
    assert everything(disk) == before and sorted(path.name for path in disk.iterdir()) == ["filler", "out"]
    (disk / "filler").unlink()
    save_adapter(model, out)
    assert logits(load_adapter(load(base, "stories260k"), out)).equal(
        logits(load_adapter(load(base, "stories260k"), run))
    )


@pytest.fixture
def config(tmp_path, disk, stories260k):
    """A short run that writes to the disk."""
    rows = [{"prompt": f"Count to {n}.", "completion": f" The answer is {n}."} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "model": {"model_name_or_path": str(stories260k)},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "adalora": {"init_r": 3, "target_r": 2},
        "training": {"output_dir": str(disk / "out"), "per_device_train_batch_size": 2, "max_steps": 4,
                     "save_strategy": "no", "logging_steps": 1, "overwrite_output_dir": True},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(tmp_path / "run.yaml"), "--skip-preflight"]


# What is written next when the disk is full, and how much is left: enough for what is smaller.
MOMENTS = {
    "adapter": (trainers, "save_adapter", 0, ["out"]),
    "tokenizer": (trainers.AdaLoraSFTTrainer, "save_model", 0, ["out"]),
    "run.json": (running, "_write_run", 0, ["run.json"]),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_end_of_a_run_keeps_the_one_before(config, disk, capsys, monkeypatch, moment):
    """The last files of a long run came as a traceback, a cut tokenizer.json was taken for the new one."""
    assert train_main(config) == 0
    before = {name: value for name, value in everything(disk).items() if not name.endswith(".jsonl")}
    home, name, left, words = MOMENTS[moment]
    real = getattr(home, name)

    def on_a_full_disk(*arguments, **options):
        if moment == "tokenizer":  # the adapter is written, and then the disk is full
            monkeypatch.setattr(trainers, "save_adapter", lambda *a, **k: (saves(*a, **k), fill(disk, but=left)))
        else:
            fill(disk, but=left)
        return real(*arguments, **options)

    saves = trainers.save_adapter
    monkeypatch.setattr(home, name, on_a_full_disk)
    one_line(capsys, lambda: train_main(config), FULL, *words)
    after = everything(disk)
    assert before.items() <= after.items()
    assert not [name for name in after if "partial" in name]


def test_the_requeue_note_is_one_line_and_the_checkpoint_is_there(config, disk, capsys, monkeypatch):
    """A scheduler reads the note; a traceback in its place says nothing of the checkpoint that was written."""
    from adalora_scale.training import checkpointing

    real = checkpointing.write_checkpoint

    def signalled(*arguments, **options):
        written = real(*arguments, **options)
        fill(disk)
        return written

    def stop(self, *arguments, **options):
        os.kill(os.getpid(), signal.SIGUSR1)
        return steps(self, *arguments, **options)

    steps = trainers.AdaLoraSFTTrainer.training_step
    monkeypatch.setattr(checkpointing, "write_checkpoint", signalled)
    monkeypatch.setattr(trainers.AdaLoraSFTTrainer, "training_step", stop)
    one_line(capsys, lambda: train_main(config), FULL, "requeue")
    names = sorted(path.name for path in (disk / "out").iterdir())
    assert "requeue" not in names and not [name for name in names if "partial" in name]
    assert [name for name in names if name.startswith("checkpoint-")]


def test_a_line_of_metrics_is_there_or_not(disk):
    """Half a line of JSON stops every reader of the file."""
    lines = JsonLines(disk / "metrics.jsonl")
    lines.write({"step": 1})
    fill(disk)
    with pytest.raises(UserError, match=f"metrics.jsonl cannot be written: {FULL}"):
        lines.write({"step": 2, "text": "x" * 10000})
    assert [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()] == [{"step": 1}]
    assert lines.lines == 1
    with pytest.raises(UserError, match=FULL):
        JsonLines(disk / "metrics.jsonl", keep=1)
    with pytest.raises(UserError, match=FULL):
        JsonLines(disk / "new" / "metrics.jsonl").write({"text": "x" * 10000})


def test_report_in_a_file_keeps_the_one_before(disk):
    """`verify-engines --json FILE` cut the report of the last time to nothing."""
    replace_text(disk / "report.json", "{}\n")
    fill(disk)
    with pytest.raises(UserError, match=rf"report\.json cannot be written: {FULL}"):
        replace_text(disk / "report.json", "x" * 10000)
    assert (disk / "report.json").read_text() == "{}\n"
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "report.json"]


def test_verify_engines_names_its_file_when_the_disk_is_full(disk, tmp_path):
    """The table took an hour; a traceback at its end, and an empty file, are what was left of it."""
    (disk / "report.json").write_text("{}\n")
    fill(disk)
    command = [sys.executable, "-m", "adalora_scale", "verify-engines", "--engines", "ddp", "--variants", "plain"]
    done = subprocess.run(
        [*command, "--steps", "24", "--json", str(disk / "report.json")],
        cwd=ROOT,
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost",
                          "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2 and len(errors) == 1 and "report.json" in errors[0] and FULL in errors[0], done.stderr
    assert (disk / "report.json").read_text() == "{}\n"


def test_report_into_a_folder_is_refused_before_the_work(tmp_path):
    """Else it is said after an hour."""
    with pytest.raises(UserError, match="is a folder"):
        Request(json_file=tmp_path)


def test_report_reaches_what_is_no_file(tmp_path):
    """A file renamed over /dev/stdout, or over a pipe, breaks the machine for everybody else."""
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    replace_text(tmp_path / "pipe", "{}\n")
    assert reader.communicate()[0] == "{}\n" and (tmp_path / "pipe").is_fifo()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "report.json").touch()
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "report.json")
    replace_text(tmp_path / "link.json", "{}\n")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real" / "report.json").read_text() == "{}\n"
    code = "from pathlib import Path; from adalora_scale.files import replace_text;"
    code += "print('table', flush=True); replace_text(Path('/dev/fd/1'), '{}\\n')"
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "table\n{}\n"


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["shorter than a buffer", "longer"])
def test_report_on_standard_output_is_one_line_too(made, form):
    """`… --json > FILE` on a full disk ended with exit code 120 and an exception that was ignored, or a traceback."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "adalora_scale", "inspect", str(made[1]), *form],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "standard output" in line and FULL in line


def test_sweep_says_it_in_one_line(config, disk, tmp_path, capsys):
    """Its own config is the first file that it writes."""
    fill(disk)
    call = ["sweep", *config[:2], "data.eval_fraction=0.25", "--output", str(disk / "sweep")]
    one_line(capsys, lambda: main(call), FULL, "sweep")
    assert [path.name for path in disk.iterdir() if path.is_file()] == ["filler"]


def test_cache_of_prepared_data_is_named(disk):
    """It lies in the home folder, far from everything that the config names."""
    (disk / "cache").mkdir()
    fill(disk)
    with pytest.raises(UserError, match=rf"cache, the cache of prepared data, .*{FULL}"):
        build_once(disk / "cache", "key", lambda folder: (folder / "rows").write_bytes(bytes(100_000)))
    assert not [path for path in (disk / "cache").iterdir() if path.is_dir()]


def test_limits_and_folders_that_cannot_be_written_are_one_line_too(made, tmp_path):
    """A quota, a read-only mount: the same contract, without the right to mount a disk."""
    places = {str(tmp_path / "out"): "File too large"}
    places |= dict.fromkeys(("/proc/nowhere/out", "/sys/out"), "cannot be written")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from adalora_scale.cli import main; import adalora_scale.placing.quantize, adalora_scale.placing.streaming;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "print([main(['quantize', sys.argv[1], out]) for out in sys.argv[2:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(made[0]), *places], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["[2, 2, 2]"], done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for line, (out, words) in zip(errors, places.items(), strict=True):
        assert words in line and out in line, done.stderr
    assert list(tmp_path.iterdir()) == []
