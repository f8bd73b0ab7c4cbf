"""Preflight as a user starts it: alone, under torchrun, deepspeed and srun, and the part that train.py runs first."""

import json
import os
import socket
import subprocess
import sys

import pytest
import yaml

from adalora_scale.cluster.place import Place, launched
from tests.cluster.overlay import other_version
from tests.conftest import ROOT

BASE = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(ROOT),
    "GLOO_SOCKET_IFNAME": "lo",
}
TORCHRUN = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]


def start(*arguments, env=None, timeout=240):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment | BASE | (env or {}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def answer(result):
    lines = [line for line in result.stdout.splitlines() if line.startswith("{")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_config(tmp_path):
    rows = [{"text": f"a row {number}"} for number in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "model": {"model_name_or_path": str(ROOT / "launch" / "quickstart" / "base_model")},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 16},
        "adalora": {"init_r": 2, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 4, "per_device_train_batch_size": 1},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / "run.yaml")


def test_one_process_checks_what_it_can_and_says_what_it_cannot(tmp_path):
    """Else a user thinks links were checked."""
    config = train_config(tmp_path)
    result = start("adalora_scale", "preflight", "--json", "--config", config)
    found = answer(result)
    assert result.returncode == 0 and found["passed"]
    status = {finding["check"]: finding["status"] for finding in found["findings"]}
    assert status["links"] == "skipped" and status["versions"] == "ok" and status["disk write"] == "ok"
    assert "disk read" in status
    table = start("adalora_scale", "preflight").stdout
    assert table.splitlines()[-1] == "passed" and "skipped  links" in table


def test_a_limit_that_is_missed_fails_with_figure_and_limit(tmp_path):
    """Else thresholds are decoration."""
    (tmp_path / "strict.yaml").write_text("shared_memory_min_gib: 1.0e+9\n")
    result = start("adalora_scale", "preflight", "--thresholds", str(tmp_path / "strict.yaml"))
    assert result.returncode == 1
    assert "at least 1e+09 are needed" in result.stdout and result.stdout.splitlines()[-1].startswith("FAILED: 1 of")


def test_two_deepspeed_ranks_pass(tmp_path):
    """Else it works under torchrun alone."""
    launcher = ["deepspeed.launcher.runner", "--num_gpus", "2", "--master_addr", "127.0.0.1"]
    launcher += ["--master_port", str(free_port()), "--no_local_rank", "--module", "adalora_scale", "preflight"]
    result = start(*launcher, "--json", env={"DS_ACCELERATOR": "cpu"})
    found = answer(result)
    assert found["passed"] and found["backend"] == "gloo" and len(found["links"]) == 2


def test_two_srun_ranks_pass(tmp_path):
    """Else srun without torchrun leaves every task alone. The variables are those of a real srun step."""
    port = str(free_port())
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, "-m", "adalora_scale", "preflight", "--json"]
    tasks = [
        subprocess.Popen(
            command,
            env=os.environ | BASE | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=180)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert json.loads(outputs[0].splitlines()[-1])["world_size"] == 2


def test_two_srun_ranks_train(tmp_path):
    """srun sets no RANK: every task would take itself for the one that holds output_dir."""
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}
    step |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", train_config(tmp_path)]
    tasks = [
        subprocess.Popen(
            [*command, "training.overwrite_output_dir=true"],
            cwd=ROOT,
            env=os.environ | BASE | step | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for task in range(2)
    ]
    outputs = [task.communicate(timeout=180)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    assert "done: " in outputs[0]


def test_an_srun_step_is_translated(monkeypatch):
    """Else ranks of unequal nodes mistake their number of neighbours."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what is set below
        monkeypatch.delenv(name)
    assert launched() is None
    step = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}
    step |= {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "123456", "MASTER_ADDR": "first"}
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert launched() == Place(rank=6, world_size=7, local_rank=0, local_world_size=1)
    assert os.environ["MASTER_PORT"] == "23456" and os.environ["MASTER_ADDR"] == "first"


def test_training_stops_at_a_rank_with_another_package_version(tmp_path):
    """Else ranks that compute different things train on, or hang in the first collective."""
    config = train_config(tmp_path)
    odd = other_version(tmp_path / "odd", "tokenizers", "0.0.1")["PYTHONPATH"]
    worker = tmp_path / "odd_train.py"  # rank 1's path is what PYTHONPATH would make of it
    worker.write_text(
        f"import os, sys\nif os.environ['RANK'] == '1':\n    sys.path.insert(0, {odd.split(os.pathsep)[0]!r})\n"
        "from adalora_scale.cli import train_main\nif __name__ == '__main__':\n    sys.exit(train_main())\n"
    )
    result = start(*TORCHRUN, str(worker), "--config", config)
    assert result.returncode == 1
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: preflight: versions: rank 1 on ") and "tokenizers 0.0.1" in lines[0]
    assert 'Traceback (most recent call last):\n  File "' + str(worker) not in result.stderr
    skipped = start(*TORCHRUN, str(worker), "--config", config, "--skip-preflight")
    assert "error: preflight" not in skipped.stderr


def test_training_of_equal_ranks_passes_the_quick_part(tmp_path):
    """Else the store that preflight used breaks the process group that follows."""
    result = start(*TORCHRUN, "launch/train.py", "--config", train_config(tmp_path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert "done: " in result.stdout


@pytest.mark.full
def test_an_output_dir_that_cannot_be_written_stays_a_mistake_of_the_config(tmp_path):
    """Else the exit code says that the cluster is sick."""
    config = train_config(tmp_path)
    (tmp_path / "run").write_text("a file")
    result = start(*TORCHRUN, "launch/train.py", "--config", config)
    assert "is a file; name a folder." in result.stderr and "preflight" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thresholds", "none.yaml"], "--thresholds: none.yaml cannot be read: No such file"),
        (["--thresholds", "{bad}"], "unknown key 'open_file_min'. Did you mean 'open_files_min'?"),
        (["--thresholds", "{negative}"], "gloo.link_min_share is -1.0; it must be zero or more."),
        (["--thresholds", "{word}"], "shared_memory_min_gib: Input should be a valid number"),
        (["--time-limit", "0"], "--time-limit is 0; it must be"),
        (["training.output_dir=x"], "pass --config FILE too"),
        (["--config", "none.yaml"], "--config: none.yaml cannot be read"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, arguments, message, capsys):
    """Else a slip looks like a sick cluster."""
    from adalora_scale.cli import main

    files = {"bad": "open_file_min: 3", "negative": "gloo: {link_min_share: -1}", "word": "shared_memory_min_gib: lots"}
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    paths = {name: str(tmp_path / f"{name}.yaml") for name in files}
    assert main(["preflight", *(argument.format(**paths) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_weights_that_are_not_there_fail(tmp_path):
    """A volume that one host did not mount is found here, not by its rank after the others have loaded."""
    config = train_config(tmp_path)
    result = start("adalora_scale", "preflight", "--config", config, "model.model_name_or_path=/no/such/weights")
    assert result.returncode == 1
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("FAIL "))
    assert "disk read" in line and "/no/such/weights: No such file" in line
