"""Chat templates for conversations: the tokenizer's own, a Jinja file, or one of the built-in ones.

A template used for training on assistant turns must mark them with ``{% generation %}`` … ``{% endgeneration %}``,
the token that ends the turn included; without the marks every token of a prompt would be trained on, or none at all.
The built-in templates (``plain``, ``chatml``) carry the marks and need nothing of a tokenizer but its end token.

    template = resolve_chat_template(tokenizer, config.data, layout=raw.layout)
    if template is not None:
        tokenizer.chat_template = template  # saved with the adapter, so that inference renders the same text
"""

from __future__ import annotations

import json
import logging
from functools import lru_cache
from typing import Any

import jinja2
from trl.chat_template_utils import (
    get_training_chat_template,
    has_generation_markers,
    is_chat_template_stop_token_trained,
)

from adalora_scale.config import DataConfig
from adalora_scale.data.names import builtin_chat_templates, template_file
from adalora_scale.data.rendering import LimitReached, Renderer, Span, is_known
from adalora_scale.data.row_values import CONVERSATIONS, Layout
from adalora_scale.data.rows import loss_target
from adalora_scale.errors import UserError
from adalora_scale.reading.text import MAX_TEXT_BYTES, read_text

logger = logging.getLogger(__name__)


def resolve_chat_template(
    tokenizer: Any, config: DataConfig, *, layout: Layout = "messages", tools: bool = False
) -> str | None:
    """Return the chat template to train with, which the caller sets as ``tokenizer.chat_template`` before saving it.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        config: the `data` section (`chat_template`, `loss_on`).
        layout: layout of the rows; only conversations are rendered by a template, the others give None.
        tools: some row has tools, which a tokenizer may have a template of its own for.

    Raises:
        UserError: there is no template, the named one does not exist or is not Jinja, it lacks the generation marks
            that a loss on assistant turns needs, or rows that no template applies to were given one.
    """
    if layout not in CONVERSATIONS:
        if config.chat_template is not None:
            raise UserError(
                f"data.chat_template={config.chat_template} applies to messages rows, and these are {layout} rows; "
                "remove the key, or convert the rows to messages."
            )
        return None
    marked = loss_target(config, layout) == "assistant"
    template = _named(config.chat_template) if config.chat_template is not None else _own(tokenizer, marked, tools)
    if tokenizer.eos_token is None and "eos_token" in template:
        raise UserError("the chat template ends turns with eos_token, which this tokenizer does not have.")
    if not marked:
        return template
    if not has_generation_markers(template):
        raise UserError(
            f"the chat template {config.chat_template} does not mark assistant turns: put their content and end token "
            f"between {{% generation %}} and {{% endgeneration %}}, use {_offer()}, or set data.loss_on=all."
        )
    if not tokenizer.is_fast:
        raise UserError(
            "a loss on assistant turns needs a fast tokenizer (tokenizer.json), which maps tokens to characters; "
            "convert the tokenizer, or set data.loss_on=all."
        )
    if not _trains_the_end(tokenizer, template):
        logger.warning(
            "the chat template leaves the token that ends an assistant turn out of the loss, so the model may not "
            "learn to stop; move it inside {%% generation %%}, or use %s.",
            _offer(),
        )
    return template


def _trains_the_end(tokenizer: Any, template: str) -> bool:
    """Ask TRL whether the token that ends an assistant turn is marked."""
    if is_known(template):
        return is_chat_template_stop_token_trained(tokenizer, chat_template=template)
    limited: Any = _Limited(tokenizer)
    trains = is_chat_template_stop_token_trained(limited, chat_template=template)
    if limited.failure is not None:  # which that function takes for an answer
        raise limited.failure
    return trains


class _Limited:
    """What TRL's check asks of a tokenizer, its conversation rendered under limits."""

    failure: LimitReached | None = None

    def __init__(self, tokenizer: Any) -> None:
        self.get_added_vocab = tokenizer.get_added_vocab
        self.decode = tokenizer.decode
        self._tokenizer = tokenizer

    def apply_chat_template(self, messages: list[Any], *, chat_template: str, **_: Any) -> dict[str, list[int]]:
        """Return `input_ids` and `assistant_masks` of one conversation."""
        variables = json.dumps(self._tokenizer.special_tokens_map, default=str, sort_keys=True)
        try:
            text, spans = _rendered_once(chat_template, variables, json.dumps(messages))
        except LimitReached as error:
            self.failure = error
            raise
        ids, [mask] = assistant_masks(self._tokenizer, [text], [spans])
        return {"input_ids": ids[0], "assistant_masks": mask}


@lru_cache(maxsize=4)
def _rendered_once(template: str, variables: str, messages: str) -> tuple[str, list[Span]]:
    with Renderer(template, json.loads(variables)) as renderer:
        return renderer.render([{"messages": json.loads(messages)}], ["a conversation of three short turns"])[0]


def assistant_masks(
    tokenizer: Any, texts: list[str], spans: list[list[Span]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Tokenise rendered conversations and mark the tokens of assistant turns, as `apply_chat_template` does.

    Args:
        tokenizer: a fast tokenizer.
        texts: rendered conversations.
        spans: of each, the characters of its assistant turns (start, end).

    Returns:
        token ids and masks (1 for a token of an assistant turn), a list a text.
    """
    encoded = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)
    masks = []
    for row, (ids, own) in enumerate(zip(encoded["input_ids"], spans, strict=True)):
        mask = [0] * len(ids)
        for start, end in own:
            first, last = encoded.char_to_token(row, start), encoded.char_to_token(row, end - 1)
            if first is None:
                break
            stop = last + 1 if last else len(ids)
            mask[first:stop] = [1] * (stop - first)
        masks.append(mask)
    return encoded["input_ids"], masks


def _named(name: str) -> str:
    path = template_file(name)
    if name in builtin_chat_templates():
        return path.read_text(encoding="utf-8")
    template = read_text(path, "data.chat_template")
    try:
        # The markers are tags of transformers' own Jinja extension; a plain parser has to be told to accept them.
        jinja2.Environment(extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]).parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{name}:{error.lineno}: not a Jinja template: {error.message}") from None
    except RecursionError:
        raise UserError(f"{name}: not a Jinja template: it nests too deeply.") from None
    return template


def _own(tokenizer: Any, marked: bool, tools: bool) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = (template.get("tool_use") if tools else None) or template.get("default")
    if not template:
        raise UserError(f"the rows are conversations and the tokenizer has no chat template; use {_offer()}.")
    if not isinstance(template, str) or len(template) > MAX_TEXT_BYTES:
        raise UserError(
            f"the tokenizer's chat template is no text of at most {MAX_TEXT_BYTES:,} characters; use {_offer()}."
        )
    if not marked or has_generation_markers(template):
        return str(template)
    try:
        trainable = get_training_chat_template(tokenizer)
    except (ValueError, TypeError, jinja2.TemplateError):
        raise UserError(
            "the tokenizer's chat template does not mark assistant turns and TRL knows no marked version of it; give a "
            f"copy with {{% generation %}} marks as data.chat_template, use {_offer()}, or set data.loss_on=all."
        ) from None
    return trainable or str(template)


def _offer() -> str:
    return "a built-in one (" + " or ".join(f"data.chat_template={n}" for n in reversed(builtin_chat_templates())) + ")"


class _GenerationTag(jinja2.ext.Extension):
    """Accepts ``{% generation %}`` … ``{% endgeneration %}`` when a template is only parsed."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
