"""launch/slurm.sbatch on a real SLURM of two nodes: munge, slurmctld and slurmd from the distribution's packages."""

import json
import sys
import time

import pytest

from tests.cluster.one_slurm import need_slurm, one_slurm
from tests.cluster.small_run import ARGUMENTS, assert_same, read_result, wait_for_step

FITTED = ("--gpus-per-node=1", "--cpus-per-task=1", "--time=30")  # this machine is smaller than the script's nodes


@pytest.fixture(scope="module")
def slurm():
    need_slurm()
    with one_slurm() as cluster:
        yield cluster


@pytest.fixture
def submit(slurm, tmp_path):
    def start(*arguments, sbatch=FITTED):
        slurm.environment["ADALORA_LOG_DIR"] = str(tmp_path / "logs")
        options = [*sbatch, f"--output={tmp_path}/job.out", "launch/slurm.sbatch"]
        return slurm.submit(*options, *ARGUMENTS, f"training.output_dir={tmp_path}/out", *arguments)

    return start


def running(slurm, job):
    return lambda: slurm.state(job)["JobState"] in ("PENDING", "CONFIGURING", "RUNNING")


def restart_now(slurm, job):
    """SLURM lets a requeued job wait two minutes; the test has none, but the first attempt must be gone."""
    slurm.wait(job, "PENDING", timeout=90)
    time.sleep(8)
    slurm.call("scontrol", "update", f"JobId={job}", "StartTime=now")


def test_usr1_leads_to_a_checkpoint_a_requeue_and_the_result_of_one_process(
    slurm, submit, tmp_path, one_process_result
):
    """A run longer than its time limit would end with nothing, or go on as another run than the one it was."""
    job = submit()
    wait_for_step(tmp_path / "out", 10, alive=running(slurm, job))
    slurm.call("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@300 makes SLURM do
    restart_now(slurm, job)
    state = slurm.wait(job)
    said = (tmp_path / "job.out").read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", said
    assert "asking all ranks for a checkpoint" in said and "back into the queue (restart 1)" in said
    assert "resumed from" in said and not (tmp_path / "out" / "requeue").exists()
    result = read_result(tmp_path / "out")
    assert result.world_size == 2
    assert_same(result, one_process_result, tolerance=1e-5)
    names = {path.name for path in (tmp_path / "logs").iterdir()}
    assert {"node1.0.log", "node2.1.log", "node1.launcher.log", "node2.launcher.log"} <= names


@pytest.mark.full
def test_preflight_runs_under_srun(slurm, tmp_path):
    """The nodes are tested before the job by the same srun that would start it, with no torchrun between."""
    out = tmp_path / "out"
    command = ["srun", "--nodes=2", "--ntasks=2", "--overlap", "python", "-m", "adalora_scale", "preflight"]
    said = slurm.call(*command, "--json", "--output-dir", str(out), timeout=180)
    (line,) = (line for line in said.splitlines() if line.startswith("{"))
    answer = json.loads(line)
    assert [finding for finding in answer["findings"] if finding["status"] == "FAIL"] == []
    assert answer["world_size"] == 2
    assert {(link["sender"], link["receiver"]) for link in answer["links"]} == {(0, 1), (1, 0)}
    assert list(out.iterdir()) == []  # probes of the disk are removed


@pytest.mark.full
def test_the_time_limit_itself_leads_there(slurm, submit, tmp_path, one_process_result):
    """The directive --signal is worth nothing if SLURM does not send what the script waits for, when it should."""
    # SLURM counts in minutes and may send the signal up to one earlier than 70 s before the end of 2 minutes: while the
    # ranks are still loading, which is the hard case.
    long = "training.max_steps=3000"
    job = submit(long, sbatch=(*FITTED[:2], "--time=2", "--signal=B:USR1@70"))
    deadline = time.monotonic() + 180
    while slurm.state(job)["Restarts"] == "0":
        assert time.monotonic() < deadline, (tmp_path / "job.out").read_text()
        time.sleep(1)
    said = (tmp_path / "job.out").read_text()
    assert "SIGUSR1: asking all ranks for a checkpoint" in said and "back into the queue (restart 1)" in said
    assert list((tmp_path / "out").glob("checkpoint-*"))
    slurm.call("scancel", job)


@pytest.mark.full
def test_a_failing_rank_is_named_in_the_jobs_output(slurm, submit, tmp_path):
    """Else a user greps the logs of every node for the first traceback."""
    job = submit("data.train=/no/such/file.jsonl")
    state = slurm.wait(job)
    said = (tmp_path / "job.out").read_text()
    assert state["JobState"] == "FAILED"
    failure = next(line for line in said.splitlines() if line.startswith("first failure: "))
    assert "on node" in failure and "/no/such/file.jsonl" in failure


def test_what_does_not_fit_is_said_before_any_rank_starts(slurm, submit, tmp_path):
    """Else sixteen nodes wait minutes for an arithmetic mistake."""
    job = submit("training.global_batch_size=15")
    state = slurm.wait(job, timeout=60)
    assert (state["JobState"], state["ExitCode"]) == ("FAILED", "2:0")
    (line,) = (line for line in (tmp_path / "job.out").read_text().splitlines() if line.startswith("error"))
    assert "global_batch_size=15 cannot be divided over 2 ranks" in line and "14 or 16" in line
    assert not list((tmp_path / "logs").glob("*.status.json"))


@pytest.mark.full
def test_a_node_that_dies_requeues_the_job_which_goes_on_from_its_checkpoint(
    slurm, submit, tmp_path, one_process_result
):
    """--requeue is there for this: a run of days meets a dead node."""
    job = submit("training.save_steps=10")
    wait_for_step(tmp_path / "out", 14, alive=running(slurm, job))
    slurm.call("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    restart_now(slurm, job)
    state = slurm.wait(job)
    said = (tmp_path / "job.out").read_text()
    assert state["JobState"] == "COMPLETED" and state["Restarts"] == "1", said
    assert "resumed from" in said
    assert_same(read_result(tmp_path / "out"), one_process_result, tolerance=1e-5)


@pytest.mark.full
def test_a_sweep_submits_every_trial_once_and_reads_what_came_of_it(slurm, tmp_path):
    """A second call that submits what is queued or done trains twice in one folder, and pays for it."""
    slurm.environment["ADALORA_LOG_DIR"] = str(tmp_path / "logs")
    words = [
        sys.executable, "-m", "adalora_scale", "sweep", *ARGUMENTS, "training.max_steps=20",
        "adalora.tfinal=10", "--output", f"{tmp_path}/sweep", "--grid", "training.learning_rate=1e-3,1e-2",
        f"--sbatch={' '.join(FITTED)} --nodes=1 --hold", "--json",
    ]  # fmt: skip
    jobs = []
    for _ in range(2):
        found = json.loads(slurm.call(*words))
        assert [trial["state"] for trial in found["trials"]] == ["queued", "queued"] and found["best"] is None
        jobs.append([path.read_text() for path in sorted((tmp_path / "sweep").glob("trials/*/slurm-job"))])
    assert jobs[0] == jobs[1] and len(set(jobs[0])) == 2
    for job in jobs[0]:
        slurm.call("scontrol", "release", job.strip())
        assert slurm.wait(job.strip())["JobState"] == "COMPLETED"
    found = json.loads(slurm.call(*words))
    assert [trial["state"] for trial in found["trials"]] == ["done", "done"]
    assert found["best"] == {"training.learning_rate": "1e-2"} and (tmp_path / "sweep" / "best.yaml").exists()
