"""The verbs `export` and `inspect`: their options, and what they print. Heavy imports wait until one runs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adalora_scale.messages import say, say_json, say_text
from adalora_scale.store.reading import readable_folder

FORMATS = ("peft-adalora", "peft-lora", "merged", "rank-pattern")

_EXPORT_FORMATS = """
formats:
  peft-adalora  PEFT's AdaLoRA
  peft-lora     plain LoRA, λ folded in, every matrix with its own rank (rank_pattern); with --uniform zero-padded to
                one rank, for servers that know no rank_pattern (vLLM)
  merged        the base with the adapter added to its weights, for plain transformers; written tensor by tensor, so
                that memory does not grow with the model
  rank-pattern  no weights: the LoraConfig with which plain PEFT LoRA trains the learnt ranks from scratch

pruning, before any of them is written:
  --prune-to 500000 or --prune-to 50% keeps, over all matrices, the triplets of the largest singular values of the
  update that fit into so many parameters; --by scores those that the run itself scored highest (a checkpoint-N from
  before the final allocation holds the scores). Modules that were trained in full stay and are not counted.

The output folder appears complete or not at all. It gets an export.json that says what was done and lists its files;
--overwrite replaces a folder only if all that is in it is listed there and unchanged.
"""


def add_verbs(verbs: Any, prepare: Callable[[], None]) -> None:
    """Add the two verbs.

    Args:
        verbs: argparse's subparsers.
        prepare: called before anything heavy is imported.
    """
    export = verbs.add_parser(
        "export",
        help="write an adapter in a form that others serve: PEFT AdaLoRA, plain LoRA, merged model",
        description="Write a trained adapter in the form that others load.",
        epilog=_EXPORT_FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "adapter", type=readable_folder, metavar="ADAPTER", help="adapter: output_dir or checkpoint-N, or its URL"
    )
    export.add_argument("output", type=Path, metavar="OUT", help="folder to write")
    export.add_argument("--format", required=True, choices=FORMATS, help="what to write, see below")
    export.add_argument("--uniform", action="store_true", help="peft-lora: pad every matrix to one rank")
    export.add_argument("--rank", type=int, metavar="R", help="with --uniform: that rank (default: the largest)")
    export.add_argument(
        "--prune-to", metavar="P", help="keep at most P parameters of the update, or a share such as 50%%, see below"
    )
    export.add_argument("--by", metavar="WHAT", help="with --prune-to: singular-values (the default) or scores")
    export.add_argument("--base", metavar="MODEL", help="the base model, when it is not where the adapter says")
    export.add_argument(
        "--dequantise",
        action="store_true",
        help="merged: merge into the dequantised values of a 4-bit base instead of the original weights",
    )
    export.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="merged: largest file (default 5GB)")
    export.add_argument("--overwrite", action="store_true", help="replace what an earlier export wrote to OUT")
    export.add_argument(
        "--fidelity",
        action=argparse.BooleanOptionalAction,
        help="compare logits with the live adapter's (default: where the model fits the memory in float32)",
    )
    export.add_argument("--text", type=Path, metavar="FILE", help="sample text of that comparison, one a line")
    export.add_argument("--trust-remote-code", action="store_true", help="run model code that lies with the base")
    export.add_argument("--json", action="store_true", help="print one JSON object")
    export.set_defaults(run=lambda arguments: _export(arguments, prepare))

    inspect = verbs.add_parser(
        "inspect",
        help="what an adapter or a checkpoint holds",
        description="Print ranks by layer and type, parameters, the place in the schedule and the base of an adapter\n"
        "(from here, PEFT's AdaLoRA or plain LoRA) or of a checkpoint-N folder. Ranks are shaded on a terminal, plain\n"
        "elsewhere and where NO_COLOR is set.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("directory", type=readable_folder, metavar="DIR", help="the folder, or its URL")
    inspect.add_argument(
        "--why", metavar="MODULE", help="a matrix's scores against the cut, from the run's records; its name or a part"
    )
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=lambda arguments: _inspect(arguments, prepare))


def _export(arguments: argparse.Namespace, prepare: Callable[[], None]) -> int:
    prepare()
    from adalora_scale.export.exporting import export_adapter
    from adalora_scale.export.request import Request

    fields = {key: value for key, value in vars(arguments).items() if key not in ("run", "json")}
    report = export_adapter(Request(**fields))
    if arguments.json:
        say_json(report)
    else:
        say(report["what"])
        for note in report["notes"]:
            say(f"note: {note}")
        if "pruning_text" in report:
            say_text(report["pruning_text"])
        say_text(report["fidelity_text"])
    return 1 if report["failed"] else 0


def _inspect(arguments: argparse.Namespace, prepare: Callable[[], None]) -> int:
    from adalora_scale.report.terminal import in_colour, print_rank_maps, reasons, why_json, why_text

    if arguments.why is not None:
        reason = reasons(arguments.directory, arguments.why)
        if arguments.json:
            say_json(why_json(*reason))
        else:
            say_text(why_text(*reason))
        return 0
    prepare()
    from adalora_scale.export.inspection import describe, described, inspect_folder

    found = inspect_folder(arguments.directory)
    if arguments.json:
        say_json(found)
    elif not (in_colour() and print_rank_maps("\n".join(described(found)), found["ranks"])):
        say_text(describe(found))
    return 0
