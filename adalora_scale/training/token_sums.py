"""Evaluation's loss as the sum of token losses over the number of tokens, at every batch size and number of ranks.

transformers averages the losses of batches; where batches hold different numbers of tokens that is another figure for
every batch size. The sampler also repeats rows at the end so that every rank has as many; they count once here.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalora_scale.engines.ranks import collective_device


def kept_rows(trainer: Any, rows: int) -> int | None:
    """Return how many of this rank's `rows` are no repetitions, where some rank has some; a rank may have only those.

    None: no rank has any, as always but in the last batch.
    """
    state, world_size = trainer.accelerator.gradient_state, trainer.args.world_size
    if world_size == 1 or not state.in_dataloader or not state.end_of_dataloader or state.remainder <= 0:
        return None
    if rows * world_size <= state.remainder:
        return None
    return min(max(state.remainder - trainer.args.process_index * rows, 0), rows)


def without_repeats(inputs: dict[str, Any], kept: int) -> dict[str, Any]:
    """Return the first `kept` rows of a batch, one at least: ranks that share parameters run every forward together."""
    rows = row_count(inputs)
    return {
        key: value[: max(kept, 1)] if isinstance(value, Tensor) and value.dim() and value.shape[0] == rows else value
        for key, value in inputs.items()
    }


class TokenSums:
    """Sums over the batches of one evaluation on this rank.

    Args:
        dataset: what is evaluated; needed where a batch is one row of several (packing, padding_free).
    """

    def __init__(self, dataset: Any = None) -> None:
        self._dataset = dataset
        self._sums: Tensor | None = None  # loss, entropy, right tokens, tokens; float64
        self._aux: list[Tensor] = []

    def add(self, trainer: Any, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Run one batch.

        Args:
            trainer: an SFTTrainer.
            model: as the evaluation loop calls it.
            inputs: the batch, on its device.

        Returns:
            The mean loss of the batch's tokens.
        """
        flat = trainer.args.packing or trainer.args.padding_free
        kept = kept_rows(trainer, trainer.args.per_device_eval_batch_size if flat else row_count(inputs))
        if kept is not None:
            inputs = self._flat_without_repeats(trainer, inputs, kept) if flat else without_repeats(inputs, kept)
        given = {**inputs, "use_cache": False}
        if trainer.aux_loss_enabled:
            given["output_router_logits"] = True
        outputs = model(**given, fused_lm_head=True)
        losses = -outputs.log_probs
        if trainer.args.loss_type == "dft":
            losses = losses * outputs.log_probs.exp()
        count = outputs.label_mask.sum()
        loss = losses.double().sum()
        if trainer.label_smoother is not None:  # a mean over the batch's tokens, from all logits
            plain = {key: value for key, value in given.items() if key != "labels"}
            loss = trainer.label_smoother(model(**plain), inputs["labels"], shift_labels=True).double() * count
        figures = [loss, outputs.entropy.double().sum(), outputs.is_top1.sum(), count]
        sums = torch.stack([figure.double() for figure in figures])
        if kept != 0:
            self._sums = sums if self._sums is None else self._sums + sums
            if trainer.aux_loss_enabled and outputs.aux_loss is not None:
                self._aux.append(outputs.aux_loss.double())
        mean: Tensor = (loss / count.clamp(min=1)).float()
        return mean

    def _flat_without_repeats(self, trainer: Any, inputs: dict[str, Any], kept: int) -> dict[str, Any]:
        """Take the labels of repeated rows away, in a batch that is one row of several."""
        rank, rows = trainer.args.process_index, trainer.args.per_device_eval_batch_size
        first = len(self._dataset) - trainer.accelerator.gradient_state.remainder + rank * rows
        tokens = sum(len(self._dataset[index]["input_ids"]) for index in range(first, first + kept))
        labels = inputs["labels"].clone()
        labels[:, tokens:] = -100
        return {**inputs, "labels": labels}

    def settle(self, trainer: Any, output: Any, prefix: str) -> Any:
        """Put the figures of all tokens into what the loop returned and SFTTrainer logs; a collective call."""
        if trainer.args.world_size == 1 and self._sums is None:  # the batches asked for logits
            return output
        aux = torch.stack(self._aux).sum() if self._aux else None
        device = collective_device() if trainer.args.world_size > 1 else torch.device("cpu")
        sums = torch.zeros(6, dtype=torch.float64)
        if self._sums is not None:
            sums[:4] = self._sums
        if aux is not None:
            sums[4:] = torch.tensor([aux.item(), len(self._aux)])
        sums = sums.to(device)
        if trainer.args.world_size > 1:
            dist.all_reduce(sums)
        loss, entropy, right, tokens, aux_sum, aux_count = sums.tolist()
        if not tokens and self._sums is None:
            return output
        tokens = max(tokens, 1.0)
        output.metrics[f"{prefix}_loss"] = loss / tokens
        figures = trainer._metrics["eval"]
        figures.clear()
        figures |= {"entropy": [entropy / tokens], "mean_token_accuracy": [right / tokens]}
        figures["num_tokens"] = [trainer._total_train_tokens]
        if aux_count:
            figures["aux_loss"] = [aux_sum / aux_count]
        return output


def row_count(inputs: dict[str, Any]) -> int:
    """Return the rows of a batch."""
    return next(value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim())
