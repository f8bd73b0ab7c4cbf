"""Mutated config, data and template files end well or in one line: no traceback, hang or gigabytes, nothing outside."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST_S, MOST_BYTES = 20, 2 * 2**30


def judge(seed, count, folder):
    command = [sys.executable, "-m", "tests.fuzzing.mutants_of_data_and_config", str(seed), str(count), str(folder)]
    environment = {k: v for k, v in os.environ.items() if k not in ("ADALORA_TRACEBACK", "RANK")}
    environment |= {"HF_HOME": str(folder / "hf"), "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60 + 20 * count)
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    begun = {line["begun"]: line for line in lines if "begun" in line}
    ended = {line["ended"]: line for line in lines if "ended" in line}
    assert run.returncode == 0 and len(ended) == count, (begun[max(begun)] if begun else "", run.stderr[-2000:])
    faults = []
    for index, line in ended.items():
        said = line["said"].splitlines()
        well = line["code"] == 0 or (line["code"] == 2 and len(said) == 1 and said[0].startswith("error: "))
        quick = line["seconds"] < LONGEST_S and line["peak"] < MOST_BYTES
        if not (well and quick and not line["outside"] and all(text.isprintable() for text in said)):
            faults.append({**begun[index], **line})
    assert not faults, "\n".join(map(json.dumps, faults))
    refused = sum(line["code"] == 2 for line in ended.values())
    assert count // 4 < refused < count, "mutants that are all well, or all broken, show nothing"


def test_a_hundred_mutants(tmp_path):
    judge(11, 100, tmp_path)


@pytest.mark.full
def test_a_thousand_mutants(tmp_path):
    judge(12, 1000, tmp_path)
