"""Prepared rows as people read them: the text of their tokens, and which of these count in the loss.

Only what a trainer gets is read here (`input_ids`, `labels`, `seq_lengths`), so that what is shown is what is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adalora_scale.data.labels import LabelNames, kind_of

IGNORED = -100
BEGIN, END = "⟦", "⟧"
"""What stands round trained text where there are no colours."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Neighbouring tokens that all count in the loss, or all do not."""

    text: str
    trained: bool
    tokens: int


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    """One example as the model will see it."""

    place: str
    """For example ``train row 3``, or ``train sequence 1, example 2`` where rows are packed."""
    pieces: tuple[Piece, ...]
    label: str | None = None
    """Classification: what the row is trained towards."""
    at_limit: bool = False
    """Whether it is as long as `data.max_length` allows: it was cut, or just fits."""

    @property
    def tokens(self) -> int:
        """How many it has."""
        return sum(piece.tokens for piece in self.pieces)

    @property
    def loss_tokens(self) -> int:
        """How many of them count in the loss."""
        return sum(piece.tokens for piece in self.pieces if piece.trained)

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        rest = {"label": self.label} if self.label is not None else {}
        return {
            "place": self.place,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "at_limit": self.at_limit,
            **rest,
            "pieces": [{"text": piece.text, "trained": piece.trained, "tokens": piece.tokens} for piece in self.pieces],
        }


def shown_rows(
    part: str, row: Mapping[str, Any], number: int, tokenizer: Any, *, limit: int, label_names: Sequence[str] | None
) -> Iterator[ShownRow]:
    """Yield the examples of a prepared row: itself, or those that were packed into it.

    Args:
        part: `train` or `eval`.
        row: as the trainer gets it.
        number: which one, from 1.
        tokenizer: the one that prepared it.
        limit: `data.max_length`.
        label_names: classification: names of the classes; None for language models.
    """
    ids = list(row["input_ids"])
    if label_names is not None:
        text = Piece(text=_whole(ids, tokenizer), trained=False, tokens=len(ids))
        label = _label(row["labels"], label_names)
        yield ShownRow(place=f"{part} row {number}", pieces=(text,), label=label, at_limit=len(ids) >= limit)
        return
    labels = list(row["labels"])
    lengths = list(row.get("seq_lengths") or [len(ids)])
    start = 0
    for example, length in enumerate(lengths, start=1):
        stop = start + length
        place = f"{part} row {number}" if row.get("seq_lengths") is None else f"{part} sequence {number}"
        if len(lengths) > 1:
            place += f", example {example}"
        pieces = tuple(_pieces(ids[start:stop], labels[start:stop], tokenizer))
        yield ShownRow(place=place, pieces=pieces, at_limit=length >= limit)
        start = stop


def _pieces(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[Piece]:
    """Cut a row where the loss begins or ends.

    The text of a part is what it adds to the text before it: some decoders drop the space that a part begins with.
    """
    trained = [label != IGNORED and place > 0 for place, label in enumerate(labels)]  # nothing predicts the first
    whole, start, said = _whole(ids, tokenizer), 0, 0
    for stop in range(1, len(ids) + 1):
        if stop < len(ids) and trained[stop] == trained[start]:
            continue
        upto = len(whole) if stop == len(ids) else _common(whole, _whole(ids[:stop], tokenizer))
        yield Piece(text=whole[said:upto], trained=trained[start], tokens=stop - start)
        start, said = stop, max(said, upto)


def _whole(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _common(one: str, other: str) -> int:
    """Return how many characters two texts begin alike with: half a character at a cut is shown as another one."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _label(value: Any, names: Sequence[str]) -> str:
    kind = kind_of(names)
    if kind == "numbers":
        return f"{value:g}"
    if kind == "several" or isinstance(value, list):
        chosen = [name for name, bit in zip(names, value, strict=True) if bit]
        return ", ".join(chosen) or "none of the classes"
    return str(names[int(value)])


def marked(row: ShownRow) -> str:
    """Return a row's text with its trained parts between `BEGIN` and `END`, and its label behind it."""
    text = "".join(f"{BEGIN}{piece.text}{END}" if piece.trained else piece.text for piece in row.pieces)
    return text if row.label is None else f"{text} → {row.label}"


_HEAD, _TAIL, _LINES, _PARTS = 240, 80, 4, 3


def shortened(row: ShownRow) -> ShownRow:
    """Return a row of which a few lines are left, from each part its beginning and its end."""
    pieces = [Piece(text=_short(p.text), trained=p.trained, tokens=p.tokens) for p in row.pieces[:_PARTS]]
    if rest := row.pieces[_PARTS:]:
        tokens = sum(piece.tokens for piece in rest)
        pieces.append(Piece(text=f" … ({tokens:,} more tokens)", trained=False, tokens=tokens))
    return ShownRow(place=row.place, pieces=tuple(pieces), label=row.label, at_limit=row.at_limit)


def _short(text: str) -> str:
    if len(text) > _HEAD + _TAIL + 20:
        text = f"{text[:_HEAD]} … {text[-_TAIL:]}"
    lines = text.split("\n")
    return text if len(lines) <= _LINES else "\n".join([*lines[:2], f"… {lines[-2]}", lines[-1]])


def described_kind(names: Sequence[str] | None) -> str:
    """Return what marks mean, in words."""
    if names is not None:
        what = "number" if isinstance(names, LabelNames) and names.kind == "numbers" else "class"
        return f"the {what} behind the arrow is what is learnt"
    return f"tokens that count in the loss stand between {BEGIN} and {END}"
