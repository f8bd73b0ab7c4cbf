"""A checkpoint on its way to disk: what each step of writing it does on one rank, whoever makes the ranks meet.

`writing.py` does the steps at once, with collectives between them; `background.py` does them in a thread, where
collectives are not allowed. No step of this file talks to another rank.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.layout import Runs, Totals
from adalora_scale.checkpoint.state import Gathered, merged_scalars
from adalora_scale.engines.ranks import rank_and_size
from adalora_scale.errors import UserError
from adalora_scale.files import abandon, sync


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A checkpoint that is being written, as this rank sees it. All of it are copies: training may go on."""

    output_dir: Path
    step: int
    """Completed optimizer steps."""
    rank: int
    world_size: int
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    """group → name → whole shape."""
    scalars: Mapping[str, Mapping[str, float]]
    """This rank's, as in `Gathered`."""
    runs: Runs
    totals: Totals
    """Which ranks write what, and how much of each tensor, as in `Gathered`."""
    content: Mapping[str, Any]
    """Rank 0's further entries of the manifest."""
    texts: Mapping[str, str]
    """Rank 0's further files, name → text."""
    allowed: Callable[[], None] = lambda: None
    """Rank 0 calls it before the checkpoint gets its name; what it raises keeps it from that."""

    @classmethod
    def of(
        cls,
        output_dir: Path,
        step: int,
        gathered: Gathered,
        content: Mapping[str, Any],
        texts: Mapping[str, str],
        allowed: Callable[[], None] = lambda: None,
    ) -> Draft:
        """Describe a checkpoint of what this rank has gathered."""
        rank, world_size = rank_and_size()
        return cls(
            output_dir=output_dir, step=step, rank=rank, world_size=world_size, shapes=gathered.shapes,
            scalars=gathered.scalars, runs=gathered.runs, totals=gathered.totals, content=content, texts=texts,
            allowed=allowed,
        )  # fmt: skip

    @property
    def final(self) -> Path:
        """The folder's name once it is complete."""
        return self.output_dir / f"checkpoint-{self.step}"

    @property
    def partial(self) -> Path:
        """The hidden folder in which it is written."""
        return self.output_dir / f".checkpoint-{self.step}.partial"

    @property
    def own(self) -> Path:
        """This rank's file."""
        return self.partial / files.pieces_name(self.rank, self.world_size)

    @property
    def names(self) -> dict[str, list[str]]:
        """Group → the names of its tensors, in the order that the files count in."""
        return {group: list(shapes) for group, shapes in self.shapes.items()}

    def make_folder(self) -> None:
        """Make the hidden folder, anew where a crash left one; rank 0 calls it.

        Raises:
            OSError: it cannot be made.
        """
        self.discard()
        self.partial.mkdir(parents=True)

    def write_own(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Write this rank's file and return what rank 0 needs of it, JSON values.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        entry = files.write_tensors(self.own, tensors)
        kinds = {group: sorted(files.kinds_in(tensors, group)) for group in self.shapes}
        return {"entry": entry, "scalars": self.scalars, "kinds": kinds}

    def finish(self, everyone: list[dict[str, Any]]) -> None:
        """Write the manifest over what all ranks have written, and give the folder its name; rank 0 calls it.

        Raises:
            OSError: the disk is full or the folder cannot be written.
            UserError: something is trained that no optimizer holds; or as `allowed`.
        """
        for group, shapes in self.shapes.items():
            for name, shape in shapes.items():
                written = self.totals[group][name]
                if written != math.prod(shape):
                    raise UserError(
                        f"{self.final} would hold {written} of {math.prod(shape)} elements of '{name}': is it trained "
                        f"by the optimizer? Freeze it, or give it to the optimizer."
                    )
        entries = {files.pieces_name(number, self.world_size): part["entry"] for number, part in enumerate(everyone)}
        for name, text in self.texts.items():
            (self.partial / name).write_text(text, encoding="utf-8")
            sync(self.partial / name)
            entries[name] = files.file_entry(self.partial / name)
        scalars = merged_scalars([part["scalars"] for part in everyone])
        whole = {
            "step": self.step,
            "world_size": self.world_size,
            **self.content,
            "optimizer": self.content.get("optimizer", {}) | {"scalars": scalars},
            "tensors": self.shapes,
            "runs": self.runs,
            "kinds": {
                group: sorted({kind for part in everyone for kind in part["kinds"][group]}) for group in self.shapes
            },
            "files": entries,
        }
        files.require_readable(self.final, whole)
        files.write_manifest(self.partial, whole)
        self.allowed()
        if self.final.exists() or self.final.is_symlink():  # what the run went on from, under this name
            abandon(self.final)
        files.publish(self.partial, self.final)

    def discard(self) -> None:
        """Remove the hidden folder; rank 0 calls it."""
        shutil.rmtree(self.partial, ignore_errors=True)
