"""adalora-scale launch-check: what is refused before any rank starts, in one line that names the fix."""

import contextlib
import io
import shlex
import socket
import subprocess
import sys

import pytest

from adalora_scale import cli
from adalora_scale.cluster.launching.endpoint import check_endpoint
from adalora_scale.cluster.launching.hostfile import read_hostfile
from adalora_scale.cluster.launching.sbatch import check_sbatch
from adalora_scale.errors import UserError
from adalora_scale.training.batch import batch_sizes
from tests.conftest import ROOT

QUICKSTART = "configs/recipes/quickstart.yaml"


def launch_check(*arguments):
    """(exit code, {name: value} as a shell would read it, standard error)."""
    out, said = io.StringIO(), io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = cli.main(["launch-check", *map(str, arguments)])
    values = dict(word.split("=", 1) for line in out.getvalue().splitlines() for word in shlex.split(line))
    return code, values, said.getvalue()


# Hostfiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# only this\n", "names no host"),
        ("node-1 slots=8\nnode-2\n", "line 2: `node-2` is no host; write `name slots=8`"),
        ("node-1 slots = 8 max=9\n", "line 1: `node-1 slots = 8 max=9` is no host"),
        ("node-1 slots=eight\n", "line 1: slots=eight is no number"),
        ("node-1 slots=8\nnode-2 slots=0\n", "line 2: node-2 has slots=0"),
        ("node-1 slots=8\nnode-2 slots=8\nnode-1 slots=8\n", "line 3: node-1 stands in line 1 already"),
        ("node-1 slots=8\nNode-1 slots=8\n", "line 2: Node-1"),
        (
            "localhost slots=8\n127.0.0.1 slots=8\n",
            "line 2: 127.0.0.1 is localhost (127.0.0.1), which stands in line 1",
        ),
        ("node-1 slots=8\nnode-2 slots=4\n", "line 2: node-2 has slots=4, node-1 has slots=8; ranks need equal hosts"),
    ],
)
def test_a_hostfile_that_cannot_be_used(tmp_path, text, message):
    """Each of these starts something else than was meant, or ends in a launcher's traceback."""
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_hostfile_that_can(tmp_path):
    """Comments, empty lines and spaces are what people write."""
    path = tmp_path / "hosts"
    path.write_text("# ours\n\nnode-1   slots=8 # the first\n  10.0.0.7 slots = 8\n")
    assert [(host.name, host.slots, host.line) for host in read_hostfile(path)] == [
        ("node-1", 8, 3),
        ("10.0.0.7", 8, 4),
    ]
    with pytest.raises(UserError, match=r"cannot be read"):
        read_hostfile(tmp_path / "none")


# The rendezvous ------------------------------------------------------------------------------------------------------


def test_a_port_in_use_is_found_and_a_free_one_is_not_refused():
    """torchrun takes a stranger on the port for its own rendezvous and waits until a time-out."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} of this host .* Address already in use"):
            check_endpoint(f"127.0.0.1:{port}")
    endpoint = check_endpoint(f"localhost:{port}")
    assert (str(endpoint), endpoint.local_address) == (f"localhost:{port}", "127.0.0.1")
    assert 1024 <= check_endpoint("localhost:0").port <= 65535


@pytest.mark.parametrize("text", ["node-1", "node-1:", "node-1:http", "node-1:70000"])
def test_an_endpoint_that_is_none(text):
    """Else torchrun's parser answers."""
    with pytest.raises(UserError, match="write host:port"):
        check_endpoint(text)


def test_an_unknown_rendezvous_host():
    """`.invalid` is reserved to have no address, so that nothing is asked for it but the name."""
    with pytest.raises(UserError, match="has no address here"):
        check_endpoint("node-1.invalid:29400")


# sbatch files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("#SBATCH --nodes=$NODES", "line 2: SLURM does not expand `$NODES`"),
        ("#SBATCH --nodes=${NODES:-2}", "line 2: SLURM does not expand `${NODES"),
        ("#SBATCH --job-name=`date`", "line 2: SLURM does not expand ```"),
        ("#SBATCH --output=$HOME/%j.out", "line 2: SLURM does not expand `$HOME`"),
        ("#SBATCH --output=~/%j.out", "line 2: SLURM does not expand `~`"),
        ("#SBATCH -o no-such-folder/%j.out", "line 2: the folder no-such-folder does not exist"),
        ("#SBATCH --output=%x-%q.out", "line 2: SLURM knows no `%q`"),
        ("set -e\n#SBATCH --nodes=2", "line 3: SLURM stops reading #SBATCH at the first command (line 2)"),
        ("# SBATCH --nodes=2", "line 2: SLURM reads `#SBATCH` only as it is written here"),
        ("#sbatch --nodes=2", "line 2: SLURM reads `#SBATCH` only as it is written here"),
        ("  #SBATCH --nodes=2", "line 2: an #SBATCH that does not begin its line is a comment"),
        ("#SBATCH --nodes=2 --output=no-such-folder/a.out", "line 2: the folder no-such-folder does not exist"),
        ("#SBATCH -ono-such-folder/a.out", "line 2: the folder no-such-folder does not exist"),
        ("#SBATCH --nodes=2 --output=$HOME/a.out", "to sbatch: sbatch --output=VALUE job.sbatch"),
        ("#SBATCH -N${NODES:-2}", "to sbatch: sbatch -N VALUE job.sbatch"),
        ("#SBATCH --chdir=~/x", "line 2: SLURM does not expand `~`"),
        ("#SBATCH nodes=2", "line 2: `nodes=2` is no option"),
    ],
)
def test_a_directive_that_slurm_would_misread(tmp_path, lines, message):
    """SLURM takes the text as it stands, or silently leaves it out."""
    path = tmp_path / "job.sbatch"
    path.write_text(f"#!/bin/bash\n{lines}\necho\n")
    with pytest.raises(UserError) as caught:
        check_sbatch(path)
    assert message in str(caught.value)
    assert launch_check("--sbatch", path)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.outputdir=x"], "unknown key 'training.outputdir'"),
        (["--deepspeed", "no-such.json"], "no-such.json cannot be read"),
        (["--deepspeed", "{folder}/fixed.json"], "train_batch_size=64 cannot be divided over 3 ranks"),
    ],
)
def test_what_every_rank_would_refuse_is_refused_once(tmp_path, arguments, message):
    """Else sixteen nodes start and each says it, again at every restart."""
    (tmp_path / "fixed.json").write_text('{"train_batch_size": 64, "zero_optimization": {"stage": 2}}')
    run = ["--config", "configs/recipes/quickstart.yaml", *(a.format(folder=tmp_path) for a in arguments)]
    code, _, said = launch_check("--nodes", 1, "--ranks-per-node", 3, "--", *run)
    assert code == 2 and message in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("option", ["--sbatch", "--hostfile"])
def test_a_file_that_is_no_text(tmp_path, option):
    """A file saved as UTF-16 is an everyday mistake, not a traceback."""
    path = tmp_path / "file"
    path.write_bytes("node-1 slots=8".encode("utf-16"))
    code, _, said = launch_check(option, path)
    assert code == 2 and "is not UTF-8 text" in said and len(said.splitlines()) == 1


def test_our_job_script_is_read_whole():
    """And the check is the one users can call."""
    path = ROOT / "launch" / "slurm.sbatch"
    directives = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert len(directives) >= 8 and not [line for line in directives if "$" in line]
    command = [sys.executable, "-m", "adalora_scale", "launch-check", "--sbatch", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")


# The global batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "world_size", "expected"),
    [
        ({"global_batch_size": 64}, 2, (8, 4)),
        ({"global_batch_size": 64, "per_device_train_batch_size": 16}, 2, (16, 2)),
        ({"global_batch_size": 64, "gradient_accumulation_steps": 4}, 2, (8, 4)),
        ({"global_batch_size": 64, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2}, 2, (16, 2)),
        ({"global_batch_size": 6}, 2, (3, 1)),
        ({"global_batch_size": 22}, 2, (1, 11)),
        ({"global_batch_size": 1}, 1, (1, 1)),
    ],
)
def test_sizes_that_follow_from_a_global_batch(training, world_size, expected):
    """Their product must be what was asked for, on every number of ranks."""
    sizes = batch_sizes(training, world_size)
    assert tuple(sizes.values()) == expected
    assert world_size * expected[0] * expected[1] == training["global_batch_size"]


def test_nothing_follows_without_one():
    """Runs that name micro-batch and accumulation stay as they are."""
    assert batch_sizes({"per_device_train_batch_size": 4}, 3) == {}


@pytest.mark.parametrize(
    ("training", "world_size", "message"),
    [
        ({"global_batch_size": 64}, 3, "cannot be divided over 3 ranks; use 2 or 4 ranks, or .*=63 or 66"),
        ({"global_batch_size": 2}, 4, "cannot be divided over 4 ranks; use 2 ranks, or .*=4"),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 12},
            2,
            "per_device_train_batch_size=12 does not divide; use 8 or 16",
        ),
        (
            {"global_batch_size": 64, "gradient_accumulation_steps": 5},
            2,
            "gradient_accumulation_steps=5 does not divide; use 4 or 8",
        ),
        (
            {"global_batch_size": 64, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
            2,
            "is not 2 ranks x .*=8 x .*=2 = 32; leave out one",
        ),
        ({"global_batch_size": 0}, 1, "must be at least 1"),
    ],
)
def test_a_global_batch_that_the_ranks_do_not_divide(training, world_size, message):
    """Rounding it would train another run than the one that was planned."""
    with pytest.raises(UserError, match=message):
        batch_sizes(training, world_size)


def test_every_size_of_an_elastic_run_must_divide_the_global_batch():
    """Else the run dies at the first lost node, hours later."""
    run = ["--", "--config", QUICKSTART, "training.per_device_train_batch_size=8", "training.global_batch_size=64"]
    code, values, _ = launch_check("--nodes", "1:2", "--ranks-per-node", 4, "--endpoint", "localhost:0", *run)
    assert code == 0 and values["output_dir"] == "runs/quickstart" and int(values["port"]) > 0
    code, values, said = launch_check("--nodes", "2:3", "--ranks-per-node", 2, "--endpoint", "localhost:0", *run)
    assert (code, values, said.count("\n")) == (2, {}, 1)
    assert "cannot be divided over 6 ranks" in said


def test_what_launch_train_would_refuse_is_refused_here():
    """Overrides may stand before --config, as launch/train.py takes them; a misspelt section costs no node a minute."""
    assert launch_check("--", "training.max_steps=3", "--config", QUICKSTART)[0] == 0
    code, _, said = launch_check("--", "--config", QUICKSTART, "adalora.target_rank=3")
    assert code == 2 and "Did you mean 'target_r'" in said
    code, _, said = launch_check("--nodes", 2, "--", "--config", QUICKSTART)
    assert code == 2 and "RDZV=host:port" in said
    code, _, said = launch_check("--nodes", "4:2", "--", "--config", QUICKSTART)
    assert code == 2 and "MIN:MAX" in said


def test_the_run_itself_refuses_too(tmp_path):
    """launch/train.py may be started without our scripts."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += [
        "--nproc-per-node",
        "2",
        "launch/train.py",
        "--config",
        QUICKSTART,
        f"training.output_dir={tmp_path}/out",
    ]
    result = subprocess.run(
        [*command, "training.global_batch_size=63"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert "error: training.global_batch_size=63 cannot be divided over 2 ranks; use 1 or 3 ranks" in result.stderr
