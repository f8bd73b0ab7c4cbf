"""The files of a run's frozen weights: a byte that changed before a continuation would train something else.

Weights are compared by samples where a model is loaded (`base_digest.py`), since most of them are nobody's to read
whole: sharded, quantised, on other ranks. Their files can be: every rank reads its share once, in a thread, while the
model is loaded from the same pages. Checkpoints hold the digests; a continued run compares them before its first step.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from adalora_scale.checkpoint.format import file_entry
from adalora_scale.engines.ranks import everywhere
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.quantization.base_files import BaseFiles

KEY = "base_files"
"""In a checkpoint's manifest, and in `training.resume_allow_changed`."""


class BaseWeights:
    """Digests of a base's files of weights; reading begins at once.

    Args:
        name: `model.model_name_or_path`; what has no safetensors files has no digests.
        revision: of a hub id.
        rank, world_size: whose share of the files is read here.
    """

    def __init__(self, name: str, revision: str | None, rank: int, world_size: int) -> None:
        try:
            files = sorted({tensor.file for tensor in BaseFiles.open(name, revision).tensors.values()})
        except (UserError, Unsupported):
            files = []  # who loads the model says what is wrong with it
        self._own = files[rank::world_size]
        self._found: dict[str, dict[str, Any]] = {}
        self._problem: OSError | None = None
        self._everywhere: dict[str, dict[str, Any]] | None = None
        self._thread = threading.Thread(target=self._read, name="base weights", daemon=True)
        self._thread.start()

    def digests(self) -> dict[str, dict[str, Any]]:
        """Return file name → its bytes and sha256, of all ranks' shares; waits for them. A collective call.

        Raises:
            UserError: a file cannot be read.
        """
        if self._everywhere is None:
            self._everywhere = {}
            for found in everywhere(self._joined):
                self._everywhere |= found
        return self._everywhere

    def require_same(self, saved: Mapping[str, Mapping[str, Any]], allowed: bool) -> None:
        """Compare with a checkpoint's digests; files that only one side has, or of another size, are another base's.

        A collective call.

        Raises:
            UserError: a file's bytes changed.
        """
        for name, entry in self.digests().items():
            before = saved.get(name)
            same_file = before is not None and before["bytes"] == entry["bytes"]
            if same_file and before["sha256"] != entry["sha256"] and not allowed:  # type: ignore[index]
                raise UserError(
                    f"the base's {name} is not the file that this run was trained over: its bytes changed. Copy it "
                    f"back, or allow it: training.resume_allow_changed=[{KEY}]."
                )

    def _joined(self) -> dict[str, dict[str, Any]]:
        self._thread.join()
        if self._problem is not None:
            raise self._problem
        return self._found

    def _read(self) -> None:
        try:
            for path in self._own:
                self._found[path.name] = file_entry(path)
        except OSError as error:
            self._problem = error
