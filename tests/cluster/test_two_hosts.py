"""launch/*.sh for bare nodes, on two network namespaces as hosts, with the distribution's sshd and pdsh."""

import json
import os
import signal
import time

import pytest

from tests.cluster.small_run import ARGUMENTS, assert_same, read_result, wait_for_step
from tests.cluster.two_hosts import ADDRESSES, need_two_hosts, two_hosts

full = pytest.mark.full
TORCHRUN = ("launch/on_hosts.sh", "{hostfile}", "bash", "launch/torchrun.sh")
DEEPSPEED = ("launch/deepspeed.sh", "{hostfile}", "--deepspeed", "configs/deepspeed/zero2.json")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    need_two_hosts()
    with two_hosts(tmp_path_factory.mktemp("hosts")) as both:
        yield both


@pytest.fixture
def launch(hosts, tmp_path):
    """Start the small run on both hosts from node-a; returns the process and the file with what it says."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-a slots=1\nnode-b slots=1  # the other one\n")

    def start(script, *arguments, **environment):
        command = [word.format(hostfile=hostfile) for word in script]
        said = tmp_path / "said.log"
        environment = {"ADALORA_LOG_DIR": str(tmp_path / "logs")} | environment
        arguments = [*ARGUMENTS, f"training.output_dir={tmp_path}/out", *arguments]
        return hosts.start("node-a", "bash", *command, *arguments, env=environment, log=said), said

    return start


@pytest.fixture
def revived(hosts):
    """For tests that kill node-b: it is there again for the next one."""
    yield
    hosts.kill("node-b")
    hosts.start_sshd("node-b")


def status_of(tmp_path, host, rank):
    return json.loads((tmp_path / "logs" / f"{host}.{rank}.status.json").read_text())


def first_failure(text):
    (line,) = {line.split("first failure: ")[1] for line in text.splitlines() if "first failure: " in line}
    return line


@full
def test_a_killed_rank_restarts_all_from_the_last_checkpoint(launch, tmp_path, one_process_result):
    """Else one failing GPU ends a run of days, or the restart trains something else than an undisturbed run."""
    process, said = launch(TORCHRUN, "training.save_steps=10", RESTARTS="2")
    wait_for_step(tmp_path / "out", 14, alive=lambda: process.poll() is None)
    by_host = {status_of(tmp_path, host, rank)["host"]: status_of(tmp_path, host, rank)
               for rank, host in ((0, "node-a"), (1, "node-b"), (0, "node-b"), (1, "node-a"))
               if (tmp_path / "logs" / f"{host}.{rank}.status.json").exists()}  # fmt: skip
    os.kill(by_host["node-b"]["pid"], signal.SIGKILL)
    assert process.wait(240) == 0, said.read_text()[-4000:]
    assert "resumed from" in said.read_text() and "checkpoint-10" in said.read_text()
    result = read_result(tmp_path / "out")
    assert result.world_size == 2
    assert_same(result, one_process_result, tolerance=1e-5)


@full
def test_deepspeed_over_pdsh_names_a_host_that_died(launch, hosts, revived, tmp_path):
    """The survivors only report a closed connection; whose, a user would have to guess."""
    process, said = launch(DEEPSPEED, LAUNCHER="pdsh")
    wait_for_step(tmp_path / "out", 4, alive=lambda: process.poll() is None)
    hosts.kill("node-b")
    assert process.wait(90) != 0
    reason = first_failure(said.read_text())
    assert reason.startswith("host node-b ended without a word") and "rank 1" in reason
    assert "then rank 0 on node-a" in said.read_text()


@full
@pytest.mark.parametrize("launcher", ["pdsh", "ssh"])
def test_deepspeed_trains_over_both_hosts_what_one_process_trains(launch, tmp_path, one_process_result, launcher):
    """A hostfile launch that trains each host for itself would look healthy."""
    process, said = launch(DEEPSPEED, LAUNCHER=launcher)
    assert process.wait(400) == 0, said.read_text()[-4000:]
    result = read_result(tmp_path / "out")
    assert result.world_size == 2
    assert {status_of(tmp_path, "node-a", 0)["state"], status_of(tmp_path, "node-b", 1)["state"]} == {"done"}
    assert_same(result, one_process_result, tolerance=3e-5)


@full
def test_torchrun_started_by_hand_on_each_host(hosts, tmp_path, one_process_result):
    """The documented two lines, without ssh between the hosts."""
    arguments = [*ARGUMENTS, f"training.output_dir={tmp_path}/out"]
    env = {"ADALORA_LOG_DIR": f"{tmp_path}/logs", "NODES": "2", "RDZV": "node-a:29500"}
    logs = [tmp_path / f"{name}.said" for name in ADDRESSES]
    processes = [
        hosts.start(name, "bash", "launch/torchrun.sh", *arguments, env=env, log=log)
        for name, log in zip(ADDRESSES, logs, strict=True)
    ]
    assert [process.wait(240) for process in processes] == [0, 0], [log.read_text()[-3000:] for log in logs]
    assert_same(read_result(tmp_path / "out"), one_process_result, tolerance=1e-5)


@full
def test_torchrun_names_a_host_that_died(launch, hosts, revived, tmp_path):
    """As for deepspeed; torchrun's own report shows the survivor as the root cause."""
    process, said = launch(TORCHRUN)
    wait_for_step(tmp_path / "out", 4, alive=lambda: process.poll() is None)
    hosts.kill("node-b")
    assert process.wait(120) != 0
    assert first_failure(said.read_text()).startswith("host node-b ended without a word")
    assert "on_hosts: node-b ended with exit code 255" in said.read_text()


@full
def test_an_elastic_run_goes_on_without_a_host_that_died(launch, hosts, revived, tmp_path, one_process_result):
    """Fewer ranks with the same global batch: the same steps, the same pruning schedule, the same result."""
    process, said = launch(TORCHRUN, "training.save_steps=10", NODES="1:2", RESTARTS="3")
    wait_for_step(tmp_path / "out", 14, alive=lambda: process.poll() is None)
    hosts.kill("node-b")
    assert process.wait(300) == 0, said.read_text()[-4000:]
    result = read_result(tmp_path / "out")
    assert result.world_size == 1
    assert "on_hosts: node-b ended with exit code 255" in said.read_text()
    assert_same(result, one_process_result, tolerance=1e-5)


@full
def test_a_rank_that_stops_is_named_with_its_collective(launch, tmp_path):
    """A hang costs the time-out on every rank and then says `Timed out waiting for recv`, about nobody."""
    process, said = launch(TORCHRUN, "training.ddp_timeout=8", GRACE="10", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    wait_for_step(tmp_path / "out", 4, alive=lambda: process.poll() is None)
    status = status_of(tmp_path, "node-b", 1)
    os.kill(status["pid"], signal.SIGSTOP)
    try:
        assert process.wait(120) != 0
    finally:
        if (tmp_path / "logs").exists():
            os.kill(status["pid"], signal.SIGCONT) if os.path.exists(f"/proc/{status['pid']}") else None
    reason = first_failure(said.read_text())
    assert reason.startswith("rank 0 on node-a waited in ") and "rank 1 on node-b left no record" in reason
    assert any(name in reason for name in ("all_reduce #", "broadcast #", "all_gather #"))
    assert "Timed out waiting 8000ms" in said.read_text()


# Bad input: one line and exit code 2, before anything is started -----------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("node-a slots=1\nnode-gone slots=1\n", "host node-gone (line 2 of the hostfile) cannot be reached over ssh"),
        ("node-a slots=1\n10.77.0.1 slots=1\n", "10.77.0.1 is node-a (10.77.0.1), which stands in line 1 already"),
    ],
)
@pytest.mark.parametrize("script", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_hostfile_with_a_host_that_cannot_be_used(hosts, tmp_path, lines, message, script):
    """deepspeed asks the first host only, and would start two ranks on one GPU."""
    (tmp_path / "hostfile").write_text(lines)
    command = [word.format(hostfile=tmp_path / "hostfile") for word in script]
    started = time.monotonic()
    code, said = hosts.run("node-a", "bash", *command, *ARGUMENTS, env={"ADALORA_LOG_DIR": str(tmp_path / "logs")})
    assert (code, said.count("\n")) == (2, 1), said
    assert said.startswith("error: ") and message in said
    assert time.monotonic() - started < 30


def test_a_port_in_use_on_the_first_host(hosts, tmp_path):
    """torchrun would take the stranger for a rendezvous and wait for its time-out."""
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    listen = "import socket, time; s = socket.socket(); s.bind(('', 29471)); s.listen(); time.sleep(60)"
    listener = hosts.start("node-a", "python", "-c", listen, log=tmp_path / "listener.log")
    try:
        time.sleep(1)
        env = {"PORT": "29471", "ADALORA_LOG_DIR": str(tmp_path / "logs")}
        code, said = hosts.run("node-a", "bash", "launch/deepspeed.sh", str(tmp_path / "hostfile"), *ARGUMENTS, env=env)
        assert (code, said.count("\n")) == (2, 1), said
        assert "port 29471 of node-a is in use" in said
        code, said = hosts.run(
            "node-a", "bash", "launch/torchrun.sh", *ARGUMENTS, env=env | {"NODES": "2", "RDZV": "node-a:29471"}
        )
        assert (code, said.count("\n")) == (2, 1), said
        assert "port 29471 of this host (node-a) cannot be used" in said
    finally:
        listener.kill()


def test_the_hosts_know_no_way_out(hosts):
    """The tests must not reach for anything outside this machine."""
    for name, address in ADDRESSES.items():
        code, said = hosts.run(name, "ip", "route")
        assert (code, said.split()) == (0, f"10.77.0.0/24 dev eth0 proto kernel scope link src {address}".split())
