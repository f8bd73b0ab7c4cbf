"""What a failed run leaves: logs and statuses of real ranks, and the one line that names host, rank and reason."""

import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adalora_scale.cluster.evidence import flight_recorder
from adalora_scale.cluster.evidence.failures import main, render, summarise
from adalora_scale.cluster.evidence.status import Failure, Status
from adalora_scale.errors import UserError
from tests.conftest import ROOT

WORKER = Path(__file__).with_name("worker.py")
CLOSED = Failure(type="RuntimeError", message="Connection closed by peer [10.0.0.2]:1", place="x.py:1", from_peers=True)
OWN = Failure(type="ValueError", message="no such token", place="adalora_scale/data/rows.py:7", from_peers=False)


def ranks(behaviour, folder, world_size=2, timeout=120):
    """Start ranks as torchrun's agent would, but each told what to do; return their exit codes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC", "SLURM_"))} | {
        "ADALORA_LOG_DIR": str(folder), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_FR_BUFFER_SIZE": "2000",
        "MASTER_PORT": "0", "ADALORA_STORE": str(folder / "store"), "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    try:
        for rank in range(world_size):
            env = environment | {"RANK": str(rank), "ADALORA_HOST": f"node-{rank}"}
            processes.append(
                subprocess.Popen(
                    [sys.executable, WORKER, behaviour], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        deadline = time.monotonic() + timeout
        output = processes[0].communicate(timeout=timeout)[0].decode()
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes[: world_size - 1]]
        return codes, output
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_rank_that_never_enters_a_collective_is_named_with_it(tmp_path):
    """gloo says `Timed out waiting 4000ms for recv operation`, about nobody and nothing."""
    codes, console = ranks("one rank sleeps", tmp_path)
    assert codes == [1]
    expected = (
        "rank 0 on node-0 waited in all_reduce #3 of [512] float in default_pg; rank 1 on node-1 never entered it "
        "(last entered: broadcast #2 of [3] float in default_pg)"
    )
    assert f"hang: {expected}" in console and "Timed out waiting" in console
    summary = summarise(tmp_path)
    assert (summary.state, summary.host, summary.rank, summary.reason) == ("failed", "node-1", 1, expected)
    stacks = (tmp_path / "node-1.1.stacks").read_text()
    assert "in sleeps_here" in stacks
    assert (tmp_path / "flight_recorder_0").exists() and (tmp_path / "flight_recorder_1").exists()


def test_ranks_that_enter_different_collectives_are_named(tmp_path):
    """A branch that only some ranks take hangs, or mixes up memory."""
    ranks("different collectives", tmp_path)
    reason = summarise(tmp_path).reason
    assert "rank 0 on node-0 all_reduce #2" in reason and "rank 1 on node-1 broadcast #2" in reason


def test_a_ranks_own_exception_comes_before_what_the_others_report(tmp_path):
    """All ranks fail when one does; the first traceback in any log is usually another's."""
    codes, console = ranks("the last rank raises", tmp_path, world_size=3)
    assert codes == [1, 1]
    summary = summarise(tmp_path)
    assert (summary.host, summary.rank) == ("node-2", 2)
    assert "ValueError: this rank met a bad row at " in summary.reason
    log = (tmp_path / "node-2.2.log").read_text()
    assert log.startswith("== ") and "rank 2 of 3 on node-2" in log and "Traceback" in log and "said by C" in log
    assert "rank 2 of 3" not in console and "rank 0 of 3" in console
    assert main([str(tmp_path)]) == 1


def test_a_killed_rank_is_named_by_its_silence(tmp_path):
    """SIGKILL, as the kernel sends it when memory runs out, leaves no traceback anywhere."""
    codes, _ = ranks("the last rank is killed", tmp_path)
    assert codes == [1]
    summary = summarise(tmp_path)
    assert summary.reason == "host node-1 ended without a word (with its rank 1): killed, or its host is gone"
    assert any("Connection" in line for line in summary.details)


def test_what_an_earlier_run_left_is_not_this_one_s(tmp_path):
    """Else a start whose ranks never came is explained by last week's failure."""
    status("node-9", 0, world_size=1, started=1000.0, failure=OWN).write(tmp_path)
    assert "no such token" in render(summarise(tmp_path, since=1010.0))  # clocks of hosts differ by seconds
    with pytest.raises(UserError, match="no rank's status of this start"):
        summarise(tmp_path, since=2000.0)


def test_a_run_that_is_done_says_so(tmp_path, capsys):
    """And does not show the failures of an earlier attempt."""
    status("node-9", 2, world_size=3, started=1.0, failure=OWN).write(tmp_path)
    assert ranks("all is well", tmp_path)[0] == [0]
    deadline = time.monotonic() + 60  # the last rank is not waited for above
    while summarise(tmp_path).state not in ("done", "running") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert summarise(tmp_path).state in ("done", "running")
    assert "bad row" not in render(summarise(tmp_path))


# The order in which reasons are believed, on statuses as ranks write them -------------------------------------------


def status(host, rank, *, world_size=4, started=100.0, ended=None, failure=None, state=None, pid=None):
    state = state or ("failed" if failure else "running")
    ended = ended or (started + 50 if failure else None)
    return Status(
        host=host, rank=rank, world_size=world_size, pid=pid or 1000 + rank, started=started, state=state, ended=ended,
        failure=failure,
    )  # fmt: skip


def write(folder, *statuses, **logs):
    for one in statuses:
        one.write(folder)
    for name, text in logs.items():
        (folder / f"{name.replace('_', '-')}.launcher.log").write_text(text)


def test_a_signal_that_torchrun_saw_is_the_reason(tmp_path):
    """Its neighbours on the host were ended by torchrun, the other host's ranks lost their peer: none is the reason."""
    write(
        tmp_path, status("a", 0, failure=CLOSED), status("a", 1, failure=CLOSED), status("b", 2), status("b", 3),
        b="Sending process 1002 closing signal SIGTERM\nfailed (exitcode: -9) local_rank: 1 (pid: 1003) of binary: x\n",
    )  # fmt: skip
    summary = summarise(tmp_path)
    assert (summary.host, summary.rank) == ("b", 3) and "killed by SIGKILL (out of memory?" in summary.reason


def test_a_host_that_pdsh_lost_is_the_reason(tmp_path):
    """deepspeed's launcher kills its own ranks on the healthy host: they fall silent too."""
    write(
        tmp_path, status("a", 0), status("a", 1, failure=CLOSED), status("b", 2), status("b", 3),
        a="a: [INFO] [launch.py:253:sigkill_handler] Killing subprocess 1000\n"
          "pdsh@a: b: ssh exited with exit code 255\npdsh@a: a: ssh exited with exit code 1\n",
    )  # fmt: skip
    summary = summarise(tmp_path)
    assert summary.host == "b" and "(with its ranks 2, 3)" in summary.reason
    assert "pdsh@a: b: ssh exited with exit code 255" in summary.details


def test_a_user_error_is_the_reason(tmp_path):
    """Exit code 2 is no exception, but its line says what to change."""
    error = Failure(type="exit code 2", message="error: unknown key 'x.y'", place="", from_peers=False)
    write(tmp_path, status("a", 0, world_size=2, failure=error, ended=120), status("a", 1, world_size=2))
    assert "rank 0 on a" in summarise(tmp_path).reason and "unknown key 'x.y'" in summarise(tmp_path).reason


def test_an_attempt_on_fewer_ranks_hides_the_one_before(tmp_path):
    """After an elastic restart the lost node's old files are still there."""
    write(
        tmp_path, status("b", 1, world_size=2), status("a", 0, world_size=1, started=200.0, state="done"),
    )  # fmt: skip
    assert summarise(tmp_path).state == "done"


def test_a_checkpoint_on_request_is_no_failure(tmp_path):
    """A requeued job must not greet its owner with `first failure`."""
    write(tmp_path, *(status("a", rank, world_size=2, state="checkpointed") for rank in range(2)))
    assert summarise(tmp_path).state == "checkpointed" and main([str(tmp_path)]) == 0


def test_an_empty_folder_is_a_users_mistake(tmp_path, capsys):
    """One line, not an IndexError."""
    with pytest.raises(UserError, match="holds no rank's status"):
        summarise(tmp_path)
    assert main([str(tmp_path)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_json_carries_the_same(tmp_path, capsys):
    """For a dashboard."""
    write(tmp_path, status("a", 0, world_size=1, failure=OWN))
    assert main([str(tmp_path), "--json"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["state"], tree["host"], tree["rank"]) == ("failed", "a", 0)


def test_a_record_that_would_run_code_is_not_read(tmp_path):
    """Flight records are pickles; a log folder is no place to execute from."""
    marker = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    (tmp_path / "flight_recorder_0").write_bytes(pickle.dumps({"entries": [], "x": Bomb()}))
    assert flight_recorder.read_records(tmp_path) == {} and not marker.exists()
