"""How far an exported form's logits are from those of the adapter it was made of."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from adalora_scale.errors import UserError
from adalora_scale.messages import cause

_MAX_TOKENS = 128
_NOISE = 3e-5  # of the largest logit: the same sums in another order, float32
_TOLERANCE = 1e-4  # of the largest logit, for forms that only rearrange float32 numbers
_LOST = 0.1  # of what the adapter changes
SAMPLE_TEXT = (
    "Once upon a time there was a little girl who lived near the forest.",
    "Q: What is 17 + 25? A: Let us add the tens first.",
    "I still have not received my new card, what should I do?",
    "def area(radius):\n    return 3.14159 * radius ** 2",
)


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """Live adapter against exported form, both computed in float32 on the same text."""

    largest_difference: float
    """Of any logit."""
    largest_logit: float
    relative: float
    """The first over the second."""
    adapter_effect: float
    """Largest difference that the adapter makes to the base's logits: what a lost adapter would show."""
    tokens: int
    same_choice: float
    """Share of positions where both choose the same token (or class)."""
    compared_with: str
    rounding: float = 0.0
    """Largest difference that rounding the merged weights to the base's dtype makes."""
    unexplained: float
    """Largest difference that is left once the live side has that rounding too."""
    noise: float = _NOISE
    """Share of the largest logit that the arithmetic itself may differ by."""

    @property
    def allowed(self) -> float:
        """How much may be left: next to nothing of the largest logit, and of what the adapter changes.

        A form that lost a small adapter differs by as little as the adapter's effect.
        """
        share = min(_TOLERANCE * self.largest_logit, _LOST * self.adapter_effect)
        return max(self.noise * self.largest_logit, share)

    @property
    def faithful(self) -> bool:
        """Whether the form computes what the adapter does."""
        return self.unexplained <= self.allowed  # false of what is no number

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        rounding = f", rounding to the base's dtype {self.rounding:.2e}" if self.rounding else ""
        return (
            f"fidelity: largest logit difference {self.largest_difference:.2e}, {self.relative:.1e} of the largest "
            f"logit (the adapter itself changes logits by up to {self.adapter_effect:.3g}{rounding}); same choice at "
            f"{self.same_choice:.1%} of {self.tokens} positions; compared with {self.compared_with}"
        )


def compare(
    base: Callable[[], nn.Module],
    adapted: Callable[[nn.Module], nn.Module],
    exported: Callable[[], nn.Module],
    batches: list[dict[str, Tensor]],
    *,
    compared_with: str,
    rounded: Callable[[nn.Module], bool] = lambda _: False,
    noise: float = _NOISE,
) -> Fidelity:
    """Compute the logits of one model after the other; only one is in memory at a time.

    Args:
        base: loads the base model.
        adapted: puts the live adapter onto it, in place.
        exported: loads the exported form.
        batches: model inputs, one sequence each.
        compared_with: what the live side is, in words.
        rounded: puts into the adapted model, in place, what the form's dtype makes of its weights; false if nothing.
        noise: share of the largest logit that the arithmetic may differ by.
    """
    model = base()
    untouched = _runs(model, batches)
    model = adapted(model)
    expected = _logits(model, batches)
    nearest = _logits(model, batches) if rounded(model) else expected
    del model
    gc.collect()
    got = _logits(exported(), batches)
    gc.collect()
    difference = (got - expected).abs().max().item()
    largest = expected.abs().max().item()
    return Fidelity(
        largest_difference=difference,
        largest_logit=largest,
        relative=difference / largest if largest > 0 else difference,
        adapter_effect=(expected - untouched).abs().max().item(),
        tokens=len(expected),
        same_choice=(got.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        compared_with=compared_with,
        rounding=(nearest - expected).abs().max().item(),
        unexplained=(got - nearest).abs().max().item(),
        noise=noise,
    )


def sample_batches(folders: list[Path], text: Path | None, config: Any) -> list[dict[str, Tensor]]:
    """Return the sample text as model inputs; without a tokenizer, token ids spread over the vocabulary.

    Args:
        folders: where a tokenizer may be, the best first.
        text: a file with one sample a line; None takes a few built-in sentences.
        config: the model's; one with an encoder gets the same tokens for its decoder.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    two_sided = bool(getattr(config, "is_encoder_decoder", False))
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or _MAX_TOKENS
    length = min(_MAX_TOKENS, max(1, positions - 2))  # RoBERTa's first two positions are taken
    lines = list(SAMPLE_TEXT)
    if text is not None:
        try:
            lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--text {text} cannot be read as UTF-8 text: {error}.") from None
        if not lines:
            raise UserError(f"--text {text} holds no text.")
    for folder in folders:
        if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder)
            batches = [tokenizer(line, return_tensors="pt", truncation=True, max_length=length) for line in lines]
            inputs = [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in batches]
            return [_two_sided(batch) for batch in inputs] if two_sided else inputs
    if text is not None:
        raise UserError("--text needs a tokenizer, and there is none beside the adapter or the base.")
    vocabulary = getattr(config, "vocab_size", None) or 2
    ids = torch.arange(length) * max(1, vocabulary // length) % vocabulary
    batch = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids[None])}
    return [_two_sided(batch) if two_sided else batch]


def _two_sided(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"decoder_input_ids": batch["input_ids"]}


def load_float32(folder: Path, like: nn.Module, **options: Any) -> nn.Module:
    """Load the model in a folder in float32, of the class that `like` has, quietly."""
    factory: Any = type(like)
    with quiet_transformers():
        model: nn.Module = factory.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep tables of loaded weights and their bars off the screen."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def available_memory() -> int | None:
    """Return the host memory that is free for a model, in bytes; None where the system does not say."""
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; "max" where there is none
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


class NotMeasurable(Exception):
    """The base itself does not run on the samples; the message says why."""


def _runs(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the logits of the base.

    Raises:
        NotMeasurable: it takes other inputs.
    """
    try:
        return _logits(model, batches)
    except (TypeError, ValueError, AttributeError, IndexError, KeyError, RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        said = cause(error)
        raise NotMeasurable(f"{type(model).__name__} does not run on samples of text: {said}") from error


@torch.no_grad()
def _logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Return the logits of all positions, (positions, vocabulary or classes)."""
    model.eval()
    outputs = [model(**batch) for batch in batches]
    rows = [output.logits if "logits" in output else output[0] for output in outputs]
    return torch.cat([row.float().reshape(-1, row.shape[-1]) for row in rows])
