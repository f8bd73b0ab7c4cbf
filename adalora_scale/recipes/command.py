"""`adalora-scale recipes`: list the shipped configs, or write one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.files import replace_text
from adalora_scale.messages import say, say_json, say_text
from adalora_scale.recipes.reading import recipe, recipes

_EXAMPLES = """
examples:
  adalora-scale recipes
  adalora-scale recipes quickstart > q.yaml && adalora-scale train --config q.yaml
  adalora-scale recipes gsm8k_llama3_1_8b_24gb --output run.yaml
"""


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "recipes",
        help="list the configs that ship with the package, or write one",
        description="List the configs that ship with the package; with NAME write that one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="of a recipe: its YAML goes to standard output")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there; a file that exists stays")
    parser.add_argument("--json", action="store_true", help="print the list as one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.name is None:
        if arguments.output is not None:
            raise UserError("--output needs the NAME of the recipe to write; `adalora-scale recipes` lists them.")
        _list(as_json=arguments.json)
        return 0
    if arguments.json:
        raise UserError("--json is for the list; a recipe is YAML. Leave out --json or NAME.")
    found = recipe(arguments.name)
    if arguments.output is None:
        say_text(found.text.rstrip("\n"))
        return 0
    if arguments.output.exists() or arguments.output.is_symlink():
        raise UserError(f"--output {arguments.output} is there already and stays as it is; give another name.")
    replace_text(arguments.output, found.text)
    say(f"{arguments.output} is written; train it: adalora-scale train --config {arguments.output}")
    return 0


def _list(*, as_json: bool) -> None:
    found = recipes()
    if as_json:
        say_json({one.name: {"what": one.what, "hardware": one.hardware} for one in found})
        return
    width = max(len(one.name) for one in found)
    say_text("\n".join(f"{one.name:<{width}}  {one.what}\n{'':<{width}}  {one.hardware}" for one in found))
