"""Engines broken on purpose, which the contract suite must refuse."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

AfterStep = Callable[..., None] | None


@contextlib.contextmanager
def nothing() -> Iterator[AfterStep]:
    yield None


MUTANTS = {"": nothing}


def mutant_of(name: str) -> contextlib.AbstractContextManager[AfterStep]:
    return MUTANTS[name]()
