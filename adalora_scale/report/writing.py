"""The files of a report: one HTML file, PNGs of its pictures, images for TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.files import replace_text, replacing
from adalora_scale.report.comparing import compared
from adalora_scale.report.page import Page, as_html
from adalora_scale.report.run_files import Run, read_run
from adalora_scale.report.sections import rank_maps
from adalora_scale.report.single import single

MOST_RUNS = 12


def write_report(directories: Sequence[Path], output: Path, png: Path | None = None) -> None:
    """Write the report of a run, or of several side by side.

    Args:
        directories: the runs' folders.
        output: the HTML file.
        png: a folder for its pictures, too.

    Raises:
        UserError: a folder holds no run, is named twice or they are too many; or a file cannot be written.
    """
    page = report_page(directories)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; name a file, such as {output / 'report.html'}.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {output.absolute().parent}; make it first.")
    text = as_html(page)
    if png is not None:
        write_pngs(page, png)
    replace_text(output, text)


def report_page(directories: Sequence[Path]) -> Page:
    """Return the report as a page.

    Raises:
        UserError: a folder holds no run, is named twice or they are too many.
    """
    if len(directories) > MOST_RUNS:
        raise UserError(f"report compares at most {MOST_RUNS} runs; {len(directories)} are named.")
    places = [directory.resolve() for directory in directories]
    if twice := [
        str(directory) for directory, place in zip(directories, places, strict=True) if places.count(place) > 1
    ]:
        raise UserError(f"report: {twice[0]} is named twice; name every run once.")
    runs = [read_run(directory) for directory in directories]
    return single(runs[0]) if len(runs) == 1 else compared(runs)


def write_pngs(page: Page, directory: Path) -> None:
    """Write every picture of a page as `<name>.png`.

    Raises:
        UserError: the folder is a file or cannot be written.
    """
    from adalora_scale.report.style import as_png, drawing

    if directory.exists() and not directory.is_dir():
        raise UserError(f"--png {directory} is a file; name a folder.")
    with replacing(directory) as folder, drawing():
        for picture in page.pictures:
            as_png(picture.draw(), folder / f"{re.sub(r'[^a-z0-9-]', '_', picture.key)}.png")


def write_images(directory: Path, tensorboard: Path) -> None:
    """Add a run's rank heat maps to a folder of TensorBoard's event files, at the run's last step."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from torch.utils.tensorboard import SummaryWriter

    from adalora_scale.report.style import drawing

    run: Run = read_run(directory)
    pictures, _ = rank_maps(run, "ranks", max(run.ranks.values(), default=1))
    with SummaryWriter(str(tensorboard)) as writer, drawing():
        for picture in pictures:
            figure = picture.draw()
            figure.set_facecolor("white")
            figure.set_dpi(120)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            image = np.asarray(canvas.buffer_rgba())[..., :3]  # (height, width, 3)
            writer.add_image(f"adalora/{picture.key}", image, run.last_step, dataformats="HWC")
