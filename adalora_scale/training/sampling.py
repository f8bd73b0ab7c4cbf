"""The order in which training rows are drawn, where it is not transformers' own: mixtures and streams."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Sampler, SequentialSampler

from adalora_scale.data.mixing import MixtureSampler
from adalora_scale.data.streaming import TokenStream
from adalora_scale.training.arguments import global_batch


def own_sampler(trainer: Any) -> Sampler[int] | None:
    """Return what draws a mixture's rows, or a stream's places; None leaves it to transformers."""
    if isinstance(trainer.train_dataset, TokenStream):
        return SequentialSampler(trainer.train_dataset)
    if trainer.mixture is None:
        return None
    args = trainer.args
    seed = args.seed if args.data_seed is None else args.data_seed
    return MixtureSampler(trainer.mixture, seed=seed, global_batch=global_batch(args))


def name_sampler(loader: Any, sampler: Sampler[int] | None) -> None:
    """Let a mixture's sampler be told the epoch on every path.

    accelerate 1.15 finds a sampler behind skipped batches and several ranks only where `set_sampler` named it: the rest
    of a continued epoch would be the first epoch's.
    """
    if isinstance(sampler, MixtureSampler):
        loader.set_sampler(sampler)
