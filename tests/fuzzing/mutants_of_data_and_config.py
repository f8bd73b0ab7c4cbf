"""Mutated config and data files through the real readers; a process of its own, so that its peak and its end are seen.

    python -m tests.fuzzing.mutants_of_data_and_config SEED COUNT FOLDER

Prints a JSON line before each mutant and one after it; the caller (test_data_and_config.py) judges them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import datasets

from adalora_scale.cluster.launching.hostfile import read_hostfile
from adalora_scale.cluster.preflight.thresholds import load_thresholds
from adalora_scale.config import DataConfig, load_config
from adalora_scale.data.rendering import Renderer
from adalora_scale.data.rows import load_raw
from adalora_scale.engines.zero_place import at_stage, deepspeed_config
from adalora_scale.errors import run_reporting_errors
from adalora_scale.tasks.registry import find_task, wanted_rows
from adalora_scale.training.arguments import convert_training_section
from tests.fuzzing.peak import peak_bytes

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """model: {model_name_or_path: m, load_in_4bit: true, bnb_4bit_blocksize: 64}
data: &data
  train: [rows.jsonl, more.jsonl]
  eval_fraction: 0.1
  max_length: 512
adalora: {target_r: 4, tinit: 0.1, tfinal: 0.3, orth_reg_weight: 0.1, target_modules: [q_proj, v_proj]}
training: {output_dir: out, learning_rate: 1e-3, max_steps: 10, per_device_train_batch_size: 2, bf16: false}
engine: {name: fsdp2, config: {replicate: 1, cpu_offload: false}}
task: causal_lm
"""
DEEPSPEED = '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, "bf16": {"enabled": "auto"}}'
THRESHOLDS = "shared_memory_min_gib: 1\nopen_files_min: 1024\nnccl:\n  link_min_share: 0.5\n  latency_max_times: 3\n"
TEXTS = '{"text": "one é"}\n{"text": "two \\u00e9", "n": 1}\n{"text": "three", "n": null}\n'
TURNS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' * 3
LABELS = '{"text": "one", "label": 1}\n{"text": "two", "label": 2}\n{"text": "three", "label": 1}\n'
ARRAY = '[{"prompt": "a", "completion": "b"},\n {"prompt": "c", "completion": "d"}]'
TABLE = 'text,label\n"one, two",a\nthree,b\n"four ""five""",a\n'
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}{% generation %}{{ m['content'] * 2 }}{% endgeneration %}{% endfor %}"
    "{% set n = namespace(x='a') %}{% for i in range(9) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
)
NASTY = [
    *(b"[", b"{", b"]", b"}", b'"', b"'", b":", b",", b"\n", b"\r", b"\t", b"\\", b"\0", b"\x1b[2J", b"\xff", b"\xfe"),
    *(b"\xef\xbb\xbf", b"&a ", b"*a", b"<<: *data\n", b"!!python/name:os.system ", b"!!int ", b"!!set ", b"- ", b"? "),
    *(b"null", b"true", b".nan", b".inf", b"1e999", b"-1", b"0x" + b"f" * 99, b"9" * 5000, b"2001-01-01", b"~", b"../"),
    *(b"/dev/zero", b"\\ud800", "\u202e".encode(), "漢".encode(), b"[" * 3000, b'{"a":' * 3000, b"a" * 100_000),
    *(
        b"__class__",
        b"{{",
        b"}}",
        b"{%",
        b"%}",
        b" * 10**9",
        b"range(10**9)",
        b"%9999999d",
        b"stage",
        b"text",
        b"label",
    ),
]

FORBIDDEN = ("os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class")


def mutate(text: bytes, draw: random.Random) -> bytes:
    """Return `text` after one to four changes: bytes flipped, pieces cut, doubled or moved, nasty words put in."""
    for _ in range(draw.randint(1, 4)):
        start, end = sorted(draw.randrange(len(text) + 1) for _ in range(2))
        piece = text[start : min(end, start + 40)]
        match draw.randrange(7):
            case 0:
                text = text[:start] + bytes([draw.randrange(256)]) + text[start + 1 :]
            case 1:
                text = text[:start] + text[start + len(piece) :]
            case 2:
                text = text[:start] + piece * draw.choice([2, 50, 2000]) + text[start:]
            case 3:
                text = text[:start]
            case 4:
                text = text[:end] + piece + text[end:]
            case _:
                text = text[:start] + draw.choice(NASTY) + text[draw.choice([start, start + len(piece)]) :]
    return text


def parquet() -> bytes:
    """Return a small Parquet file."""
    file = io.BytesIO()
    datasets.Dataset.from_dict({"text": ["one", "two"] * 20, "label": [0, 1] * 20}).to_parquet(file)
    return file.getvalue()


def reads(path: Path) -> dict[str, tuple[bytes, str, Callable[[], object]]]:
    """Return every kind of file: a good one, its extension, and the reader of `path`."""
    rows = lambda task: load_raw(DataConfig(train=str(path)), wanted_rows(find_task(task)), seed=0)  # noqa: E731
    language, classes = (lambda: rows("causal_lm")), (lambda: rows("sequence_classification"))
    files = {
        "config": (CONFIG, "yaml", lambda: convert_training_section(load_config(path))),
        "override": ("adalora.target_modules=[q_proj, &a v_proj, *a]", "txt", lambda: _override(path)),
        "deepspeed": (DEEPSPEED, "json", lambda: at_stage(deepspeed_config(str(path)))),
        "thresholds": (THRESHOLDS, "yaml", lambda: load_thresholds(path)),
        "hostfile": ("node1 slots=8\nnode2 slots=8 # the second\n", "txt", lambda: read_hostfile(path)),
        "texts": (TEXTS, "jsonl", language),
        "turns": (TURNS, "jsonl", language),
        "labels": (LABELS, "jsonl", classes),
        "array": (ARRAY, "json", language),
        "table": (TABLE, "csv", classes),
        "parquet": (parquet(), "parquet", classes),
        "template": (TEMPLATE, "jinja", lambda: _render(path)),
    }
    return {k: (c.encode() if isinstance(c, str) else c, ext, read) for k, (c, ext, read) in files.items()}


def _override(path: Path) -> None:
    good = path.with_name("good.yaml")
    good.write_text(CONFIG, encoding="utf-8")
    convert_training_section(
        load_config(good, [path.read_bytes().decode(errors="replace").strip().replace(": ", "=", 1)])
    )


def _render(path: Path) -> None:
    with Renderer(path.read_bytes().decode(errors="replace"), {"eos_token": "</s>"}) as renderer:
        renderer.render(
            [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2, ["1", "2"]
        )


def watch(folder: Path) -> list[str]:
    """Return a list that fills with what is opened outside, written outside, started or connected to."""
    seen: list[str] = []
    readable = tuple(map(str, (folder, ROOT, sys.prefix, sys.base_prefix, "/proc", "/sys", "/usr", "/etc", "/lib")))
    ours = str(ROOT / "adalora_scale" / "data" / "template_child.py")

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes):
            name = os.path.abspath(os.fsdecode(arguments[0]))
            flags = arguments[2] if isinstance(arguments[2], int) else 0
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            allowed = (str(folder), "/dev/null") if writes else (*readable, "/dev/null", "/dev/urandom")
            if not name.startswith(allowed):
                seen.append(f"{'written' if writes else 'read'}: {name}")
        elif event in FORBIDDEN or (event == "subprocess.Popen" and ours not in arguments[1]):  # type: ignore[operator]
            seen.append(f"{event} {arguments!r:.200}")

    sys.addaudithook(hook)
    return seen


def main(seed: int, count: int, folder: Path) -> None:
    """Read `count` mutants."""
    os.chdir(folder)
    datasets.disable_progress_bars()

    def unknown(name: str) -> str:
        raise OSError("names are not asked of the network here")

    socket.gethostbyname = unknown
    kinds = [kind for kind in reads(folder) if kind != "template"] * 2 + ["template"]
    for kind, (good, extension, _) in reads(folder).items():  # imports and first calls are not a mutant's doing
        path = folder / f"first-{kind}.{extension}"
        path.write_bytes(good)
        reads(path)[kind][2]()
    seen = watch(folder)
    for index in range(count):
        draw = random.Random(f"{seed}:{index}")
        kind = kinds[index % len(kinds)]
        good, extension, _ = reads(folder)[kind]
        path = folder / f"{index}.{extension}"
        path.write_bytes(mutate(good, draw))
        read = reads(path)[kind][2]
        print(json.dumps({"begun": index, "kind": kind, "file": str(path)}), flush=True)
        start, said, error, code = time.monotonic(), io.StringIO(), "", -1
        with contextlib.redirect_stderr(said):
            try:
                code = run_reporting_errors(lambda read=read: bool(read()) and None)
            except Exception as bug:
                error = f"{type(bug).__name__}: {bug}"[:300]
        print(
            json.dumps(
                {
                    "ended": index,
                    "code": code,
                    "bug": error,
                    "said": said.getvalue(),
                    "seconds": time.monotonic() - start,
                    "peak": peak_bytes(),
                    "outside": seen[:3],
                }
            ),
            flush=True,
        )
        seen.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
