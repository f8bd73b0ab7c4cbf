"""The report that a run leaves in its output_dir when everything else is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from adalora_scale.messages import cause, say
from adalora_scale.report.names import REPORT_NAME

SWITCH = "ADALORA_REPORT"
"""An environment variable; 0 leaves the report out."""


def leave_report(directory: Path, *, tensorboard: Path | None = None) -> None:
    """Write `report.html` from the files of the run; rank 0 calls it.

    The run is over and what it learnt is written: whatever goes wrong here is a note, not an error.

    Args:
        directory: the run's output_dir.
        tensorboard: a folder of TensorBoard's event files, which gets the rank heat maps as images.
    """
    if os.environ.get(SWITCH, "1") in ("", "0"):
        return
    try:
        from adalora_scale.report.writing import write_images, write_report  # the plotting library loads now

        write_report([directory], directory / REPORT_NAME)
        if tensorboard is not None:
            write_images(directory, tensorboard)
    except Exception as error:
        say(
            f"note: {REPORT_NAME} is not complete ({type(error).__name__}: {cause(error)}); "
            f"`adalora-scale report {directory}` writes it again",
            to=sys.stderr,
        )


def tensorboard_folder(trainer: Any) -> Path | None:
    """Return where transformers' TensorBoard tracker of a trainer wrote; None where there is no such tracker."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__name__ == "TensorBoardCallback" and callback.logging_dir is not None:
            return Path(callback.logging_dir)
    return None
