"""What preflight concludes from figures: the right culprit, and no culprit where there is none."""

import dataclasses
import resource
from itertools import combinations, permutations

import pytest

from adalora_scale.cluster.place import Place
from adalora_scale.cluster.preflight.fabric import Collective, Link, rounds, tournament
from adalora_scale.cluster.preflight.facts import (
    Facts,
    Host,
    check_devices,
    check_limits,
    compare_versions,
    hosts_of,
    may_communicate,
    own_facts,
)
from adalora_scale.cluster.preflight.gpu import judge_gpu
from adalora_scale.cluster.preflight.links import judge_collectives, judge_links, slow_pairs
from adalora_scale.cluster.preflight.storage import judge_throughput
from adalora_scale.cluster.preflight.thresholds import load_thresholds
from adalora_scale.cluster.ranks import ranks_text

LIMITS = load_thresholds()


@pytest.mark.parametrize("players", range(2, 10))
def test_everybody_meets_everybody_once(players):
    """Else a slow link between two hosts is never measured, or two measurements share a link."""
    met = list(tournament(range(players)))
    assert len(met) == players - 1 + players % 2
    assert sorted(pair for pairs in met for pair in pairs) == list(combinations(range(players), 2))
    assert all(len({one for pair in pairs for one in pair}) == 2 * len(pairs) for pairs in met)


def test_rounds_cover_pairs_within_hosts_and_rails_between_them():
    """Else the second network card of every host is never measured."""
    plan = rounds([[0, 1], [2, 3], [4, 5]])
    assert [pair for kind, pairs in plan if kind == "within host" for pair in pairs] == [(0, 1), (2, 3), (4, 5)]
    between = {tuple(sorted(pair)) for kind, pairs in plan if kind == "between hosts" for pair in pairs}
    assert between == {(0, 2), (0, 4), (2, 4), (1, 3), (1, 5), (3, 5)}
    assert rounds([[0], [1]]) == [("between hosts", [(0, 1)])]


def links(hosts, slow=lambda a, b: False, late=lambda a, b: False):
    """All directions between hosts of one rank each: 10 GB/s and 50 µs, or 1 GB/s and 900 µs."""
    return [
        Link(
            kind="between hosts",
            sender=a,
            receiver=b,
            bytes_per_s=1e9 if slow(a, b) else 10e9,
            latency_s=900e-6 if late(a, b) else 50e-6,
        )
        for a, b in permutations(range(hosts), 2)
    ]


@pytest.mark.parametrize("count", [3, 4, 16])
@pytest.mark.parametrize(
    ("slow", "where", "what"),
    [
        (lambda a, b: 1 in (a, b), "node1", "sends and receives slowly"),
        (lambda a, b: a == 1, "node1", "sends slowly"),
        (lambda a, b: b == 1, "node1", "receives slowly"),
        (lambda a, b: (a, b) == (2, 0), "node2 → node0", "in this direction"),
    ],
)
def test_the_culprit_is_named_once(count, slow, where, what):
    """Else sixteen hosts give thirty lines, or the wrong host is sent for repair."""
    hosts = [Host(f"node{rank}", [rank]) for rank in range(count)]
    found = [finding for finding in judge_links(links(count, slow), hosts, LIMITS.nccl) if finding.status == "FAIL"]
    assert [(finding.where, what in finding.text) for finding in found] == [(where, True)]
    late = [finding for finding in judge_links(links(count, late=slow), hosts, LIMITS.nccl) if finding.status == "FAIL"]
    assert [finding.where for finding in late] == [where] and late[0].text.startswith("latency")


def test_of_two_hosts_the_slow_direction_is_named_and_equal_ones_are_not():
    """Else two hosts can never fail, or always do."""
    hosts = [Host("a", [0]), Host("b", [1])]
    found = judge_links(links(2, lambda a, b: a == 1), hosts, LIMITS.nccl)
    assert [finding.where for finding in found if finding.status == "FAIL"] == ["b → a"]
    assert {finding.status for finding in judge_links(links(2), hosts, LIMITS.nccl)} == {"ok"}
    assert slow_pairs(links(2), LIMITS.nccl) == []
    strict = dataclasses.replace(LIMITS.nccl, between_hosts_min_gb_s=11)
    assert len([f for f in judge_links(links(2), hosts, strict) if f.status == "FAIL"]) == 2
    assert slow_pairs(links(2), strict) == [("between hosts", 0, 1)]


def test_two_sick_hosts_are_both_named():
    """Else the second is found after the first was repaired."""
    hosts = [Host(f"node{rank}", [rank]) for rank in range(9)]
    found = judge_links(links(9, lambda a, b: bool({a, b} & {2, 5})), hosts, LIMITS.nccl)
    assert [finding.where for finding in found if finding.status == "FAIL"] == ["node2", "node5"]


@pytest.mark.parametrize("count", [3, 4, 16])
def test_a_link_beside_a_sick_host_is_named_as_a_link(count):
    """Else, of three hosts, one bad link makes a healthy host the culprit because the sick one's links count as its."""
    hosts = [Host(f"node{rank}", [rank]) for rank in range(count)]
    found = judge_links(links(count, lambda a, b: a == 1 or (a, b) == (2, 0)), hosts, LIMITS.nccl)
    assert [finding.where for finding in found if finding.status == "FAIL"] == ["node1", "node2 → node0"]


def test_a_slow_collective_is_named_with_its_hosts():
    """Else a fabric that is slow only under load passes."""
    hosts = [Host("a", [0, 1]), Host("b", [2, 3])]
    results = [
        Collective(name="all-reduce", ranks=ranks, bytes=1 << 20, bus_bytes_per_s=speed, latency_s=1e-5)
        for ranks, speed in (([0, 1], 100e9), ([2, 3], 1e6), ([0, 1, 2, 3], 100e9))
    ]
    found = judge_collectives(results, hosts, LIMITS.nccl)
    assert [(f.where, f.status) for f in found] == [("a", "ok"), ("b", "FAIL"), ("2 hosts, 4 ranks", "ok")]


def facts(rank, hostname="a", versions=None, **other):
    values = {"local_rank": rank, "local_world_size": 2, "address": f"10.0.0.{rank}", "machine": hostname, "gpus": 0}
    values |= {"shared_memory_bytes": 2**34, "open_files": 10**6, "open_files_hard": 10**6} | other
    versions = {"torch": "2", "transformers": "5", "deepspeed": "0", "nccl": "2"} | (versions or {})
    return Facts(rank=rank, hostname=hostname, versions=versions, **values)


def test_the_rank_that_differs_is_named_and_not_the_many():
    """Else the administrator repairs the wrong hosts."""
    everyone = [facts(0, versions={"torch": "1"}), facts(1), facts(2, "b"), facts(3, "b")]
    (found,) = compare_versions(everyone, hosts_of(everyone))
    assert (found.status, found.where, found.text) == ("FAIL", "rank 0 on a", "torch 1, the other 3 ranks have 2")
    assert not may_communicate(everyone)
    harmless = [facts(0, versions={"peft": "1"}), facts(1)]
    assert may_communicate(harmless)
    assert compare_versions(harmless, hosts_of(harmless))[0].text == "peft not installed, the other 1 ranks have 1"
    assert [f.status for f in compare_versions(everyone[1:], hosts_of(everyone[1:]))] == ["ok"]


def test_hosts_of_one_name_are_told_apart():
    """Else two hosts called localhost look like one."""
    everyone = [facts(0, machine="x"), facts(1, machine="y"), facts(2, "b")]
    assert hosts_of(everyone) == [Host("a (10.0.0.0)", [0]), Host("a (10.0.0.1)", [1]), Host("b", [2])]


def test_limits_and_devices_name_the_host():
    """Else one container without shared memory is found by a crash."""
    everyone = [facts(0, gpus=2), facts(1, gpus=2), facts(2, "b", gpus=1, shared_memory_bytes=2**26), facts(3, "b")]
    hosts = hosts_of(everyone)
    low = [f for f in check_limits(everyone, hosts, LIMITS) if f.status == "FAIL"]
    assert [(f.check, f.where) for f in low] == [("shared memory", "b")]
    assert "0.0625 GiB" in low[0].text
    assert [(f.where, f.status) for f in check_devices(everyone, hosts)] == [("b", "FAIL")]


def test_no_limit_of_open_files_is_not_a_low_one(monkeypatch):
    """Else hosts with `ulimit -n unlimited` fail: the system calls that −1."""
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    alone = [own_facts(Place(rank=0, world_size=1, local_rank=0, local_world_size=1))]
    assert [f.status for f in check_limits(alone, hosts_of(alone), LIMITS) if f.check == "open files"] == ["ok"]


HEALTHY = {"temperature_c": 40, "free_memory_share": 0.99, "ecc": True, "uncorrected_errors": 0, "throttling": []}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uncorrected_errors": 3}, "3 uncorrected ECC errors"),
        ({"rows_to_remap": True}, "wait to be remapped"),
        ({"row_remapping_failed": True}, "must be replaced"),
        ({"throttling": ["slowed by heat (hardware)"]}, "slowed by heat"),
        ({"temperature_c": 90}, "90 °C before any load"),
        ({"free_memory_share": 0.3}, "only 30% of its memory is free"),
    ],
)
def test_a_sick_gpu_is_named(change, words):
    """Else one throttled GPU slows a thousand."""
    (found,) = judge_gpu(3, "b", HEALTHY | change, LIMITS)
    assert found.status == "FAIL" and found.where == "rank 3 on b" and words in found.text


def test_a_healthy_gpu_passes_and_a_missing_one_is_skipped_with_the_reason():
    """Else the table is silent about what was not looked at."""
    assert judge_gpu(0, "a", HEALTHY, LIMITS)[0].status == "ok"
    (skipped,) = judge_gpu(0, "a", {"skipped": "no GPU"}, LIMITS)
    assert (skipped.status, skipped.text) == ("skipped", "no GPU")


def test_a_slow_disk_fails_and_a_small_file_proves_nothing():
    """Else the page cache of a toy model passes for a fast file system."""
    assert judge_throughput("disk read", "a", {"bytes": 1e8, "seconds": 10, "file": "f"}, 100).status == "FAIL"
    assert judge_throughput("disk read", "a", {"bytes": 1e8, "seconds": 0.1, "file": "f"}, 100).status == "ok"
    assert judge_throughput("disk read", "a", {"bytes": 1e3, "seconds": 1, "file": "f"}, 100).status == "note"
    assert judge_throughput("disk read", "a", {"error": "No such file or directory"}, 100).status == "FAIL"


def test_ranks_are_listed_in_runs():
    """Else a line about a thousand ranks is a page long."""
    assert ranks_text([3]) == "rank 3" and ranks_text([0, 1, 2, 5]) == "ranks 0–2, 5"
