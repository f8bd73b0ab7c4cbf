"""Adapted layers whose product and update are one function, and what they compute by it and by plain operations."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.quantization.linear import quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.adalora.tiny import randomise

IN, OUT = 64, 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "no bias", "conv1d", "4bit"]


def layer_of(kind="linear", dtype=torch.float32, **options):
    """A layer over a base of one of `KINDS` that computes in `dtype`; its update is not zero."""
    torch.manual_seed(0)
    if kind == "4bit":
        base = quantize_model(nn.Sequential(nn.Linear(IN, OUT)), QuantSpec(compute_dtype=dtype))[0]
        base.bias.data = base.bias.data.to(dtype)
    else:
        base = (Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "linear")).to(dtype)
    return randomise(AdaLoraLayer(base, r=4, scaling=2.5, **options))


def is_fused(y):
    """Whether the function computed y; asked of autograd, not of the layer."""
    return type(y.grad_fn).__name__ == "_AdaptedBackward"


def trained(layer):
    """A, E and B."""
    return [layer.lora_A, layer.lora_E, layer.lora_B]


def gradients(layer, forward, x, given):
    """The output for x, and the gradients of x, A, E and B where the output's is `given`."""
    x = x.detach().requires_grad_()
    y = forward(x)
    return y.detach(), torch.autograd.grad(y, [x, *trained(layer)], given)
