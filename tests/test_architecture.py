"""The import rule of DESIGN.md and the other rules of the code's form, kept by reading the syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from adalora_scale.tasks.registry import TASKS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "adalora_scale"
MAX_LINES = 400

# A room imports rooms of lower layers, and of its own layer as long as no circle arises.
# The package's own __init__ (its public names) stands beside the command line, above everything.
LAYERS = {
    "": 8,
    "cli": 8,
    "__main__": 8,
    "cluster": 7,
    "recipes": 7,
    "sweep": 7,
    "verify": 7,
    "training": 6,
    "placing": 5,
    "checkpoint": 4,
    "export": 4,
    "controller": 3,
    "engines": 2,
    "tasks": 2,
    "adalora": 1,
    "data": 1,
    "report": 1,
    "quantization": 0,
    "experts": 0,
    "config": 0,
    "reading": 0,
    "store": 0,
    "finite": 0,
    "files": 0,
    "errors": 0,
    "installed": 0,
    "messages": 0,
    "process_rank": 0,
}
LEAVES = {  # what else they may import
    "data": {"config", "errors", "files", "messages", "process_rank", "reading"},
    "quantization": {"config", "errors", "experts", "files", "finite", "messages", "reading"},
    "experts": {"errors"},
    "reading": {"errors", "messages"},
    "store": {"errors", "files", "messages"},
    "report": {"errors", "files", "messages", "reading", "store"},
    "finite": {"errors"},
    "config": {"errors", "messages", "reading"},
    "files": {"errors"},
    "errors": {"messages", "process_rank"},
    "installed": set(),
    "messages": set(),
    "process_rank": set(),
}
TASK_ROOMS = ("tasks", "config")  # who may name a task; the others ask the object
TASK_WORDS = {*TASKS, *(task.peft_type for task in TASKS.values()), "CausalLM", "SequenceClassification"}
DEEPSPEED_HOMES = ("engines/zero",)
ENGINE_NAMES = {"one process", "ddp", "fsdp2", "hsdp", "deepspeed", "zero0", "zero1", "zero2", "zero3", "zero3-offload"}
KNOW_ENGINES = {"engines", "config"}  # rooms that may compare an engine's name; launch/ may too
PREFIX_TESTS = {"startswith", "endswith", "removeprefix", "removesuffix"}


def room_of(path: str) -> str:
    """`engines/zero.py` → `engines`, `config.py` → `config`, `__init__.py` → the package itself."""
    first = path.split("/")[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_modules(node: ast.Import | ast.ImportFrom, path: str) -> Iterator[str]:
    """Yield the dotted names an import statement may load; `from a import b` gives `a` and `a.b`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    module = node.module or ""
    if node.level:
        parts = [PACKAGE, *path.split("/")][: -node.level]
        module = ".".join([*parts, module]).rstrip(".")
    yield module
    yield from (f"{module}.{alias.name}" for alias in node.names)


def imported_rooms(node: ast.Import | ast.ImportFrom, path: str) -> set[str]:
    rooms = set()
    for module in imported_modules(node, path):
        top, _, rest = module.partition(".")
        if top == PACKAGE:
            rooms.add(rest.split(".")[0])
    if isinstance(node, ast.ImportFrom) and len(rooms) > 1:
        rooms -= {""}  # `from adalora_scale import config` is about config
    return {room if room in LAYERS else "" for room in rooms if room != "__version__"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, *, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Yield every node and whether it runs only when a function is called (or never, under TYPE_CHECKING)."""
    for child in ast.iter_child_nodes(node):
        later = lazy or is_type_checking(node) or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield child, later
        yield from walk(child, lazy=later)


def import_violations(source: str, path: str) -> list[str]:
    """Check one file of the package; `path` is relative to it, with forward slashes."""
    room, found = room_of(path), []
    if room not in LAYERS:
        return [f"{path}: '{room}' is a room DESIGN.md does not name; give it a layer in {Path(__file__).name}"]
    for node, lazy in walk(ast.parse(source)):
        if room == "adalora" and isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append(f"{path}:{node.lineno}: the method must not use torch.distributed")
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        here = f"{path}:{node.lineno}"
        for other in sorted(imported_rooms(node, path) - {room}):
            allowed = LEAVES.get(room)
            if other not in allowed if allowed is not None else LAYERS[other] > LAYERS[room]:
                found.append(f"{here}: {room} must not import {other or PACKAGE}")
        modules = list(imported_modules(node, path))
        if room == "adalora" and any(f"{name}.".startswith("torch.distributed.") for name in modules):
            found.append(f"{here}: the method must not import torch.distributed")
        if any(name.split(".")[0] == "deepspeed" for name in modules):
            if not path.startswith(DEEPSPEED_HOMES):
                found.append(f"{here}: deepspeed is imported only in {' and '.join(DEEPSPEED_HOMES)}")
            if not lazy:
                found.append(f"{here}: deepspeed must be imported inside a function")
    return found


def circle(files: Iterable[tuple[str, str]]) -> list[str]:
    """Return a circle of rooms that import each other, or nothing; `files` are (path, source)."""
    graph: dict[str, set[str]] = {}
    for path, source in files:
        imports = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))
        room = room_of(path)
        graph.setdefault(room, set()).update(*(imported_rooms(node, path) - {room} for node in imports))
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def bare_asserts(source: str, path: str) -> list[str]:
    return [f"{path}:{node.lineno}: assert" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]


def task_names(source: str, path: str) -> list[str]:
    """Find strings that are a task's name, PEFT's name of one, or what tells its classes, outside the tasks' room."""
    if room_of(path) in TASK_ROOMS:
        return []
    strings = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [f"{path}:{node.lineno}: '{node.value}'" for node in strings if node.value in TASK_WORDS]


def constants(node: ast.AST | None) -> Iterator[str]:
    """Yield the strings that an expression or a pattern is, or holds as a tuple, list, set or alternative."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.Tuple(elts=inner) | ast.List(elts=inner) | ast.Set(elts=inner) | ast.MatchOr(patterns=inner):
            for part in inner:
                yield from constants(part)
        case ast.MatchValue(value=inner):
            yield from constants(inner)


def engine_comparisons(source: str, path: str) -> list[str]:
    """Find where a name of an engine decides something: compared, matched, a prefix, in a collection, a dict's key.

    Alone in a collection, or as a dict's key, "deepspeed" is a package and one of TrainingArguments' keys.
    """
    if room_of(path) in KNOW_ENGINES:
        return []
    names, found = ENGINE_NAMES - {"deepspeed"}, []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Compare(left=left, comparators=others):
                hit = any(text in ENGINE_NAMES for side in (left, *others) for text in constants(side))
                hit |= any(isinstance(side, ast.Dict) and engine_keys(side) & ENGINE_NAMES for side in others)
            case ast.match_case(pattern=pattern):
                # (case "a", "b" is a sequence: look at every pattern below)
                hit = any(text in ENGINE_NAMES for part in ast.walk(pattern) for text in constants(part))
            case ast.Call(func=ast.Attribute(attr=name), args=args) if name in PREFIX_TESTS:
                hit = any(t in ENGINE_NAMES or t.startswith("zero") for arg in args for t in constants(arg))
            case ast.Subscript(value=ast.Dict() as table) | ast.Attribute(value=ast.Dict() as table):
                hit = bool(engine_keys(table) & ENGINE_NAMES)  # looked up, or .get
            case ast.Dict():
                hit = bool(engine_keys(node) & names)
            case ast.Tuple() | ast.List() | ast.Set():
                hit = any(text in names for text in constants(node))
            case _:
                hit = False
        if hit:
            where = node.pattern.lineno if isinstance(node, ast.match_case) else node.lineno
            found.append(f"{path}:{where}: ask the engine (engines/engine.py) instead of comparing its name")
    return found


def engine_keys(table: ast.Dict) -> set[str]:
    return {text for key in table.keys for text in constants(key)}


def python_files(folder: str) -> list[tuple[str, str]]:
    base = ROOT / folder
    return [(path.relative_to(base).as_posix(), path.read_text()) for path in sorted(base.rglob("*.py"))]


def test_every_import_points_down():
    """Else the method's rooms can no longer be read, tested or replaced alone."""
    assert [line for path, source in python_files(PACKAGE) for line in import_violations(source, path)] == []


def test_no_two_rooms_import_each_other():
    """Else two rooms of one layer have become one."""
    assert circle(python_files(PACKAGE)) == []


def test_no_engine_name_is_compared_outside_the_engines_room():
    """Else a new engine touches every file that compares one, and the one that was forgotten is wrong in silence."""
    assert [line for path, source in python_files(PACKAGE) for line in engine_comparisons(source, path)] == []


def test_library_code_has_no_bare_assert():
    """Else `python -O` removes a check, and a user sees AssertionError without a word."""
    assert [line for path, source in python_files(PACKAGE) for line in bare_asserts(source, f"{PACKAGE}/{path}")] == []
    assert [line for path, source in python_files("launch") for line in bare_asserts(source, f"launch/{path}")] == []


def test_no_task_name_outside_the_tasks_room_and_the_config():
    """Else the next task touches every place that compares the name, and one of them is forgotten."""
    assert [line for path, source in python_files(PACKAGE) for line in task_names(source, path)] == []


def test_no_file_is_too_long_to_read():
    """Else a file has more than one subject."""
    lengths = {path: source.count("\n") for path, source in python_files(PACKAGE)}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("adalora/layer.py", "from adalora_scale.engines.zero import Span\nfrom adalora_scale.controller import x"),
        ("adalora/layer.py", "from adalora_scale.training import run"),
        ("adalora/layer.py", "def f():\n    from adalora_scale import controller"),
        ("adalora/layer.py", "from ..controller import RankAllocator"),
        ("adalora/layer.py", "from .. import training"),
        ("adalora/layer.py", "import torch.distributed as dist"),
        ("adalora/layer.py", "from torch import distributed"),
        ("adalora/layer.py", "from torch.distributed.tensor import DTensor"),
        ("adalora/layer.py", "import torch\ntorch.distributed.get_rank()"),
        ("engines/zero.py", "import deepspeed"),
        ("engines/zero.py", "class A:\n    from deepspeed import zero"),
        ("engines/fsdp2.py", "def f():\n    import deepspeed"),
        ("engines/fsdp2.py", "import adalora_scale.controller"),
        ("engines/fsdp2.py", "import adalora_scale"),
        ("controller.py", "import adalora_scale.training.run"),
        ("controller.py", "def f():\n    from deepspeed.runtime import engine"),
        ("training/run.py", "from adalora_scale.cli import main"),
        ("training/run.py", "def f():\n    import deepspeed"),
        ("verify/engines.py", "def f():\n    import deepspeed"),
        ("training/run.py", "try:\n    import deepspeed\nexcept ImportError:\n    pass"),
        ("config.py", "from adalora_scale.adalora import schedule"),
        ("config.py", "from adalora_scale import quantization"),
        ("errors.py", "from adalora_scale.config import Config"),
        ("quantization/linear.py", "from adalora_scale.adalora.layer import AdaLoraLayer"),
        ("utils.py", "import os"),
    ],
)
def test_the_checker_sees_a_forbidden_import(path, source):
    """Else the rule is kept only by luck."""
    assert import_violations(source, path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("__init__.py", "from adalora_scale.training.run import train"),
        ("cli.py", "from adalora_scale import cluster, verify"),
        ("engines/zero_place.py", "def f():\n    import deepspeed"),
        ("engines/zero_place.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import deepspeed"),
        ("training/run.py", "from adalora_scale.export import peft\nfrom adalora_scale import errors, __version__"),
        ("engines/zero.py", "async def f():\n    from deepspeed.utils import groups"),
        ("engines/zero.py", "import torch.distributed\nfrom ..adalora.layer import FACTORS\nfrom . import span"),
        ("controller.py", "from adalora_scale import engines\nfrom .adalora import layer"),
        ("adalora/layer.py", "import torch\nfrom torch import nn\nfrom adalora_scale.errors import UserError"),
        ("config.py", "from adalora_scale.errors import UserError"),
        ("quantization/linear.py", "from adalora_scale.errors import UserError\nimport torch.distributed"),
    ],
)
def test_the_checker_lets_an_allowed_import_pass(path, source):
    """Else the rule would forbid what DESIGN.md allows."""
    assert import_violations(source, path) == []


@pytest.mark.parametrize(
    "source",
    [
        'if config.task == "sequence_classification":\n    pass',
        'match task:\n    case "causal_lm":\n        pass',
        'kinds = {"SEQ_CLS": 1}',
        'f(task_type="CAUSAL_LM")',
        'known = "SequenceClassification" in type(model).__name__',
    ],
)
def test_the_checker_sees_a_task_name(source):
    """Else the rule is kept only by luck."""
    assert task_names(source, "training/run.py") and task_names(source, "export/merge.py")
    assert task_names(source, "tasks/causal_lm.py") == task_names(source, "config/options.py") == []
    assert task_names('"""Text about causal_lm and SEQ_CLS."""\nf(task.peft_type)', "training/run.py") == []


@pytest.mark.parametrize(
    "source",
    [
        'if engine.name == "ddp":\n    pass',
        'if "fsdp2" != engine.name:\n    pass',
        'x = engine in ("fsdp2", "hsdp")',
        'x = engine not in {"zero1"}',
        'x = name in {"deepspeed": 1}',
        'x = name in ["deepspeed", "auto"]',
        'x = engine.startswith("zero")',
        'x = engine.startswith(("ddp", "zero"))',
        'x = int(engine.removeprefix("zero"))',
        'match engine:\n    case "zero3":\n        pass',
        'match engine:\n    case "one process" | "ddp":\n        pass',
        'match engine, ranks:\n    case "hsdp", 4:\n        pass',
        'names = {"ddp": 1, "other": 2}\nx = names[engine]',
        'x = {"deepspeed": 1}[name]',
        'x = {"deepspeed": 1}.get(name)',
        'ORDER = ("ddp", "zero2")\nx = engine in ORDER',
    ],
)
def test_the_checker_sees_a_compared_engine_name(source):
    """Else the rule is kept only by luck."""
    assert engine_comparisons(source, "training/run.py")
    assert engine_comparisons(source, "engines/registry.py") == engine_comparisons(source, "config/options.py") == []


def test_the_checker_lets_words_pass_that_are_no_engine():
    """Else the rule would forbid the package deepspeed, and sentences about engines."""
    allowed = """
_MANAGED = {"deepspeed": "engine.config", "fsdp": "engine.name"}
PACKAGES = ("torch", "deepspeed")
parser.add_argument("--engines", help="ddp fsdp2 hsdp zero1")
x = getattr(arguments, "deepspeed", None)
if engine.name == other.name or dtype == "float32":
    raise UserError("engine.name=ddp")
"""
    assert engine_comparisons(allowed, "training/run.py") == []


def test_the_checker_sees_a_circle_and_an_assert():
    """Else these two rules are kept only by luck."""
    export, checkpoint = "from adalora_scale import checkpoint", "from adalora_scale.export import peft"
    assert set(circle([("export/peft.py", export), ("checkpoint/html.py", checkpoint)])) == {"export", "checkpoint"}
    assert circle([("export/peft.py", export)]) == []
    assert bare_asserts("def f(x):\n    assert x", "launch/train.py") == ["launch/train.py:2: assert"]


def test_nothing_prints_past_the_escaping():
    """A name from a stranger's file would reach the terminal as it is; `print` belongs to messages.py."""
    # The words of launch-check are read by a shell: quoted for it, not for a person.
    allowed = {"messages.py", "cluster/launching/command.py"}
    found = [
        f"{path}:{node.lineno}"
        for path, source in python_files(PACKAGE)
        if path not in allowed
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert found == []
