"""Preflight on hosts that are network namespaces: the slow one and the odd one are named."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.cluster.bridged_hosts import bridged_hosts
from tests.cluster.overlay import other_version
from tests.conftest import ROOT

CLI = "adalora_scale"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    fixed = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name, value in fixed.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def failures(result):
    """Return (check, where, text) of rank 0's failed findings, and the whole answer."""
    answer = json.loads(next(line for line in result.stdout.splitlines() if line.startswith("{")))
    return [(f["check"], f["where"], f["text"]) for f in answer["findings"] if f["status"] == "FAIL"], answer


def test_three_healthy_hosts_pass_and_every_pair_was_measured(tmp_path):
    """A preflight that cries wolf is switched off."""
    with bridged_hosts(3) as hosts:
        results = hosts.torchrun(CLI, ["preflight", "--json", "--output-dir", str(tmp_path / "out")], nproc=2)
        found, answer = failures(results[0])
        assert found == []
        assert [result.returncode for result in results] == [0, 0, 0]
        assert [host["ranks"] for host in answer["hosts"]] == [[0, 1], [2, 3], [4, 5]]
        between = {(link["sender"], link["receiver"]) for link in answer["links"] if link["kind"] == "between hosts"}
        assert between == {(a, b) for a in range(6) for b in range(6) if a % 2 == b % 2 and a != b}
        within = {(link["sender"], link["receiver"]) for link in answer["links"] if link["kind"] == "within host"}
        assert within == {(0, 1), (1, 0), (2, 3), (3, 2), (4, 5), (5, 4)}
        assert [(c["name"], len(c["ranks"])) for c in answer["collectives"]].count(("all-reduce", 2)) == 3
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("discipline", "figure"),
    [
        (["tbf", "rate", "30mbit", "burst", "32kbit", "latency", "400ms"], "bandwidth, sends slowly"),
        (["netem", "rate", "30mbit"], "bandwidth, sends slowly"),
        (["netem", "delay", "120ms"], "latency, sends and receives slowly"),  # slows its bandwidth as well
    ],
    ids=["tbf", "netem-rate", "netem-delay"],
)
def test_the_host_with_a_slowed_link_is_named(discipline, figure):
    """Else a job of sixteen hosts runs at the pace of one bad cable, and nobody knows which."""
    with bridged_hosts(3) as hosts:
        hosts.shape(1, *discipline)
        results = hosts.torchrun(CLI, ["preflight", "--json"])
        links = [(where, text) for check, where, text in failures(results[0])[0] if check == "link between hosts"]
        assert any(text.startswith(figure) for _, text in links), links
        assert all(hosts.addresses[1] in where for where, _ in links), links  # and nobody else
        assert all(result.returncode == 1 for result in results)


def test_a_host_with_other_packages_or_another_folder_is_named(tmp_path):
    """Else a rank computes something else, or checkpoints are scattered over hosts."""
    folders = {index: tmp_path / f"host{index}" for index in range(2)}
    for folder in folders.values():
        folder.mkdir()
    with bridged_hosts(2) as hosts:
        odd = other_version(tmp_path / "odd", "transformers", "4.99.0")
        results = hosts.torchrun(
            CLI, ["preflight", "--json", "--output-dir", "runs/one"], nproc=2, env={1: odd}, cwd=folders
        )
        found = {check: (where, text) for check, where, text in failures(results[0])[0]}
        where, text = found["versions"]
        assert where.startswith("ranks 2–3 on ") and hosts.addresses[1] in where
        assert text.startswith("transformers 4.99.0, the other 2 ranks have ")
        assert hosts.addresses[1] in found["output_dir shared"][1]
        assert [result.returncode for result in results] == [1, 1]
