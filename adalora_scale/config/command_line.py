"""The two arguments of every verb that reads a run's config."""

from __future__ import annotations

import argparse


def add_config_arguments(
    parser: argparse.ArgumentParser, file: str = "the run's YAML file, see configs/recipes/"
) -> None:
    """Add `--config FILE` and the overrides; `load_config` takes both."""
    parser.add_argument("--config", required=True, metavar="FILE", help=file)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
