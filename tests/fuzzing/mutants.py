"""Mutants of JSON and safetensors files, all drawn from one seed."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

ODD = [
    None, True, -1, 0, 10**12, 2**63, 10**40, 1e308, float("nan"), float("inf"), "", "8", "\x1b[31m", "\ud800",
    "(a+)+$", "../../etc/passwd", "/etc/passwd", "a\0b", [], {}, [[]], {"": None}, [0] * 50, "x" * 5000,
    "kernels-community/x",
]  # fmt: skip
NESTED = 5000


def places(tree, path=()):
    """List the path of every value of a JSON tree."""
    found = [path]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def set_at(tree, path, value):
    if not path:
        return value
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


def at(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def mutate_tree(text: str, draw: random.Random) -> str:
    """Give JSON text one fault: a wrong type, a missing, repeated or foreign key, a huge number, endless nesting."""
    tree = json.loads(text)
    path = draw.choice(places(tree))
    kind = draw.choice(["odd", "odd", "odd", "missing", "twice", "nested", "larger", "swap"])
    if kind == "odd":
        return json.dumps(set_at(tree, path, draw.choice(ODD)))
    if kind == "missing" and path and isinstance(path[-1], str):
        del at(tree, path[:-1])[path[-1]]
        return json.dumps(tree)
    if kind == "twice" and path and isinstance(path[-1], str):
        key, value = json.dumps(path[-1]), json.dumps(at(tree, path))
        return json.dumps(tree).replace(f"{key}: {value}", f"{key}: {value}, {key}: {json.dumps(draw.choice(ODD))}", 1)
    if kind == "nested":
        opened, closed = draw.choice([("[", "]"), ('{"a":', "}")])
        marked = json.dumps(set_at(tree, path, "@here@"))
        return marked.replace('"@here@"', opened * NESTED + "1" + closed * NESTED)
    if kind == "larger" and type(at(tree, path)) in (int, float):
        return json.dumps(set_at(tree, path, at(tree, path) * draw.choice([-1, 2, 1000, 10**6, 0.5])))
    other = draw.choice(places(tree))
    return json.dumps(set_at(tree, path, json.loads(json.dumps(at(json.loads(text), other)))))


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip a bit, cut, insert, or repeat a part."""
    place = draw.randrange(max(len(content), 1))
    match draw.choice(["flip", "flip", "cut", "insert", "repeat"]):
        case "flip":
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            return bytes(changed)
        case "cut":
            return content[:place]
        case "insert":
            return content[:place] + draw.randbytes(draw.randrange(1, 9)) + content[place:]
        case _:
            return content[:place] + content[max(place - 20, 0) :]


def mutate_header(content: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file, or the length that it says it has."""
    (length,) = struct.unpack("<Q", content[:8])
    if draw.random() < 0.15:
        claimed = draw.choice([0, 1, length - 1, length + 1, 2**31, 2**60, 2**64 - 1])
        return struct.pack("<Q", claimed) + content[8:]
    text = mutate_tree(content[8 : 8 + length].decode(), draw).encode(errors="replace")
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def mutate(path: Path, draw: random.Random) -> str:
    """Damage one file of a folder in place, and say how."""
    kind = draw.choice(["content", "content", "content", "content", "bytes", "link", "gone"])
    if kind == "link":
        path.unlink()
        path.symlink_to(draw.choice(["/etc/passwd", "/dev/zero", "../secret.json", path.name]))
    elif kind == "gone":
        path.unlink()
    elif kind == "bytes" or path.suffix not in (".json", ".safetensors"):
        path.write_bytes(mutate_bytes(path.read_bytes(), draw))
    elif path.suffix == ".json":
        path.write_text(mutate_tree(path.read_text(), draw), errors="surrogateescape")
    else:
        path.write_bytes(mutate_header(path.read_bytes(), draw))
    return f"{kind} of {path.name}"
