"""Conversations rendered by a chat template, checked against their rows, and tokenised with their loss.

    with closing(Conversations(tokenizer, template, "assistant", calls=False)) as conversations:
        ids, masks, notes = conversations.tokenize(batch, ["row 1", "row 2"])

The text is what ``apply_chat_template`` renders, tools and documents included, and so are the tokens; a begin or end
token that the row's own text doubles stands there once.
"""

from __future__ import annotations

from typing import Any

from trl.data_utils import common_prefix_length

from adalora_scale.data.chat_templates import assistant_masks
from adalora_scale.data.end_tokens import once
from adalora_scale.data.preparing import Batch
from adalora_scale.data.rendering import DirectRenderer, Renderer, Request, Span, is_known
from adalora_scale.data.rows import LossTarget
from adalora_scale.data.template_forms import find_form
from adalora_scale.data.template_use import notes_of, problem_of
from adalora_scale.data.turns import is_trained
from adalora_scale.errors import UserError


class Conversations:
    """Tokenises batches of conversations with one template; it can be pickled. `close` it.

    Args:
        tokenizer: a transformers tokenizer.
        template: the Jinja text.
        loss: what counts in the loss: `assistant` (what the template marks), `completion` (what follows the prompt's
            turns) or `all`.
        calls: some turn calls a tool.
    """

    def __init__(self, tokenizer: Any, template: str, loss: LossTarget, *, calls: bool) -> None:
        self._tokenizer, self._template, self._loss = tokenizer, template, loss
        variables = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
        self._rendering = (DirectRenderer if is_known(template) else Renderer)(template, variables)
        try:
            self._form = find_form(template, self._rendering, calls=calls)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the process that renders, if there is one."""
        if isinstance(self._rendering, Renderer):
            self._rendering.close()

    def tokenize(self, batch: Batch, names: list[str]) -> tuple[list[list[int]], list[list[int]], list[str]]:
        """Return token ids, masks (1 where a token counts in the loss) and notes (lines of text) of each row.

        Args:
            batch: columns of the layouts of conversations.
            names: what messages call the rows.

        Raises:
            UserError: the template refuses a row, or does not show what is trained on; names the row and the reason.
        """
        requests = [self._request(batch, row) for row in range(len(names))]
        rendered = self._rendering.render(
            [{**request, "messages": self._form.fit(request["messages"])} for request in requests], names
        )
        firsts = batch.get("prompt_turns") or [0] * len(names)
        texts, spans, notes = [], [], []
        for name, request, first, (text, marked) in zip(names, requests, firsts, rendered, strict=True):
            own = marked if self._loss == "assistant" else None
            problem = problem_of(request, self._template, text, own, first if self._loss == "completion" else 0)
            if problem is not None:
                raise UserError(f"{name}: {problem}.")
            said = notes_of(request, self._template, text, own)
            if self._loss == "completion" and not marked and not all(map(is_trained, request["messages"][first:])):
                said.append("completions hold turns that are not the assistant's, and they count in the loss")
            notes.append("\n".join(said))
            texts.append(text)
            spans.append(self._trained_spans(request, marked, name))
        ids, masks = self._tokens(requests, texts, spans, firsts, names)
        return ids, masks, notes

    def _request(self, batch: Batch, row: int) -> Request:
        request = {"messages": batch["messages"][row]}
        for column, key in (("tools", "tools"), ("documents", "documents"), ("chat_template_kwargs", "variables")):
            if column in batch and batch[column][row] is not None:
                request[key] = batch[column][row]
        return request

    def _trained_spans(self, request: Request, spans: list[Span], name: str) -> list[Span]:
        """Leave out the spans of turns with ``weight: 0``: which are a turn's shows how many there were before it."""
        turns = request["messages"]
        left_out = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and not is_trained(turn)]
        if not left_out:
            return spans
        if self._loss == "all" or not spans:
            raise UserError(
                f"{name}: turn {left_out[0] + 1} has weight 0 (or train false), which data.loss_on={self._loss} cannot "
                "keep; set data.loss_on=assistant, or take the key out."
            )
        ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
        parts = [{**request, "messages": self._form.fit(turns[: end + 1])} for end in ends]
        counts = [len(found) for _, found in self._rendering.render(parts, [name] * len(parts))]
        if counts != sorted(counts) or counts[-1] != len(spans):
            raise UserError(
                f"{name}: the chat template's {{% generation %}} marks cannot be told apart by turn, so turn "
                f"{left_out[0] + 1} with weight 0 cannot be left out; mark every assistant turn, or take the key out."
            )
        kept: list[Span] = []
        for end, start, stop in zip(ends, [0, *counts], counts, strict=False):
            kept += [] if end in left_out else spans[start:stop]
        return kept

    def _tokens(
        self, requests: list[Request], texts: list[str], spans: list[list[Span]], firsts: list[int], names: list[str]
    ) -> tuple[list[list[int]], list[list[int]]]:
        if self._loss == "assistant":
            ids, masks = assistant_masks(self._tokenizer, texts, spans)
        else:
            ids = self._plain_ids(texts)
            starts = (
                self._prompt_ends(requests, texts, ids, firsts, names) if self._loss == "completion" else [0] * len(ids)
            )
            masks = [[0] * start + [1] * (len(row) - start) for start, row in zip(starts, ids, strict=True)]
            for row, request in enumerate(requests):
                # A completion with a tool's results in it: of these the assistant's turns alone, where they are marked.
                if starts[row] and spans[row] and not all(map(is_trained, request["messages"][firsts[row] :])):
                    _, [marks] = assistant_masks(self._tokenizer, [texts[row]], [spans[row]])
                    masks[row] = [bit & mark for bit, mark in zip(masks[row], marks, strict=True)]
        last = {row[i] for row, mask in zip(ids, masks, strict=True) for i in _last_marked(mask)}
        ends = last & set(self._tokenizer.all_special_ids)
        both = [once(self._tokenizer, row, mask, ends) for row, mask in zip(ids, masks, strict=True)]
        return [row for row, _ in both], [mask for _, mask in both]

    def _prompt_ends(
        self, requests: list[Request], texts: list[str], ids: list[list[int]], firsts: list[int], names: list[str]
    ) -> list[int]:
        """Return where completions begin, in tokens, as TRL finds it: after the prompt and an answer's beginning."""
        prompts = []
        for request, first in zip(requests, firsts, strict=True):
            turns = request["messages"][:first]
            follows = not turns or turns[-1]["role"] != "assistant"
            prompts.append({**request, "messages": self._form.fit(turns), "generation_prompt": follows})
        rendered = [text for text, _ in self._rendering.render(prompts, names)]
        for name, prompt, text in zip(names, rendered, texts, strict=True):
            if len(_common(prompt, text)) < len(prompt.rstrip()) // 2:
                raise UserError(
                    f"{name}: the chat template renders the prompt's turns otherwise once the completion follows, so "
                    "where that begins cannot be told; set data.loss_on=assistant."
                )
        return [common_prefix_length(p, whole) for p, whole in zip(self._plain_ids(rendered), ids, strict=True)]

    def _plain_ids(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)[
            "input_ids"
        ]
        return found


def _last_marked(mask: list[int]) -> list[int]:
    return [i for i, bit in enumerate(mask) if bit and (i + 1 == len(mask) or not mask[i + 1])]


def _common(one: str, other: str) -> str:
    end = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:end]
