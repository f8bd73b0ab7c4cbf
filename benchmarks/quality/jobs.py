"""Cells side by side: processes that stay, each with a folder of its own, fed one cell at a time."""

from __future__ import annotations

import logging
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

from benchmarks.quality.cell import Cell, Results, run_cell
from benchmarks.quality.methods import all_methods
from benchmarks.quality.tasks import TASKS, Sources


def run_side_by_side(
    left: Callable[[], Sequence[Cell]], known: Results, sources: Sources, work: Path, jobs: int
) -> list[Cell]:
    """Run what is missing until nothing is, and return the cells that failed: one does not stop the others.

    Args:
        left: what is missing, in order; asked again after each cell, since the last cells depend on the first.
        known: where results go; only this process writes.
        sources: where models and data are.
        work: a folder with one of its own for each job.
        jobs: how many cells run at a time.
    """
    free, failed = list(range(jobs)), list[Cell]()
    running: dict[Future[dict[str, Any]], tuple[Cell, int]] = {}
    # Processes of their own also where jobs is 1, so that a cell's figures do not depend on it.
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet) as pool:
        while True:
            begun = {cell for cell, _ in running.values()} | set(failed)
            waiting = [cell for cell in left() if cell not in begun]
            for cell in waiting[: len(free)]:
                slot = free.pop()
                running[pool.submit(_run, cell, sources, work / f"job-{slot}")] = cell, slot
            if not running:
                return failed
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, slot = running.pop(future)
                free.append(slot)
                if (error := future.exception()) is not None:
                    failed.append(cell)
                    print(f"FAILED {cell}: {''.join(traceback.format_exception(error))}", flush=True)
                    continue
                figures = future.result()
                known.add(cell, figures)
                print(_said(cell, figures), flush=True)


def _run(cell: Cell, sources: Sources, work: Path) -> dict[str, Any]:
    return run_cell(cell, TASKS[cell.task], all_methods()[cell.method], sources, work)


def _quiet() -> None:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _said(cell: Cell, figures: dict[str, Any]) -> str:
    return (
        f"{time.strftime('%H:%M:%S')}  {cell}: loss {figures['validation']['loss']:.4f}, "
        f"parameters {figures['parameters'] / figures['budget']:.3f} of the budget, {figures['seconds']} s"
    )
