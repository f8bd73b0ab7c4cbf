"""`adalora-scale rehearse`: read the question, be a few ranks one after the other, print what they asked for."""

from __future__ import annotations

import argparse
import gc
from dataclasses import asdict, dataclass, replace
from typing import Any

from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.weights import own_engine
from adalora_scale.cluster.rehearsal.counted import Counts
from adalora_scale.cluster.rehearsal.engines import layout_of, layout_of_rank, rehearse_rank
from adalora_scale.cluster.rehearsal.pretended import pretended_rank
from adalora_scale.cluster.rehearsal.rank import Rehearsed
from adalora_scale.cluster.rehearsal.saving import Layout, Pieces, Resumed, resume, written_by
from adalora_scale.cluster.rehearsal.table import table
from adalora_scale.config import load_config
from adalora_scale.engines.fsdp2_place import Fsdp2
from adalora_scale.engines.registry import configured, fixed_global_batch
from adalora_scale.errors import UserError
from adalora_scale.messages import say_json, say_text
from adalora_scale.training.arguments import check_training_section

MOST = 65_536
"""Ranks that a checkpoint's manifest takes."""


@dataclass(frozen=True)
class Rehearsal:
    """The answer."""

    request: Request
    engine: str
    matrices: int
    by_rule: str
    """What stands in for a vendor's code; empty where all of it is the real one."""
    ranks: dict[int, dict[str, Counts]]
    """Rank → phase → what it asked for."""
    resumes: list[Resumed]
    written: dict[int, int]
    """Rank → elements of the adapters that it writes of each kind."""
    half_ranks: dict[str, Counts] | None
    """The first of `ranks`, of half the ranks; None: not asked for, or there are none."""
    half_layers: dict[str, Counts] | None
    """The first of `ranks`, of a model of half the blocks."""


def run(arguments: argparse.Namespace) -> int:
    """Answer the command line.

    Raises:
        UserError, Unsupported: the config or an option cannot be used.
    """
    found = rehearse(request_of(arguments), growth=not arguments.no_growth, only=arguments.rank)
    if arguments.json:
        say_json(as_dict(found))
    else:
        say_text(table(found))
    return 0


def request_of(arguments: argparse.Namespace) -> Request:
    """Return the question; `--nodes` makes an FSDP2 run HSDP, one copy a node."""
    config = load_config(arguments.config, arguments.overrides)
    if arguments.deepspeed:
        if config.engine.config is not None:
            raise UserError("--deepspeed and engine.config both name a configuration; give one of them.")
        config = config.under_deepspeed(arguments.deepspeed)
    for option, value in (("--gpus", arguments.gpus), ("--nodes", arguments.nodes)):
        if value < 1:
            raise UserError(f"{option} is {value}; it must be at least 1.")
    if not 2 <= arguments.gpus <= MOST:
        raise UserError(f"--gpus is {arguments.gpus}; rehearse takes 2 to {MOST:,} ranks.")
    if arguments.nodes > 1:
        options = config.engine.config or {}
        if not isinstance(configured(config.engine), Fsdp2) or not isinstance(options, dict):
            raise UserError(
                f"--nodes {arguments.nodes} is for engine.name=fsdp2, a copy on each node (HSDP); leave it out."
            )
        if options.get("replicate", arguments.nodes) != arguments.nodes:
            raise UserError(
                f"--nodes {arguments.nodes} disagrees with engine.config.replicate={options['replicate']}; give one."
            )
        engine = replace(config.engine, config={**options, "replicate": arguments.nodes})
        config = replace(config, engine=engine)
    config = replace(config, training=check_training_section(config, arguments.gpus))
    return Request(
        config=config,
        gpus=arguments.gpus,
        nodes=arguments.nodes,
        global_batch=fixed_global_batch(config.engine),
    )


def rehearse(request: Request, *, growth: bool = True, only: int | None = None) -> Rehearsal:
    """Be the first, a middle and the last rank of the run, and let each resume on other numbers of ranks.

    Args:
        request: the question.
        growth: also be the first of these ranks of half the ranks, and of a model of half the blocks.
        only: be this rank alone.

    Raises:
        UserError: there is no such rank.
    """
    if only is not None and not 0 <= only < request.gpus:
        raise UserError(f"--rank is {only}; the {request.gpus} ranks are 0 to {request.gpus - 1}.")
    chosen = sorted({0, request.gpus // 2, request.gpus - 1}) if only is None else [only]
    ranks: dict[int, dict[str, Counts]] = {}
    pieces: dict[int, Pieces] = {}
    layouts: list[Layout] = []
    matrices, by_rule = 0, ""
    for rank in chosen:
        with pretended_rank(rank, request.gpus):
            rehearsed = rehearse_rank(request)
            ranks[rank] = rehearsed.phases
            layout = layout_of_rank(rehearsed, request)
            layouts = _other_numbers(layout, rehearsed, request)
            pieces[rank] = written_by(rehearsed)
            matrices, by_rule = len(rehearsed.allocator.matrices), rehearsed.by_rule
            if pieces[rank] != layout.written(rank):
                raise RuntimeError(f"rank {rank} writes other pieces than the engine's rule says; report it.")
            del rehearsed
        gc.collect()
    halves = growth and len(layouts) > 1 and layouts[1].world_size * 2 == request.gpus
    half = _again(_of_half_the_ranks(request), chosen[0]) if halves else None
    return Rehearsal(
        request=request,
        engine=own_engine(request).real,
        matrices=matrices,
        by_rule=by_rule,
        ranks=ranks,
        resumes=_resumes(layouts, request.gpus // 2),
        written={rank: sum(length for _, length in own.values()) for rank, own in pieces.items()},
        half_ranks=half,
        half_layers=_again(request, chosen[0], half_layers=True) if growth else None,
    )


def _other_numbers(own: Layout, rehearsed: Rehearsed, request: Request) -> list[Layout]:
    """Return the run's layout and those of a run of half and of double its ranks, and of one rank less than half more.

    Under HSDP the number of nodes changes, and a copy has as many ranks as before.
    """
    engine: Any = own_engine(request)
    found = [own]
    copies = own.copies
    for numerator, denominator in ((1, 2), (2, 1), (3, 4)):
        if copies > 1:
            if copies * numerator % denominator:
                continue
            other = replace(engine, options=replace(engine.options, replicate=copies * numerator // denominator))
            ranks = request.gpus // copies * other.options.replicate
        else:
            other, ranks = engine, request.gpus * numerator // denominator
        if 1 <= ranks <= MOST and ranks != request.gpus:
            found.append(layout_of(dict(own.shapes), other, ranks, rehearsed))
    return found


def _resumes(layouts: list[Layout], rank: int) -> list[Resumed]:
    """Let a rank of each run go on from the first one's checkpoint."""
    return [resume(layouts[0], now, min(rank, now.world_size - 1)) for now in layouts]


def _of_half_the_ranks(request: Request) -> Request:
    """Return the question with half the ranks; under HSDP half the copies."""
    options = request.config.engine.config
    if request.nodes > 1 and isinstance(options, dict):
        engine = replace(request.config.engine, config=options | {"replicate": request.nodes // 2})
        request = replace(request, nodes=request.nodes // 2, config=replace(request.config, engine=engine))
    return replace(request, gpus=request.gpus // 2)


def _again(request: Request, rank: int, *, half_layers: bool = False) -> dict[str, Counts]:
    with pretended_rank(min(rank, request.gpus - 1), request.gpus):
        phases = rehearse_rank(request, half_layers=half_layers).phases
    gc.collect()
    return phases


def as_dict(found: Rehearsal) -> dict[str, Any]:
    """Return what JSON holds."""
    return {
        "model": found.request.config.model.model_name_or_path,
        "engine": found.engine,
        "gpus": found.request.gpus,
        "nodes": found.request.nodes,
        "init_r": found.request.config.adalora.init_r,
        "preset": found.request.config.adalora.preset,
        "matrices": found.matrices,
        "by_rule": found.by_rule,
        "ranks": {str(rank): _phases(phases) for rank, phases in found.ranks.items()},
        "elements_written": {str(rank): count for rank, count in found.written.items()},
        "resumes": [asdict(resumed) for resumed in found.resumes],
        "half_ranks": found.half_ranks and _phases(found.half_ranks),
        "half_layers": found.half_layers and _phases(found.half_layers),
    }


def _phases(phases: dict[str, Counts]) -> dict[str, Any]:
    return {phase: asdict(counts) for phase, counts in phases.items()}
