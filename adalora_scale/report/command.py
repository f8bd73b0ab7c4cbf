"""The verb `report`: its options; the plotting library loads when it runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adalora_scale.messages import say
from adalora_scale.report.names import REPORT_NAME
from adalora_scale.store.reading import is_copy, readable_folder

_EXAMPLES = """
examples:
  adalora-scale report runs/two                             # runs/two/report.html again, as training wrote it
  adalora-scale report runs/one runs/two --output two.html  # side by side, and what differs in their configs
  adalora-scale report runs/two --png figures/              # the same pictures as PNG, for slides and papers

A run that has not ended has a report too. The file has no scripts and fetches nothing; docs/report.md says what it
shows.
"""


def add_verb(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "report",
        help="one HTML file of a run, or of several side by side",
        description="Write a run's loss, budget, ranks, the reasons for them and its costs into one HTML file;\n"
        "or compare several runs.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=readable_folder, metavar="RUN", help="a run's output_dir, or its URL")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="where to write (default: RUN/report.html; report.html here for several or a URL)",
    )
    parser.add_argument("--png", type=Path, metavar="DIR", help="also write every picture as a PNG into this folder")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    from adalora_scale.report.writing import write_report

    runs: list[Path] = arguments.runs
    output = arguments.output or ((runs[0] if len(runs) == 1 and not is_copy(runs[0]) else Path()) / REPORT_NAME)
    write_report(runs, output, arguments.png)
    also = f", pictures in {arguments.png}" if arguments.png is not None else ""
    say(f"{output} is written{also}")
    return 0
