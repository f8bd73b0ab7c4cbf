"""The pages of docs/reference/, from the signatures and docstrings of what `adalora_scale` exports.

    python -m tests.reference            # write the pages
    python -m tests.reference --check    # compare; exit code 1 and the difference where they differ

griffe reads the sources; nothing of the package is imported but its list of names.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import griffe

import adalora_scale

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
PAGES = {
    "training": (
        "Options, injection, and training in a loop or a trainer",
        ["AdaLoraConfig", "inject_adalora", "coverage", "RankAllocator", "start_from_adapter", "AdaLoraCallback",
         "AdaLoraTrainer", "AdaLoraSFTTrainer"],
    ),
    "adapters": (
        "Adapters in files and in memory",
        ["save_adapter", "load_adapter", "adapter_names", "set_adapter", "delete_adapter", "disable_adapters",
         "merge_adapters", "unmerge_adapters", "merge_and_unload", "unload"],
    ),
}  # fmt: skip
"""Page → its title and names, in order; a test keeps this equal to the package's list."""
WIDTH = 100
FOR_USERS = {"AdaLoraCallback": {"allocator", "reports", "tokens_per_second"}, "AdaLoraSFTTrainer": set()}
"""Of classes that trainers call: the members that are there for users."""
_LISTS = {"parameters": "Args", "attributes": "Attributes", "raises": "Raises"}


def pages() -> dict[str, str]:
    """Return file name → text."""
    return {f"{name}.md": _page(name) for name in PAGES}


def _page(name: str) -> str:
    title, names = PAGES[name]
    parts = [
        f"# {title}",
        "Made from the docstrings by `python -m tests.reference`; how to use them: [api.md](../api.md).",
    ]
    for public in names:
        parts += _described(public, found(public))
    return "\n\n".join(parts) + "\n"


@cache
def _package() -> Any:
    return griffe.load("adalora_scale", search_paths=[str(ROOT)])


def found(public: str) -> Any:
    """Return griffe's object of a public name."""
    member = _package()[f"{adalora_scale._HOME[public]}.{public}"]
    return member.final_target if member.is_alias else member


def _described(name: str, item: Any) -> list[str]:
    parts = [f"## {name}", _indented(_signature(name, item))]
    if item.is_function:
        return parts + _texts(item)
    made = item.members.get("__init__")
    parts += _texts(item, *([made] if made is not None else []), *_bases(item))
    fields = [member for member in _members(item) if member.is_attribute and "property" not in member.labels]
    if fields:
        parts.append("Attributes:\n\n" + "\n".join(_listed(field) for field in fields))
    for member in _members(item):
        if member not in fields:
            own = member.name if member.is_attribute else _signature(member.name, member)
            parts += [f"### {name}.{member.name}", _indented(own), *_texts(member)]
    return parts


def _bases(item: Any) -> list[Any]:
    """The package's own classes that a class inherits from: their arguments are its."""
    return [base for base in item.resolved_bases if base.path.startswith("adalora_scale.")]


def _members(item: Any) -> Iterator[Any]:
    for member in item.members.values():
        named = member.name in FOR_USERS.get(item.name, {member.name}) and not member.name.startswith("_")
        if named and not member.is_alias and member.docstring and (member.is_function or member.is_attribute):
            yield member


def _signature(name: str, item: Any) -> str:
    if item.is_class:
        makers = [one.members.get("__init__") for one in (item, *_bases(item))]
        maker = next((one for one in makers if one is not None and not one.is_alias), None)
        parameters = list(maker.parameters)[1:] if maker is not None else []
        if "dataclass" in item.labels:
            parameters = [one for one in parameters if not one.name.startswith("_")]
        returns = ""
    else:
        own = [one for one in item.parameters if one.name not in ("self", "cls")]
        parameters, returns = own, f" -> {item.returns}" if item.returns is not None else ""
    words = _words(parameters)
    line = f"{name}({', '.join(words)}){returns}"
    if len(line) > WIDTH:
        line = f"{name}(\n" + "".join(f"    {word},\n" for word in words) + f"){returns}"
    return line


def _words(parameters: list[Any]) -> list[str]:
    words, star = [], False
    for one in parameters:
        if one.kind is griffe.ParameterKind.keyword_only and not star:
            words.append("*")
        star = star or one.kind in (griffe.ParameterKind.keyword_only, griffe.ParameterKind.var_positional)
        stars = {griffe.ParameterKind.var_positional: "*", griffe.ParameterKind.var_keyword: "**"}.get(one.kind, "")
        word = f"{stars}{one.name}" + (f": {one.annotation}" if one.annotation is not None else "")
        if one.default is not None and not stars:
            word += f" = {_default(str(one.default))}"
        words.append(word)
    return words


def _default(text: str) -> str:
    return "<the preset's>" if text == "_OF_PRESET" else text


def sections(item: Any) -> list[Any]:
    """Return an object's docstring in parts."""
    if not item.docstring:
        return []
    return list(item.docstring.parse("google", warnings=False))


def _texts(item: Any, *also: Any) -> list[str]:
    """An object's docstring; and arguments, attributes and errors of others that are its too."""
    own, found = sections(item), [section for other in (item, *also) for section in sections(other)]
    if unknown := {section.kind.value for section in found} - {"text", *_LISTS, "returns", "yields"}:
        raise ValueError(f"{item.path}: a docstring has sections that this page does not show: {', '.join(unknown)}")
    parts = [section.value.strip().replace("``", "`") for section in own if section.kind.value == "text"]
    for kind, word in _LISTS.items():
        entries = [entry for section in found if section.kind.value == kind for entry in section.value]
        names = [entry.annotation if kind == "raises" else entry.name for entry in entries]
        lines = [f"- `{name}`: {_line(entry.description)}" for name, entry in zip(names, entries, strict=True)]
        parts += [f"{word}:\n\n" + "\n".join(lines)] if lines else []
        if kind == "attributes":
            for section in own:
                if section.kind.value in ("returns", "yields"):
                    said = " ".join(_line(entry.description) for entry in section.value)
                    parts.append(f"{section.kind.value.capitalize()}: {said}")
    return parts


def _listed(field: Any) -> str:
    value = f" = {_default(str(field.value))}" if "instance-attribute" not in field.labels and field.value else ""
    kind = f": {field.annotation}" if field.annotation is not None else ""
    return f"- `{field.name}{kind}{value}`: {_line(field.docstring.value)}"


def _line(text: str) -> str:
    return " ".join(text.replace("``", "`").split())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def main() -> int:
    """Write or compare the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is another")
    check = parser.parse_args().check
    made, differ = pages(), False
    if not check:
        FOLDER.mkdir(exist_ok=True)
    for name, text in made.items():
        path = FOLDER / name
        stands = path.read_text(encoding="utf-8") if path.exists() else ""
        if not check:
            path.write_text(text, encoding="utf-8")
            continue
        differ = differ or stands != text
        for line in difflib.unified_diff(stands.splitlines(), text.splitlines(), name, "docstrings", lineterm=""):
            print(line)
    return int(differ)


if __name__ == "__main__":
    sys.exit(main())
