"""Mutated files of strangers: each is read, or refused in one line; no traceback, no hang, nothing read outside."""

import json
import os
import random
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.reading.written import check_written
from tests.adalora import tiny
from tests.conftest import ROOT
from tests.export.adapters import copy, export, options, train, trained
from tests.export.test_inspection import write_checkpoint

PATIENCE_S, MEMORY, SEED = 20, 2 * 2**30, 20261126


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One sound folder of every kind."""
    folder = tmp_path_factory.mktemp("originals")
    (folder / "secret.json").write_text("{}")
    model = tiny.gpt2()
    model.save_pretrained(folder / "base")
    model.save_pretrained(folder / "sharded", max_shard_size="40KB")
    trained(folder / "base", "gpt2", folder / "adapter")
    export(folder / "adapter", folder / "lora", "--base", folder / "base", "--format", "peft-lora", "--no-fidelity")
    live = inject_adalora(tiny.gpt2(), options("gpt2"))
    write_checkpoint(live, train(live, "gpt2", options("gpt2")), folder / "checkpoint", folder / "base", frozen=True)
    assert main(["quantize", str(folder / "base"), str(folder / "quantised"), "--blocksize", "32"]) == 0
    copy(folder / "adapter", folder / "adapter_for_quantised")
    return folder


def mutants(folder, count, seed):
    """Yield what the worker says of each mutant; a worker that hangs or dies is started again behind the mutant."""
    left, attempt = count, 0
    while left > 0:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT)}
        worker = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzzing.worker", str(seed + attempt), str(left), str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, cwd=ROOT, env=environment,
        )  # fmt: skip
        last, attempt, began = None, attempt + 1, time.monotonic()
        patience = 120.0  # for the imports
        while True:
            ready, _, _ = select.select([worker.stdout], [], [], max(0.0, began + patience - time.monotonic()))
            line = worker.stdout.readline() if ready else None
            if not line:
                break
            said = json.loads(line) if line.startswith(b'{"number"') else None
            if said is None:
                continue
            last, began, patience = said, time.monotonic(), PATIENCE_S
            if "problem" in said:
                left -= 1
                yield said
        if left > 0:
            worker.kill()
            assert last is not None, "the worker does not start"
            left -= 1
            yield (last or {"begins": "?"}) | {"problem": "it hung" if line is None else "it died", "outside": []}
        worker.wait()


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=[pytest.mark.full, pytest.mark.timeout(3000)])])
def test_every_mutant_is_read_or_refused_in_one_line(originals, count):
    """A traceback is the mildest thing that a file made for it does."""
    refused, wrong = 0, []
    for said in mutants(originals, count, SEED + count):
        refused += said.get("said") != "read"
        if said["problem"] or said["outside"] or said.get("peak", 0) > MEMORY:
            wrong.append(said)
    assert not wrong, "\n".join(map(str, wrong))
    assert count // 3 < refused < count  # else the mutants are too tame, or nothing is read any more


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_single_flipped_bits_are_named_or_lie_outside_every_digest(originals, tmp_path):
    """Of 200; adapter_config.json is PEFT's and has no digest, nor have the names under which ours are kept."""
    from tests.fuzzing.worker import read_checkpoint

    draw, uncovered, whole = random.Random(SEED), [], AdapterFile(originals / "adapter").tensors()
    for number in range(200):
        kind = ("checkpoint", "adapter", "quantised")[number % 3]
        folder = copy(originals / kind, tmp_path / f"{kind}-{number}")
        path = draw.choice(sorted(folder.iterdir()))
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        try:
            if kind == "checkpoint":
                read_checkpoint(folder)
            elif kind == "adapter":
                assert same(AdapterFile(folder).tensors(), whole)
            else:
                check_written(str(folder))
        except (UserError, NotImplementedError) as error:
            assert path.name in str(error) or str(folder) in str(error), (path, place, error)
        else:
            uncovered.append((path.name, place, (originals / kind / path.name).read_bytes()))
        shutil.rmtree(folder)
    for name, place, content in uncovered:
        if name == "adapter_model.safetensors":  # the word that finds the record, or "checksum" in it
            end = 8 + int.from_bytes(content[:8], "little")
            words = [
                content.find(word, 0, end) for word in (b"adalora_scale", b"checksum", b'"format"', b"__metadata__")
            ]
            assert any(start <= place < start + 16 for start in words), (name, place)
        else:
            assert name in ("adapter_config.json", "export.json"), (name, place)
    assert len(uncovered) < 60
