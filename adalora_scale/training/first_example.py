"""The examples of a run's data in the order in which they are shown, and the first, printed when a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from adalora_scale.config import RunConfig
from adalora_scale.data.preparing import Prepared
from adalora_scale.data.rows import RawData
from adalora_scale.data.shown import ShownRow, described_kind, marked, shortened, shown_rows
from adalora_scale.messages import printable, say_text


def examples(
    part: str, config: RunConfig, data: Prepared, raw: RawData, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> Iterator[ShownRow]:
    """Yield a part's examples: in the order of the files, of mixtures and streams as they are drawn.

    Args:
        part: `train` or `eval`.
        config, data, raw, tokenizer: the run's.
        seed: of a mixture's order.
    """
    limit = config.data.max_length
    if part == "train" and data.stream is not None:
        items: Iterator[Any] = (data.stream[place] for place in range(len(data.train)))
    elif part == "train" and data.mixture is not None:
        order = data.mixture.order(0, data.mixture.epoch_length, seed=seed)
        items = (data.train[int(index)] for index in order)
    else:
        rows = data.train if part == "train" else data.eval
        items = iter(rows) if rows is not None else iter(())
    for number, item in enumerate(items, start=1):
        yield from shown_rows(part, item, number, tokenizer, limit=limit, label_names=raw.label_names)


def say_first_example(
    config: RunConfig, data: Prepared, raw: RawData, tokenizer: PreTrainedTokenizerBase, *, seed: int
) -> None:
    """Print the first training example in a few lines; `training.show_example=false` leaves it out."""
    if data.stream is not None:  # its rows are drawn while training; the first ones are tokenised beside it
        first = next(
            shown_rows("train", data.train[0], 1, tokenizer, limit=config.data.max_length, label_names=raw.label_names)
        )
    else:
        first = next(examples("train", config, data, raw, tokenizer, seed=seed))
    head = f"first example ({size(first, config)}; {described_kind(raw.label_names)}):"
    lines = printable(marked(shortened(first)), keep="\n\t").split("\n")
    say_text("\n".join([head, *(f"  {line}" for line in lines)]))


def size(row: ShownRow, config: RunConfig) -> str:
    """Return a row's tokens, those that count in the loss, and whether it may have been cut, in words."""
    cut = f", as long as data.max_length={config.data.max_length} allows" if row.at_limit else ""
    return f"{row.tokens:,} tokens" + (f", {row.loss_tokens:,} in the loss" if row.label is None else "") + cut
