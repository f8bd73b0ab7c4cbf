"""Several short examples in one sequence, and the proof that a model keeps them apart.

[Note: what keeps packed examples apart]
A packed batch is one row without an attention mask; position ids start again at 0 with each example. transformers
builds the block-diagonal mask from them (sdpa, eager, flex), flash attention from `cu_seq_lens`, but only if there is
*no attention mask and no key-value cache* (masking_utils._preprocess_mask_arguments). A plain ``model(**batch)``
creates a cache when ``config.use_cache`` is true, as it is by default, and then every example attends to those before
it, without a warning. TRL's SFTTrainer passes ``use_cache=False`` in training and evaluation; so must any other loop.
Models with recurrent or convolutional layers may mix examples whatever the mask. Hence a check that asks the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from trl.data_utils import pack_dataset

from adalora_scale.errors import Unsupported
from adalora_scale.messages import cause

_LENGTHS = (7, 6, 5)


def pack(
    dataset: datasets.Dataset, max_length: int, *, seed: int | None, work_dir: Path, name: str
) -> datasets.Dataset:
    """Fill sequences of `max_length` tokens best-fit-decreasing, adding the column `seq_lengths`.

    Args:
        dataset: columns input_ids and labels, each row at most `max_length` long.
        max_length: tokens a sequence holds.
        seed: shuffles the examples first, so that neighbours in a file do not share sequences; None keeps the order.
        work_dir: directory for intermediate files.
        name: `train` or `eval`, for the progress bar.
    """
    if seed is not None:
        dataset = dataset.shuffle(seed=seed, keep_in_memory=True)
    # One process: the bins are filled per batch of 1,000 rows, and shards would move the batches' borders.
    options = {
        "cache_file_name": str(work_dir / f"{name}-packed.arrow"),
        "load_from_cache_file": False,
        "new_fingerprint": f"{name}-packed",
        "desc": f"Packing {name}",
    }
    return pack_dataset(dataset, max_length, "bfd", options)


def check_packing_isolated(model: Any, key: str = "data.packing") -> None:
    """Refuse a model whose packed examples see each other.

    Runs two forward passes on three packed examples of 18 tokens in all. Only the first example's tokens differ, so the
    logits of the other two must not. Call it on every rank of a sharded model (a forward is a collective there), on
    materialised weights.

    Args:
        model: a causal language model as the trainer will call it; mode and gradients are left as they were.
        key: what asks for packed rows, for the message.

    Raises:
        Unsupported: the model mixes examples, or does not run on a packed row; turn `key` off.
    """
    config = getattr(model, "module", model).config.get_text_config()  # DDP and DeepSpeed wrap the model
    device = next(model.parameters()).device
    # A private generator: the check must not move the run's random state. Id 0 is often padding, so it is left out.
    generator = torch.Generator().manual_seed(0)
    first, *others = (torch.randint(1, config.vocab_size, (length,), generator=generator) for length in _LENGTHS)
    try:
        with evaluating(model):
            reference = _packed_logits(model, [first, *others], device)
            changed = _packed_logits(model, [config.vocab_size - first, *others], device)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError, ImportError) as error:
        raise Unsupported(
            f"{key}: {config.model_type} does not run on packed rows ({cause(error)}). Set {key}=false."
        ) from error
    start = _LENGTHS[0]
    difference = (reference[start:] - changed[start:]).abs().max().item()
    scale = reference[start:].std().item()
    # Same shapes and kernels twice: exact but for kernels that pick their order by content (grouped experts).
    tolerance = 1e-4 if reference.dtype == torch.float32 and next(model.parameters()).dtype == torch.float32 else 2e-2
    if not difference <= tolerance * scale:
        raise Unsupported(
            f"{key}: {type(getattr(model, 'module', model)).__name__} with "
            f"attn_implementation={config._attn_implementation} mixes packed examples (logits of one move by "
            f"{difference:.2g} when another changes). Set {key}=false, or "
            "use model.attn_implementation=sdpa or flash_attention_2 if the model supports it."
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode, and every module of it back into its own on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _packed_logits(model: Any, examples: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    # Imported late: preparing data needs no trainer, and this import takes seconds in every process.
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    row = {"input_ids": torch.cat(examples).tolist(), "seq_lengths": [len(example) for example in examples]}
    batch = collate([row])
    batch.pop("labels")
    inputs = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0]  # (tokens, vocabulary)
