"""Read mutated folders one after the other in a process of its own: `python -m tests.fuzzing.worker SEED COUNT FOLDER`.

FOLDER holds one folder a kind. A line of JSON comes back for every mutant; whoever started this watches the clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from pathlib import Path

from adalora_scale.checkpoint.format import MANIFEST_NAME, Checkpoint, file_entry
from adalora_scale.config import DataConfig, ModelConfig, RunConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.dequantise import dequantised_weights
from adalora_scale.export.from_checkpoint import adapter_folder
from adalora_scale.export.inspection import describe, inspect_folder
from adalora_scale.placing.model import load_model
from adalora_scale.reading.written import check_written
from adalora_scale.tasks.registry import TASKS
from adalora_scale.training.run import check_model_path
from tests.fuzzing.mutants import mutate
from tests.fuzzing.peak import peak_bytes

_OUTSIDE: list[str] = []
_ROOTS: list[str] = []
_ALLOWED = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[2]), "/proc", "/sys", "/dev/null", "/dev/urandom")


def watch(event: str, arguments: tuple) -> None:
    """Note every file that is opened where nothing of this mutant lies."""
    if event == "open" and _ROOTS and isinstance(arguments[0], str | bytes):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((*_ROOTS, *_ALLOWED)):
            _OUTSIDE.append(path)


def read_adapter(folder: Path) -> None:
    describe(inspect_folder(folder))
    adapter = AdapterFile(folder)
    for module in adapter.modules:
        adapter.update(module)


def read_checkpoint(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    describe(inspect_folder(folder))
    with adapter_folder(folder) as made:
        read_adapter(made)


def read_base(folder: Path) -> None:
    config = _config(folder)
    check_model_path(config)
    load_model(config)
    BaseCheckpoint(folder, task=TASKS["causal_lm"], num_labels=None)


def read_quantised(folder: Path) -> None:
    check_written(str(folder))
    load_model(_config(folder))
    adapter = AdapterFile(folder.parent / "adapter_for_quantised")
    dequantised_weights(adapter, BaseCheckpoint(folder, task=TASKS["causal_lm"], num_labels=None))


def _config(folder: Path) -> RunConfig:
    return RunConfig(model=ModelConfig(model_name_or_path=str(folder)), data=DataConfig(train=""),
                     training={"output_dir": str(folder / "out")})  # fmt: skip


READERS = {"adapter": read_adapter, "lora": read_adapter, "checkpoint": read_checkpoint, "base": read_base,
           "sharded": read_base, "quantised": read_quantised}  # fmt: skip


def reseal(folder: Path) -> None:
    """Give a mutated checkpoint or record checksums that fit: whoever makes a file can make its checksum."""
    path = folder / MANIFEST_NAME
    if path.is_file() and not any(file.is_symlink() for file in folder.iterdir()):  # /dev/zero has no end
        try:
            text = path.read_text()
            tree = json.loads(text)
            for name in tree["files"]:
                tree["files"][name] = file_entry(folder / name)
            blank = json.dumps(tree | {"checksum": "0" * 64}).encode()
        except (ValueError, KeyError, TypeError, OSError, RecursionError, AttributeError):
            return
        digest = hashlib.sha256(blank).hexdigest()
        path.write_bytes(blank.replace(b"0" * 64, digest.encode(), 1))
    record = folder / "export.json"
    if record.is_file() and not record.is_symlink():
        record.unlink()


def main(seed: int, count: int, source: Path) -> None:
    sys.addaudithook(watch)
    draw = random.Random(seed)
    kinds = [kind for kind in READERS if (source / kind).is_dir()]
    for number in range(count):
        kind = kinds[number % len(kinds)]
        with tempfile.TemporaryDirectory(dir=source) as name:
            folder = Path(name) / kind
            shutil.copytree(source / kind, folder)
            what = mutate(draw.choice(sorted(path for path in folder.iterdir() if path.is_file())), draw)
            if draw.random() < 0.8:
                reseal(folder)
            print(json.dumps({"number": number, "kind": kind, "begins": what}), flush=True)
            _OUTSIDE.clear()
            _ROOTS[:] = [str(Path(name).resolve()), tempfile.gettempdir() + "/adalora_checkpoint_",
                         str(source.resolve() / "adapter_for_quantised")]  # fmt: skip
            problem, said = "", "read"
            try:
                READERS[kind](folder)
            except (UserError, Unsupported) as error:
                said = " ".join(str(error).split())
                said.encode()
            except BaseException:
                problem = traceback.format_exc()
            _ROOTS.clear()
            peak = peak_bytes()
            result = {"problem": problem, "said": said, "outside": _OUTSIDE[:3], "peak": peak}
            print(json.dumps({"number": number, "kind": kind, "begins": what, **result}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
