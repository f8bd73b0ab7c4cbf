"""One begin and one end token, whoever adds them: the tokenizer, the chat template, or the row's own text."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any


def with_end(text: str, end: str) -> str:
    """Return a text that ends with the end token; white space after one that stands there already is dropped."""
    bare = text.rstrip()
    return bare if bare.endswith(end) else text + end


def once(tokenizer: Any, ids: list[int], mask: list[int], also: Collection[int] = ()) -> tuple[list[int], list[int]]:
    """Drop a begin or end token that stands directly behind itself.

    Args:
        tokenizer: says which tokens these are.
        ids: tokens of a row.
        mask: 1 where a token counts in the loss; what stays counts if either of the two did.
        also: further tokens that end a turn.
    """
    single = {tokenizer.bos_token_id, tokenizer.eos_token_id, *also} - {None}
    if not any(one == other and one in single for one, other in pairwise(ids)):
        return ids, mask
    kept_ids, kept_mask = ids[:1], mask[:1]
    for token, bit in zip(ids[1:], mask[1:], strict=True):
        if token == kept_ids[-1] and token in single:
            kept_mask[-1] = max(kept_mask[-1], bit)
        else:
            kept_ids.append(token)
            kept_mask.append(bit)
    return kept_ids, kept_mask


def prompt_tokens(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Tokenise prompts that an answer follows: one begin token and no end token, whatever the tokenizer adds.

    Args:
        tokenizer: a transformers tokenizer.
        prompts: texts.
    """
    found = []
    for prompt, ids in zip(prompts, tokenizer(prompts)["input_ids"], strict=True):
        ids, _ = once(tokenizer, ids, [0] * len(ids))
        added = len(ids) > 1 and ids[-1] == tokenizer.eos_token_id
        found.append(ids[:-1] if added and not prompt.rstrip().endswith(tokenizer.eos_token) else ids)
    return found
