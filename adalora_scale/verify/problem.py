"""What every cell of the matrix trains: one model, one sequence of global batches, one loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.matrices import matrix_names
from adalora_scale.config import PRESETS, AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.experts.modules import KERNEL, join_all_experts, split_all_experts
from adalora_scale.quantization.linear import dequantize_model, quantize_model
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.verify.mixture import LEARNING_RATES, mixture
from adalora_scale.verify.reference import ReferenceOptions, ReferencePlace

ACCUMULATION = 4
SEED = 0


@dataclass(frozen=True)
class Batch:
    """One global batch, or a rank's share of it; sequences count different numbers of tokens."""

    ids: Tensor
    """(rows, length) token ids."""
    labels: Tensor
    """(rows, length - 1), the next token, -100 where it does not count."""
    tokens: int
    """Counted tokens of the whole global batch, over all ranks."""

    def part(self, index: int, parts: int) -> Batch:
        """Return the index-th of equally many rows; the count stays the global batch's."""
        return Batch(self.ids.chunk(parts)[index], self.labels.chunk(parts)[index], self.tokens)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Everything that has to be the same on every engine, and where it runs.

    Raises:
        UserError: fewer steps than ten allocations need.
    """

    model: str | None
    """Folder or hub id of a small causal model; None makes a random Llama on the spot."""
    device: torch.device
    ranks: int
    steps: int = 60
    experts: str | None = None
    """Which mixture of experts the random model is, one of `verify/mixture.py`'s kinds; None for a Llama."""
    load_in_4bit: bool = False
    """Whether the frozen base is kept in 4 bits (nf4, double quantisation), computed in the run's dtype."""
    length: int = 12
    lr: float = 1e-3
    """With `max_grad_norm` chosen so that the comparison is about engines: on stories260k, one process in float32 ends
    1e-6 from the float64 reference (9e-4, and 5e-2 in one tensor, with lr 2e-3, of which rounding is the cause)."""
    weight_decay: float = 0.01
    max_grad_norm: float = 0.5
    """Of the variant `clip`; it binds while the loss falls."""
    preset: str = "default"
    """Whose values the method has where this problem does not say."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """More keys of `adalora`."""

    @property
    def learning_rate(self) -> float:
        """`lr`; a mixture's is smaller, so that no token comes near a tie between two experts."""
        return LEARNING_RATES.get(self.experts, 0.3) * self.lr if self.experts else self.lr

    def __post_init__(self) -> None:
        if self.steps < 24:
            raise UserError(f"--steps is {self.steps}; ten allocations need at least 24 steps.")

    @property
    def config(self) -> AdaLoraConfig:
        """The method's options: at least ten allocations, and a frozen phase."""
        return AdaLoraConfig(
            init_r=6,
            target_r=4,
            lora_alpha=12,
            tinit=self.steps // 12,
            tfinal=self.steps // 4,
            deltaT=max(1, self.steps // 20),
            orth_reg_weight=0.3 if PRESETS[self.preset].orth_reg_weight else 0.0,  # strong, where there is a penalty
            preset=self.preset,
            **self.options,
        )

    @property
    def global_batch(self) -> int:
        """Sequences a step: 48 divides evenly by 2, 3 and 4 ranks with accumulation; more ranks may need more."""
        return math.lcm(48, self.ranks * ACCUMULATION)

    def base_model(self, dtype: torch.dtype) -> nn.Module:
        """Return the frozen model without adapters, the same in every process."""
        model = self.full_precision_model(dtype)
        return quantize_model(model, QuantSpec(compute_dtype=dtype)) if self.load_in_4bit else model

    def exact_model(self) -> nn.Module:
        """Return the base in float64 as transformers has it, 4-bit weights dequantised as the float32 runs do."""
        model = dequantize_model(self.base_model(torch.float32), torch.float32)
        join_all_experts(model)
        return model.double()

    def full_precision_model(self, dtype: torch.dtype) -> nn.Module:
        """Return the base as it is before it is quantised."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        if self.model is not None:
            return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)
        torch.manual_seed(SEED)
        if self.experts:
            return mixture(self.experts).to(dtype)
        shape = LlamaConfig(
            vocab_size=256,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.1,
        )
        return AutoModelForCausalLM.from_config(shape).to(dtype)

    def adapted_model(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the model with fresh adapters in training mode, the same in every process."""
        model = self.base_model(dtype)
        if self.experts:
            split_all_experts(model)
            # As users' models have it; the reference goes on with the family's plain loop.
            model.config._experts_implementation = KERNEL  # type: ignore[union-attr]
        torch.manual_seed(SEED)
        return inject_adalora(model, self.config).to(self.device).train()

    def batches(self, vocabulary: int) -> list[Batch]:
        """Return the global batches, one a step: few tokens frequent, most rare, in sequences of uneven length."""
        generator = torch.Generator().manual_seed(SEED + 7)
        batches = []
        for _ in range(self.steps):
            uniform = torch.rand(self.global_batch, self.length, generator=generator)
            ids = 3 + (uniform**6 * (vocabulary - 3)).long()
            counted = torch.randint(self.length // 2, self.length, (self.global_batch, 1), generator=generator)
            labels = ids[:, 1:].masked_fill(torch.arange(self.length - 1) >= counted, -100)
            tokens = int((labels != -100).sum())
            batches.append(Batch(ids.to(self.device), labels.to(self.device), tokens))
        return batches


def token_loss(call: Callable[..., Any], batch: Batch) -> Tensor:
    """Return these rows' share of the mean loss over the counted tokens of the global batch."""
    logits = call(input_ids=batch.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, batch.labels.flatten(), reduction="sum") / batch.tokens


def reference_options(config: AdaLoraConfig, total_step: int, **optimizer: Any) -> ReferenceOptions:
    """Return the same options in the reference's words.

    Args:
        config: the method's.
        total_step: optimizer steps of the run.
        optimizer: AdamW's and the clipping threshold, as `ReferenceOptions` names them.
    """
    tinit, tfinal = config.phase_steps(total_step)
    return ReferenceOptions(
        init_r=config.init_r,
        target_r=config.target_r,
        scaling=config.scaling,
        tinit=tinit,
        tfinal=tfinal,
        total_step=total_step,
        delta_t=config.deltaT,
        beta1=config.beta1,
        beta2=config.beta2,
        orth_reg_weight=config.orth_reg_weight,
        score=config.score,
        budget_unit=config.budget_unit,
        **optimizer,
    )


def adapter_weights(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Return every module's factors under the reference's names."""
    return {name: {"A": layer.lora_A, "E": layer.lora_E, "B": layer.lora_B} for name, layer in adapter_layers(model)}


def matrix_weights(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return every matrix's factors, A (in, r), E (r,) and B (out, r), whole."""
    found: dict[str, dict[str, Tensor]] = {}
    for module, factors in adapter_weights(model).items():
        n = dict(adapter_layers(model))[module].matrices
        for number, name in enumerate(matrix_names(module, n)):
            each = {f: w.detach().reshape(n, -1, w.shape[-1])[number] for f, w in factors.items()}
            found[name] = each | {"E": each["E"][0]}
    return found


def matrix_places(model: nn.Module, base: nn.Module) -> dict[str, ReferencePlace]:
    """Return where the matrices of experts are in a base whose experts are split or not; of dense ones nothing.

    Args:
        model: with adapters.
        base: without.
    """
    whole = {name for name, _ in base.named_parameters()}
    return {
        name: ReferencePlace(
            module if module in whole else f"{module}.weight", number, bool(layer.base_layer.transposed)
        )
        for module, layer in adapter_layers(model)
        if layer.matrices > 1
        for number, name in enumerate(matrix_names(module, layer.matrices))
    }
