"""A figure a person understands: exact match of generated completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from adalora_scale.data.end_tokens import prompt_tokens


@dataclass(frozen=True)
class ExactMatch:
    """Share of prompts whose generated completion equals the reference."""

    matches: int
    examples: int
    generated: list[str]

    @property
    def value(self) -> float:
        """Matches over examples."""
        return self.matches / max(self.examples, 1)


@torch.no_grad()
def exact_match(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    references: Sequence[str],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 64,
    extract: str | None = None,
) -> ExactMatch:
    """Generate greedily from each prompt and compare with the reference, white space at the ends aside.

    Args:
        model: a causal language model with `generate`.
        tokenizer: its tokenizer; padded on the left during generation and restored.
        prompts, references: equally long.
        batch_size: prompts generated together.
        max_new_tokens: longest completion.
        extract: a regular expression; its last match (first group if it has one) is compared on both sides, for
            example ``#### (.+)`` for GSM8K. A side without a match counts as wrong.
    """
    pattern = re.compile(extract) if extract else None
    generated: list[str] = []
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    was_training = model.training
    model.eval()
    try:
        for first in tqdm(range(0, len(prompts), batch_size), desc="Generating", leave=False, disable=None):
            ids = prompt_tokens(tokenizer, list(prompts[first : first + batch_size]))
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt", padding=True)
            batch = {key: batch[key].to(model.device) for key in ("input_ids", "attention_mask")}
            output = model.generate(
                **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            generated += tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
    finally:
        tokenizer.padding_side = side
        model.train(was_training)
    answers = (_answer(text, pattern) for text in generated)
    matches = sum(_equal(answer, _answer(want, pattern)) for answer, want in zip(answers, references, strict=True))
    return ExactMatch(matches=matches, examples=len(prompts), generated=generated)


def _answer(text: str, pattern: re.Pattern[str] | None) -> str | None:
    if pattern is None:
        return text.strip()
    found = list(pattern.finditer(text))
    return found[-1].group(found[-1].lastindex or 0).strip() if found else None


def _equal(answer: str | None, reference: str | None) -> bool:
    return answer is not None and answer == reference
