"""The run's real model on the meta device, and what each of its tensors is for."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.shapes import model_config
from adalora_scale.config import RunConfig
from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.engines.planned import SECOND_LEVEL, Piece
from adalora_scale.errors import Unsupported
from adalora_scale.placing.absent import adalora_config_for
from adalora_scale.placing.streaming import build_on_meta, quant_spec
from adalora_scale.placing.tiled_mlp import tile_mlps
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit, quantization_targets, replace_linears
from adalora_scale.tasks.registry import find_task


def build(request: Request, layers: int | None = None) -> nn.Module:
    """Build the model with its 4-bit layers and adapters, without memory; arguments and errors as `build_base`."""
    model = build_base(request, layers)
    with torch.random.fork_rng(devices=[]):
        inject_adalora(model, adalora_config_for(request.config, model))
    tile_mlps(model, request.config.training.get("tiled_mlp", 1))
    return model.train()


def build_base(request: Request, layers: int | None = None) -> nn.Module:
    """Build the model with its 4-bit layers and without adapters, without memory.

    Args:
        request: the question.
        layers: number of blocks instead of the model's own, for a trace.

    Raises:
        UserError: the config asks for what training would refuse.
        Unsupported: the number of blocks cannot be set.
    """
    config = request.config
    shape = model_config(config.model)
    if layers is not None:
        shape = shortened(shape, layers)
    find_task(config.task).complete_shape(shape)
    attention = config.model.attn_implementation
    model = build_on_meta(
        request.config if not is_flash(attention) else _with_sdpa(request), shape, dtype_of(request, shape)
    )
    if config.model.load_in_4bit:
        spec = quant_spec(config.model)
        replace_linears(model, spec, quantization_targets(model, config.model.bnb_4bit_skip_modules))
    return model


def is_flash(attention: str | None) -> bool:
    """Whether attention is one of flash-attention's kernels, which need their package and a GPU to be built."""
    return attention is not None and attention.startswith("flash_attention")


def dtype_of(request: Request, shape: PretrainedConfig) -> torch.dtype:
    """Return the dtype of the frozen weights."""
    name = request.config.model.torch_dtype
    if name != "auto":
        return cast(torch.dtype, getattr(torch, name))
    stated = getattr(shape, "dtype", None)
    return stated if isinstance(stated, torch.dtype) else torch.float32


def shortened(shape: PretrainedConfig, layers: int) -> PretrainedConfig:
    """Return a copy with another number of blocks.

    Raises:
        Unsupported: the config does not say it in `num_hidden_layers`.
    """
    text = shape.get_text_config()
    if text is not shape or not hasattr(shape, "num_hidden_layers"):
        raise Unsupported(f"cannot plan a {shape.model_type}: its config has no num_hidden_layers of its own.")
    short = copy.deepcopy(shape)
    if isinstance(getattr(short, "layer_types", None), list):
        short.layer_types = short.layer_types[:layers]
    short.num_hidden_layers = layers
    return short


def pieces(model: nn.Module) -> list[Piece]:
    """Return every parameter once, and the buffers of 4-bit layers."""
    block_of = {
        id(module): index for index, block in enumerate(transformer_blocks(model)) for module in block.modules()
    }
    outer = [getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings")]
    heads = {id(module) for module in outer if module is not None}
    seen: set[int] = set()
    found = []
    for module in model.modules():
        block = block_of.get(id(module))
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(Piece(_kind(module, leaf, parameter, heads), parameter, block))
        if isinstance(module, Linear4bit):
            found.append(Piece(SECOND_LEVEL, module.nested, block))
    return found


def _kind(module: nn.Module, leaf: str, parameter: Tensor, heads: set[int]) -> str:
    if isinstance(module, AdaLoraLayer):
        return "adapters"
    if parameter.requires_grad:
        return "other trainable"
    if isinstance(module, Linear4bit | ExpertLinear4bit) and leaf in ("weight", "scales", "nested"):
        return "4-bit weights" if leaf == "weight" else "4-bit scales"
    if id(module) in heads or isinstance(module, nn.Embedding):
        return "embeddings and head"
    return "linear weights" if parameter.dim() >= 2 else "norms and biases"


def _with_sdpa(request: Request) -> RunConfig:
    return replace(request.config, model=replace(request.config.model, attn_implementation="sdpa"))
