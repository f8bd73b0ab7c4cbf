"""States of this process's random number generators as plain tensors: no pickles."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adalora_scale.checkpoint.errors import CheckpointError


def rng_state() -> dict[str, Tensor]:
    """Return the states of Python's, numpy's, torch's and the current GPU's generators."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    rest = [numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"]]
    found = {
        "rng.python": _bytes(np.array(words, dtype=np.uint32)),
        "rng.python_rest": torch.tensor([version, gauss is not None, gauss or 0.0], dtype=torch.float64),
        "rng.numpy": _bytes(np.asarray(numpy_state["state"]["key"], dtype=np.uint32)),
        "rng.numpy_rest": torch.tensor(rest, dtype=torch.float64),
        "rng.torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["rng.cuda"] = torch.cuda.get_rng_state()
    return found


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Put back what `rng_state` returned; a GPU's state is left alone where it was not saved.

    Raises:
        CheckpointError: it is not what `rng_state` returns.
    """
    try:
        _set(state)
    except (KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the checkpoint's states of random numbers cannot be used ({reason}).") from None


def _set(state: dict[str, Tensor]) -> None:
    version, has_gauss, gauss = state["rng.python_rest"].tolist()
    words = tuple(int(word) for word in _words(state["rng.python"]))
    random.setstate((int(version), words, gauss if has_gauss else None))
    position, has_gauss, gauss = state["rng.numpy_rest"].tolist()
    np.random.set_state(("MT19937", _words(state["rng.numpy"]), int(position), int(has_gauss), gauss))
    torch.set_rng_state(state["rng.torch"])
    if torch.cuda.is_available() and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"])


def _bytes(words: np.ndarray) -> Tensor:
    return torch.from_numpy(words.copy().view(np.uint8))


def _words(state: Tensor) -> np.ndarray:
    return state.numpy().copy().view(np.uint32)
