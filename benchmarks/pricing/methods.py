"""Bases, and the methods that adapt them: each is a function that takes one training step."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from adalora_scale.adalora.compaction import compact
from adalora_scale.quantization.linear import quantization_targets, quantize_model
from adalora_scale.quantization.spec import QuantSpec
from benchmarks.pricing.shapes import TARGETS, Shape

NEVER = 1_000_000
"""Steps of a run whose schedule a measured window does not move."""
EARLY = 4
"""Steps of a run that is through with pruning before its first measured step."""


class Method:
    """A model with its adapters and its optimizer.

    Args:
        model: with adapters.
        after: called after the optimizer's step with the number of steps so far.
    """

    def __init__(self, model: Any, shape: Shape, device: str, after: Callable[[int], Any] | None = None) -> None:
        self.model = model.train()
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: Optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=True)
        self._after = after
        self._device = device
        self.allocator: RankAllocator | None = None
        generator = torch.Generator().manual_seed(0)
        rows = (max(shape.tokens // shape.length, 1), shape.length)
        self._ids = torch.randint(0, shape.vocabulary, rows, generator=generator).to(device)
        self.done = 0

    @property
    def parameters(self) -> int:
        """Trained ones."""
        return sum(parameter.numel() for parameter in self.trained)

    def gradients(self) -> None:
        """Take the first half of a step."""
        self.model(input_ids=self._ids, labels=self._ids).loss.backward()

    def update(self) -> None:
        """Take the second half: the optimizer's step, with what the method does around it."""
        self.optimizer.step()
        self.done += 1
        if self._after is not None:
            self._after(self.done)
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Take a step."""
        self.gradients()
        self.update()

    def timed(self) -> tuple[float, float]:
        """Take a step and return the seconds of it all, and of its second half."""
        self._wait()
        begun = time.perf_counter()
        self.gradients()
        self._wait()
        between = time.perf_counter()
        self.update()
        self._wait()
        ended = time.perf_counter()
        return ended - begun, ended - between

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


def base_model(shape: Shape, dtype: torch.dtype, device: str, kind: str) -> nn.Module:
    """Return a frozen random Llama.

    Args:
        shape: its sizes.
        dtype: of its weights, and of the computation over 4-bit ones.
        device: where it is.
        kind: "16bit" (`dtype`), "4bit" (this package's layers) or "4bit-bnb" (bitsandbytes' own, which PEFT adapts).
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=max(shape.length, 2048),
    )
    with torch.device(device):  # billions of random numbers take a CPU minutes
        model = cast(nn.Module, LlamaForCausalLM._from_config(config, dtype=dtype))
    model.requires_grad_(False)
    if kind == "4bit":
        quantize_model(model, QuantSpec(compute_dtype=dtype))
    elif kind == "4bit-bnb":
        _quantize_by_bitsandbytes(model, dtype, device)
    return model


@torch.no_grad()
def _quantize_by_bitsandbytes(model: nn.Module, dtype: torch.dtype, device: str) -> None:
    import bitsandbytes as bnb

    for name in quantization_targets(model):
        parent, _, leaf = name.rpartition(".")
        old = cast(nn.Linear, model.get_submodule(name))
        new = bnb.nn.Linear4bit(
            old.in_features, old.out_features, bias=False, compute_dtype=dtype, compress_statistics=True,
            quant_type="nf4", device="meta",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        setattr(model.get_submodule(parent), leaf, new.to(device))


def sharing(base: nn.Module) -> Any:
    """Return a copy of the modules that shares the frozen weights: an 8 B model nine times would not fit."""
    shared: list[Tensor] = [*base.parameters(), *base.buffers()]
    for module in base.modules():
        shared += [value for value in vars(module).values() if isinstance(value, Tensor)]
    return copy.deepcopy(base, {id(tensor): tensor for tensor in shared})


def base_alone(base: nn.Module, shape: Shape, device: str) -> Method:
    """The floor under all adapters: the frozen model, forward and backward, with one vector before it that is trained.

    The vector scales what the embeddings give, so that the backward passes through every layer, as adapters of the
    first one make it.
    """
    model = sharing(base)
    scale = nn.Parameter(torch.ones(shape.hidden, dtype=model.dtype, device=device))
    model.register_parameter("scale", scale)
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: output * scale)
    return Method(model, shape, device)


def plain_lora(base: nn.Module, shape: Shape, device: str, r: int) -> Method:
    """PEFT's LoRA of rank r on every linear layer."""
    import peft

    config = peft.LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS)
    return Method(peft.get_peft_model(sharing(base), config), shape, device)


def peft_adalora(base: nn.Module, shape: Shape, device: str, *, pruned: bool) -> Method:
    """PEFT's AdaLoRA, called as its users have to, before or after its final allocation."""
    import peft

    total, tfinal = (EARLY, 1) if pruned else (NEVER, 0)
    config = peft.AdaLoraConfig(
        init_r=shape.r, target_r=shape.r // 2, target_modules=TARGETS, tinit=1 if pruned else 0, tfinal=tfinal,
        deltaT=1 if pruned else 10, total_step=total, orth_reg_weight=0.1,
    )  # fmt: skip
    wrapped: Any = peft.get_peft_model(sharing(base), config)
    return Method(wrapped, shape, device, wrapped.base_model.update_and_allocate)


def ours(
    base: nn.Module, shape: Shape, device: str, *, preset: str = "default", pruned: bool = False, allocator: bool = True
) -> Method:
    """This package's layers, with or without an allocator, before or after the final allocation."""
    config = _config(shape, preset, pruned)
    method = Method(inject_adalora(sharing(base), config), shape, device)
    if allocator:
        method.allocator = RankAllocator(method.model, config, total_step=EARLY if pruned else NEVER)
        method.allocator.attach(method.optimizer)
    return method


def ours_resumed(base: nn.Module, shape: Shape, device: str) -> Method:
    """A run of this package that is resumed after its final allocation: adapters at the ranks that were left."""
    earlier = ours(base, shape, device, pruned=True)
    for _ in range(EARLY):
        earlier.step()
    assert earlier.allocator is not None
    state = earlier.allocator.state_dict()
    config = _config(shape, "default", pruned=True)
    model = inject_adalora(sharing(base), config)
    compact(model, {name.removesuffix(".lora_E"): row for name, row in earlier.allocator.rank_pattern().items()})
    method = Method(model, shape, device)
    method.allocator = RankAllocator(model, config, total_step=EARLY).attach(method.optimizer)
    method.allocator.load_state_dict(state)
    return method


def _config(shape: Shape, preset: str, pruned: bool) -> AdaLoraConfig:
    schedule: dict[str, Any] = {"tinit": 1, "tfinal": 1, "deltaT": 1} if pruned else {"tinit": 0, "tfinal": 0}
    return AdaLoraConfig(target_modules=TARGETS, init_r=shape.r, target_r=shape.r // 2, preset=preset, **schedule)
