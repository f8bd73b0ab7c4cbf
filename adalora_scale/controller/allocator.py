"""The rank allocator: AdaLoRA inside the optimizer step, through two hooks of the torch optimizer.

    before the update:  show the score weights and gradients (Ī, Ū) → add the orthogonality gradient
    after the update:   at an allocation step, score triplets → keep exactly b(t) → zero the other λ

Nothing is added to the loss or the training loop, and nothing depends on who calls the optimizer. The pieces of the
adapter that this rank owns, and sums over ranks, come from `adalora_scale.engines`.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.adalora.allocation import Allocation, mask_digest
from adalora_scale.adalora.compaction import held_triplets, is_compact
from adalora_scale.adalora.injection import adapter_layers, injection_of
from adalora_scale.adalora.numbering import Matrices
from adalora_scale.adalora.scores import score_named
from adalora_scale.adalora.spending import Spending
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller.attached import Attached
from adalora_scale.controller.figures import penalty_figures, rank_figures
from adalora_scale.controller.guard import require_equal, require_in_forward, require_same_start, require_same_tensors
from adalora_scale.controller.saved import places, require_own_state
from adalora_scale.engines import Sharding
from adalora_scale.engines.ranks import together
from adalora_scale.engines.registry import hold
from adalora_scale.errors import Unsupported, UserError


class RankAllocator:
    """Prunes a model's adapters to a global rank budget while an optimizer trains them.

        allocator = RankAllocator(model, config, total_step=1000)
        allocator.attach(optimizer)

    t counts the optimizer steps of the training loop from 1. A step with a non-finite gradient counts, changes nothing
    (weights, moments, Ī, Ū), and an allocation that was due then happens at the next finite step, or at the run's last.

    Args:
        model: the model that `inject_adalora` prepared, wrapped or not.
        config: the same options.
        total_step: optimizer steps of the whole run.

    Attributes:
        step: t, the last optimizer step.
        skipped_steps: how many of them changed nothing.
        modules: names of the adapted modules, in the order of `mask`.
        matrices: the same of their matrices: a module has one, or one for each expert.
        mask: (matrices · r,) bool, ordered by (matrix, k): the triplets of the current allocation.
        last_allocation: its step, budget and ranks, and the gap at its cut; None before the first.
        frozen: whether the final allocation is over.
        compact: whether the adapters were built at the ranks of a final mask.

    Raises:
        UserError: the model has no adapters, or the schedule leaves no step for pruning.

    Source: AdaLoRA, arXiv 2303.10512, algorithm 1.
    """

    def __init__(self, model: nn.Module, config: AdaLoraConfig, *, total_step: int) -> None:
        layers = dict(adapter_layers(model))
        if not layers:
            raise UserError("the model has no AdaLoRA layers; call inject_adalora(model, config) first.")
        self.config = config
        self.score = score_named(config.score)(config)
        self.model = model
        self._numbers = Matrices.of(layers)
        self.modules, self.matrices, self.r = list(layers), self._numbers.names, config.init_r
        self._layers = list(layers.values())
        self.compact = is_compact(layers, self.r)
        self.spending = Spending(config, self._layers, self.r, total_step)
        self.schedule = self.spending.schedule
        if (injection := injection_of(model)) is not None:
            injection.total_step = total_step  # save_adapter writes it
        self._base_fingerprint = injection.base_fingerprint if injection else None
        self.step = self.skipped_steps = 0
        self.frozen = False
        self.last_allocation: Allocation | None = None
        self.mask = torch.ones(len(self.matrices) * self.r, dtype=torch.bool, device=self._layers[0].lora_E.device)
        if self.compact:
            bits = [bit for layer in self._layers for bit in layer.keep_mask or []]
            self.mask, self.frozen = torch.tensor(bits, device=self.mask.device), True
        held = [bit for layer in self._layers for bit in held_triplets(layer)] if self.compact else []
        self._built = None if all(held) else torch.tensor(held, device=self.mask.device)
        self._parts: Attached | None = None
        self._allocation_due = self._skipping = self._columns_may_move = False
        self._calls = 0  # of the base optimizer in the step in progress
        self._scale: Tensor | float = 1.0
        self._penalty = self._orth_norm = torch.zeros(())
        self._task_norm: Tensor | None = self._penalty

    # ---- attaching ----------------------------------------------------------------------------------------------

    def attach(self, optimizer: object) -> RankAllocator:
        """Register the two hooks on the torch optimizer behind `optimizer` and return the allocator.

        Args:
            optimizer: a torch optimizer, accelerate's or DeepSpeed's wrapper around one, or a DeepSpeed engine. With
                several ranks call it on all of them, after the model was wrapped.

        Raises:
            UserError: the optimizer does not hold the adapters, or the allocator is attached already.
            Unsupported: the engine or the optimizer's precision is not supported.
        """
        if self._parts is not None:
            raise UserError("this RankAllocator is attached already; make a new one for another optimizer.")
        require_equal(
            {
                **{f"adalora.{key}": value for key, value in dataclasses.asdict(self.config).items()},
                "total_step": self.schedule.total_step,
                "the adapted modules": self.modules,
                "the base model's fingerprint": self._base_fingerprint,
            }
        )
        sharding, base = together(lambda: self._hold(optimizer))
        sharding.connect()
        require_same_start(*sharding.replicas())
        require_in_forward(sharding, write=True, step=0)
        parts = together(
            lambda: Attached.to(sharding, self.score, len(self.matrices), final_step=self.schedule.final_step)
        )
        require_equal({"rows of the adapters that ranks share": parts.reduction.split_rows})
        self._parts, self.mask = parts, self.mask.to(parts.arena.device)
        if self._built is not None:
            self._built = self._built.to(parts.arena.device)
            self._columns_may_move = True  # for what the optimizer may hold, until a state is loaded
        if not self.frozen:
            self._reopen()
            parts.scoring.begin()
        base.register_step_pre_hook(self._before_update)
        base.register_step_post_hook(self._after_update)
        if (injection := injection_of(self.model)) is not None:
            injection.allocator = weakref.ref(self)
        return self

    def _hold(self, target: object) -> tuple[Sharding, Optimizer]:
        sharding, base = hold(self.model, target)
        hooks = base._optimizer_step_pre_hooks.values()
        if any(isinstance(getattr(hook, "__self__", None), RankAllocator) for hook in hooks):
            raise UserError(
                "another RankAllocator is attached to this optimizer already; make a new optimizer for a new allocator."
            )
        return sharding, base

    # ---- what users and the trainer read ------------------------------------------------------------------------

    @property
    def budget(self) -> int:
        """What the last allocation could spend, in `schedule.unit` (before the first: what everything costs)."""
        return self.last_allocation.budget if self.last_allocation else self.schedule.init_budget

    @property
    def spent(self) -> int:
        """What the kept triplets cost, in `schedule.unit`; after an allocation never more than the budget."""
        return self.spending.spent(list(self.ranks().values()))

    @property
    def sharding(self) -> Sharding:
        """Where the engine keeps this rank's pieces; raises UserError before `attach`."""
        return self._attached().sharding

    @property
    def statistics(self) -> dict[str, list[Tensor]]:
        """The score's statistics by name, one tensor a span of its factors; none after the final allocation."""
        return self._parts.scoring.statistics if self._parts else {}

    def ranks(self) -> dict[str, int]:
        """Return the number of kept triplets of every matrix."""
        return self._numbers.ranks(self.mask)

    def rank_pattern(self) -> dict[str, list[bool]]:
        """Return the current mask in PEFT's form: ``{"<module>.lora_E": [kept, …]}``, experts one after the other."""
        return {f"{module}.lora_E": row for module, row in self._numbers.by_module(self.mask).items()}

    def masks_digest(self) -> str:
        """Return a short digest of the current mask, for comparison over ranks and runs."""
        return mask_digest(self.mask)

    def metrics(self) -> dict[str, float | int | str | None]:
        """Return the figures logged beside the loss (keys of metrics.jsonl); None is unknown."""
        figures = {
            "budget": self.budget,
            "spent": self.spent,
            "skipped_steps": self.skipped_steps,
            "masks_digest": self.masks_digest(),
            **rank_figures(list(self.ranks().values())),
            **penalty_figures(self._penalty, self._orth_norm, self._task_norm),
        }
        return {f"adalora/{name}": value for name, value in figures.items()}

    def check_consistency(self) -> None:
        """Compare masks and replicated parameters over ranks, and spans with what the forward computes with.

        A collective call, for every `guard_every` steps or so.

        Raises:
            RanksDisagree: ranks differ, or the forward computes with other values than the optimizer updates; the
                message names the parameter, the rank and the step.
        """
        require_same_tensors([("the keep mask", self.mask.to(torch.uint8))], self.step)
        sharding = self.sharding
        tensors, group = sharding.replicas()
        require_same_tensors(tensors, self.step, group)
        require_in_forward(sharding, write=False, step=self.step)

    def skip_missed_steps(self, completed: int) -> None:
        """Count optimizer steps that never reached the optimizer (a GradScaler drops them on overflow).

        Args:
            completed: the training loop's own count of optimizer steps.
        """
        missed = completed - self.step
        for _ in range(missed):
            self._begin_step()
        self.skipped_steps += max(missed, 0)
        if missed > 0:
            self.sharding.missed_steps()  # an engine counted them too
            if self._allocation_cannot_wait():
                self._allocate()
                self._attached().arena.close()
                self.sharding.refresh()  # the engine does not come to it: its step is over

    # ---- before the update --------------------------------------------------------------------------------------

    def _allocation_cannot_wait(self) -> bool:
        return self._allocation_due and self.step >= self.schedule.total_step

    def _begin_step(self) -> None:
        self.step += 1
        self._allocation_due |= not self.frozen and self.schedule.is_allocation(self.step)

    @torch.no_grad()
    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # torch passes the optimizer itself first; accelerate passes its closure argument on, None or not.
        if any(argument is not None for argument in (*args[1:], kwargs.get("closure"))):
            raise Unsupported("optimizers that re-evaluate the loss in a closure are not supported; use Adam or SGD.")
        parts = self._attached()
        sharding = parts.sharding
        first = self._calls in (0, sharding.calls_per_step)  # the latter when the step before ended in an exception
        try:
            indices = sharding.updating(optimizer)
        except (UserError, Unsupported) as error:
            if first:
                parts.reduction.withdraw(error)
            raise
        gradients = sharding.gradients(indices)
        if first:
            self._open_step(optimizer, parts, indices, gradients)
        self._calls = 1 if first else self._calls + 1
        if self._skipping:
            sharding.cancel(optimizer)
            return
        parts.see(indices, gradients, self._scale, step=self.step, scoring=not self.frozen)

    def _open_step(self, optimizer: Optimizer, parts: Attached, indices: list[int], gradients: list[Tensor]) -> None:
        """Begin a step of the controller at the engine's first call: count it, and reduce what all ranks must know."""
        for _ in range(parts.sharding.missed_steps()):
            self._begin_step()
            self.skipped_steps += 1
        self._begin_step()
        # GradScaler leaves these on optimizers that unscale and skip by themselves (fused Adam).
        scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        self._scale = 1.0 if scale is None else scale
        squares = parts.sharding.squares(gradients)
        if found_inf is not None:
            bad = torch.where(found_inf.to(squares.device) > 0, torch.inf, 0.0).sum()
            squares[1:] += bad
        parts.read_weights(scoring=not self.frozen)
        keep = self._held() if self.frozen and not self.score.keeps_columns else None
        sums = parts.reduction.run(squares.to(self.mask.device), keep)
        self._penalty, self._orth_norm = sums.penalty, sums.penalty_gradient_norm
        # Of the groups whose turn has not come the engine shows gradients that are not yet clipped, if at all.
        whole = len(indices) == len(parts.sharding.spans)
        self._task_norm = sums.adapter_squares.sqrt() / self._scale if whole else None
        self._skipping = not sums.finite
        self.skipped_steps += self._skipping

    # ---- after the update ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _after_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parts = self._attached()
        parts.sharding.finish(optimizer)
        last = self._calls == parts.sharding.calls_per_step
        if last:
            self._calls = 0
        if self._skipping:
            if last and self._allocation_cannot_wait():  # the run would end unpruned
                self._allocate()
        else:
            parts.scoring.updated()
            if last and self._allocation_due:
                self._allocate()
            elif last and self.frozen and (held := self._held()) is not None:
                parts.triplets.zero_lambda(held)
                if self._columns_may_move:
                    parts.triplets.zero(held)
        if last:
            parts.arena.close()

    def _allocate(self) -> None:
        parts = self._attached()
        kept, budget, gap, scores = self.spending.cut(self._scores(), self.step)
        mask = kept.to(torch.uint8)
        parts.sharding.broadcast(mask)
        self.mask = mask.bool()
        self._allocation_due = False
        self.last_allocation = Allocation(self.step, budget, self.ranks(), gap, scores)
        parts.triplets.zero_lambda(self.mask)
        if self.step >= self.schedule.final_step:
            self._freeze()

    def _scores(self) -> Tensor:
        """Return S_k of every triplet, (matrices · r,) float32, ordered by (matrix, k)."""
        return self._attached().scoring.scores(len(self.matrices), self.r)

    def _held(self) -> Tensor | None:
        """Return which of the triplets that the adapters have columns for are kept; None where all are."""
        return self._built if self.compact else self.mask

    def _freeze(self) -> None:
        """Fix the mask for the rest of the run.

        The columns of pruned triplets and their moments become zero too: the function stays (their λ is zero), every
        later gradient of theirs is zero, and so removing them physically changes nothing. A module that keeps none
        computes nothing any more.
        """
        self.frozen = True
        for layer, row in zip(self._layers, self._numbers.by_module(self.mask).values(), strict=True):
            layer.keep_mask, layer.emptied = row, not (any(row) or self.score.keeps_columns)
        if not self.score.keeps_columns and (held := self._held()) is not None:
            self._columns_may_move = self._attached().triplets.zero(held)
        self._attached().scoring.release()

    def _reopen(self) -> None:
        """Let every triplet count, whatever the mask that a run before this one ended with."""
        self.frozen = False
        for layer in self._layers:
            layer.keep_mask, layer.emptied = None, False

    def _attached(self) -> Attached:
        if self._parts is None:
            raise UserError("this RankAllocator is not attached to an optimizer; call attach(optimizer) first.")
        return self._parts

    # ---- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a continued run needs: step, mask, and the score's statistics of this rank's spans."""
        state: dict[str, Any] = {
            "step": self.step,
            "skipped_steps": self.skipped_steps,
            "total_step": self.schedule.total_step,
            "budget": self.budget,
            "budget_unit": self.schedule.unit,
            "allocation_step": self.last_allocation.step if self.last_allocation else None,
            "allocation_gap": self.last_allocation.gap if self.last_allocation else None,
            "modules": list(self.modules),
            "frozen": self.frozen,
            "allocation_due": self._allocation_due,
            "mask": self.mask.clone(),
        }
        return state | self._attached().scoring.state() | {"spans": places(self.sharding)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` into an attached allocator of the same model and schedule.

        Raises:
            UserError: the state belongs to another model, schedule, score or rank.
        """
        sharding, scoring = self.sharding, self._attached().scoring
        require_own_state(state, self.modules, self.schedule, self.mask.numel(), scoring, sharding)
        before = self.rank_pattern()
        self.step, self.skipped_steps = state["step"], state["skipped_steps"]
        sharding.missed_steps()  # those of before the checkpoint are in the state
        self._allocation_due = state["allocation_due"]
        self.mask = state["mask"].to(self.mask.device)
        self.last_allocation = None
        if state["allocation_step"] is not None:
            self.last_allocation = Allocation(
                state["allocation_step"], state["budget"], self.ranks(), state["allocation_gap"]
            )
        if self.compact and not (state["frozen"] and self.rank_pattern() == before):
            raise UserError("the adapters were built at other ranks than the saved mask's; build the model anew.")
        if state["frozen"]:
            self._freeze()
            return
        self._reopen()
        scoring.load(state)
