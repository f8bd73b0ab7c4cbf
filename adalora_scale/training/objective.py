"""Whether TRL's fused head computes the model's own loss; where it does not, the model's own head is used.

The two are compared on one short row before the first step, in the wrapped model, since that is what trains: the
log-probability of every token, once as the model is and once with hidden states so large that a cap on the logits, or
any other bend, shows (a small random model's logits are near zero, where caps are straight). The model's loss is also
compared with the cross-entropy of its logits: routers' losses and the like are part of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.data.packing import evaluating
from adalora_scale.engines.ranks import everywhere
from adalora_scale.export.whole_adapter import unwrapped
from adalora_scale.messages import cause, say
from adalora_scale.tasks.own_head import use_own_head, why_not_fused

_TOKENS = 48
_LARGE = 20.0
"""The largest logit under enlarged hidden states."""
_REST = 5e-5
"""Share of the loss that may be neither cross-entropy nor a router's loss: rounding."""


@dataclass(frozen=True)
class _Own:
    """What the model itself says on the row."""

    log_probs: Tensor  # (1, tokens - 1)
    largest: float
    """Of the logits."""
    aux: float
    rest: float
    """The loss less cross-entropy and routers' loss."""
    unshifted: bool
    """The loss is that of the tokens themselves, not of the next ones."""
    has_routers: bool
    """It returns a loss of its routers."""


@torch.no_grad()
def settle_objective(trainer: Any) -> str | None:
    """Compare TRL's fused head with the model's own loss, and use the latter where they differ; a collective call.

    Args:
        trainer: an SFTTrainer whose model is wrapped and whose weights are there.

    Returns:
        Why the model's own head is used; None: TRL's computes the same.
    """
    model, inner = trainer.model_wrapped, unwrapped(trainer.model)
    text: Any = inner.config.get_text_config()  # type: ignore[union-attr, operator]
    if trainer.aux_loss_enabled and hasattr(inner, "router_aux_loss_coef"):
        inner.router_aux_loss_coef = trainer.router_aux_loss_coef  # as SFTTrainer did in the config
    inputs = {"input_ids": _row(trainer, text), "use_cache": False}
    if trainer.aux_loss_enabled:
        inputs["output_router_logits"] = True
    reason, own, failed = why_not_fused(inner) or _put_away(inner), None, None
    with evaluating(model), trainer.compute_loss_context_manager():
        try:
            own = _own(model, inputs, trainer)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed = _said(error)
        if reason is None and own is not None:
            reason = _difference(trainer, model, inner, inputs, own)
    if own is not None and trainer.aux_loss_enabled and not own.has_routers:
        trainer.aux_loss_enabled = False
        _note(trainer, f"{type(inner).__name__} returns no loss of its routers, so none is added")
    if own is not None and own.unshifted:
        _note(trainer, f"{type(inner).__name__}'s own loss is of the tokens it was given; the next ones are trained")
    if own is None:
        _note(trainer, f"the loss was not compared with the model's own: {failed}")
    rest = own is not None and abs(own.rest) > _REST * max(1.0, -own.log_probs.mean().item())
    if rest and own is not None and reason is None:
        reason = f"the model's loss has {own.rest:.2g} beside the cross-entropy of its tokens"
    verdicts = everywhere(lambda: (reason, rest))
    reason, has_rest = next((said for said, _ in verdicts if said), None), any(rest for _, rest in verdicts)
    if reason is None:
        return None
    use_own_head(inner, with_rest=has_rest)
    if has_rest:
        trainer.aux_loss_enabled, trainer.router_aux_loss_coef = True, 1.0
    _note(
        trainer,
        f"the model's own output head computes the loss, not TRL's fused one: {reason}. All logits of a micro-batch "
        f"are in memory at once (adalora-scale plan --whole-logits)",
    )
    return reason


def _difference(trainer: Any, model: Any, inner: nn.Module, inputs: dict[str, Any], own: _Own) -> str | None:
    """Run the fused head as the model is, and once more with larger logits; say what differs."""
    low = trainer.args.bf16 or trainer.args.fp16 or any(p.dtype != torch.float32 for p in inner.parameters())
    try:
        fused = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
        if not _close(fused.log_probs, own.log_probs, (0.02, 0.25) if low else (1e-4, 1e-3)):
            return _apart(fused.log_probs, own.log_probs)
        if trainer.aux_loss_enabled and abs(float(fused.aux_loss) - own.aux) > (2e-2 if low else 1e-4) * abs(own.aux):
            return f"its routers' loss is {own.aux:.4g}, TRL's {float(fused.aux_loss):.4g}"
        with _enlarged(inner, _LARGE / max(own.largest, 1e-6)) as calls:
            large = _own(model, inputs, trainer)
            seen = len(calls)
            fused = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True)
        both = seen > 0 and len(calls) > seen
        if both and not _close(fused.log_probs, large.log_probs, (0.1, 1.5) if low else (1e-3, 1e-2)):
            return f"with large logits {_apart(fused.log_probs, large.log_probs)}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "in flight" in str(error):  # DeepSpeed's words, after which it prints the whole weight
            return "ZeRO-3 fetches the output head's weight ahead of its module, which TRL's does not call"
        return f"TRL's cannot run ({_said(error)})"
    return None


def _put_away(inner: Any) -> str | None:
    """Say why a trained head cannot be TRL's under ZeRO-3; None where nothing is against it.

    TRL gathers the weight for the product alone. Its gradient arrives after the weight went back to its shards, where
    only a module of its own that runs backward (the embedding that shares it) would hold it.
    """
    head = inner.get_output_embeddings()
    for parameter in head.parameters(recurse=False) if head is not None else ():
        trained = hasattr(parameter, "ds_id") and parameter.requires_grad
        if trained and parameter is not inner.get_input_embeddings().weight:
            return "the output head is trained, and under ZeRO-3 its weight is gathered for its own module alone"
    return None


def _own(model: Any, inputs: dict[str, Any], trainer: Any) -> _Own:
    labels: Tensor = inputs["input_ids"]
    outputs = model(**inputs, labels=labels)
    logits = outputs.logits[:, :-1].float()
    log_probs = logits.log_softmax(-1).gather(-1, labels[:, 1:, None].to(logits.device))[..., 0]
    aux = getattr(outputs, "aux_loss", None)
    routers = float(aux) if aux is not None and trainer.aux_loss_enabled else 0.0
    loss = getattr(outputs, "loss", None)
    added = trainer.router_aux_loss_coef * routers
    rest = 0.0 if loss is None else float(loss) + log_probs.mean().item() - added
    # BART's decoder and its kin leave the shift to whoever makes the labels.
    same = outputs.logits.float().log_softmax(-1).gather(-1, labels[..., None].to(logits.device)).mean().item()
    unshifted = loss is not None and abs(rest) > abs(float(loss) + same - added)
    return _Own(log_probs, logits.abs().max().item(), routers, 0.0 if unshifted else rest, unshifted, aux is not None)


def _close(one: Tensor, other: Tensor, limits: tuple[float, float]) -> bool:
    """Whether log-probabilities agree on average and everywhere; no number is never close."""
    difference = (one.float() - other.float()).abs()
    return difference.mean().item() <= limits[0] and difference.max().item() <= limits[1]


def _apart(fused: Tensor, own: Tensor) -> str:
    return f"a row's loss is {-own.mean().item():.4g}, with TRL's {-fused.float().mean().item():.4g}"


def _row(trainer: Any, text: Any) -> Tensor:
    """Return tokens that stand in the training data, or random ones where it has none at hand. (1, _TOKENS)"""
    ids: list[int] = []
    with contextlib.suppress(Exception):  # a data set that only streams, or has other columns
        for index in range(min(8, len(trainer.train_dataset))):
            ids += list(trainer.train_dataset[index]["input_ids"])
    generator = torch.Generator().manual_seed(0)  # private: the check must not move the run's random state
    ids += torch.randint(1, text.vocab_size, (_TOKENS,), generator=generator).tolist() if len(ids) < 8 else []
    return torch.tensor([ids[:_TOKENS]], device=trainer.args.device)


@contextlib.contextmanager
def _enlarged(inner: nn.Module, factor: float) -> Iterator[list[int]]:
    """Multiply the backbone's last hidden states; the list has an entry for every time it happened."""
    calls: list[int] = []

    def enlarge(module: nn.Module, arguments: Any, outputs: Any) -> Any:
        if getattr(outputs, "last_hidden_state", None) is not None:
            outputs.last_hidden_state = outputs.last_hidden_state * max(factor, 1.0)
            calls.append(1)
        return outputs

    backbone: nn.Module = inner.base_model  # type: ignore[assignment]
    handle = backbone.register_forward_hook(enlarge)
    try:
        yield calls
    finally:
        handle.remove()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {cause(error, 160)}"


def _note(trainer: Any, text: str) -> None:
    if trainer.is_world_process_zero():
        say(f"note: {text}")
