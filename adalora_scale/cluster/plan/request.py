"""What is asked, and the figures of the hardware it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from adalora_scale.config import RunConfig
from adalora_scale.errors import UserError, nearest

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What one GPU reaches, not what its data sheet says."""

    memory: int
    """Bytes; what is sold as 80 GB is 80 GiB less the driver's share."""
    tflops: float
    """Dense bfloat16 matrix products, 10¹² operations a second."""
    memory_bandwidth: float
    """Bytes a second."""
    link_bandwidth: float
    """Bytes a second one GPU sends within its node."""


# 790 TFLOP/s and 4.3 TB/s were measured on an H200, whose chip is the H100's; the other figures are 80 to 90 % of the
# data sheets'.
GPUS = {
    "h100": Gpu(memory=79 * 2**30, tflops=790, memory_bandwidth=2.9e12, link_bandwidth=360e9),
    "h200": Gpu(memory=139 * 2**30, tflops=790, memory_bandwidth=4.3e12, link_bandwidth=360e9),
    "a100": Gpu(memory=79 * 2**30, tflops=265, memory_bandwidth=1.7e12, link_bandwidth=240e9),
    "a100-40gb": Gpu(memory=39 * 2**30, tflops=265, memory_bandwidth=1.3e12, link_bandwidth=240e9),
    "l40s": Gpu(memory=44 * 2**30, tflops=290, memory_bandwidth=0.75e12, link_bandwidth=25e9),
    "rtx4090": Gpu(memory=23 * 2**30, tflops=140, memory_bandwidth=0.9e12, link_bandwidth=12e9),
}


ASSUMED_GPU = "h100"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Stated figures; every one is an option of the command."""

    gpu: Gpu = field(default_factory=lambda: GPUS[ASSUMED_GPU])
    name: str | None = None
    """Of the GPU, as the user gave it; None: `ASSUMED_GPU` is assumed."""
    timed: bool = False
    """Whether the user said how fast the GPU is, by its name or by its throughput: without that, seconds and tokens/s
    would be those of another card."""
    efficiency: float = 0.5
    """Share of the GPU's matrix throughput that a training step reaches; fsdp_qlora published 0.28, 0.55 is good."""
    node_bandwidth: float = 45e9
    """Bytes a second one GPU sends to another node (one 400 Gbit/s card a GPU)."""
    disk_bandwidth: float = 2e9
    """Bytes a second one node reads from the model's folder."""
    host_link: float = 50e9
    """Bytes a second between a GPU and its host's memory."""
    context: int = 1_500_000_000
    """Bytes of a GPU that CUDA, cuBLAS and NCCL take and torch does not count."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One question.

    Raises:
        UserError: a number that makes no sense, or a global batch that the ranks do not divide.
    """

    config: RunConfig
    gpus: int
    nodes: int = 1
    hardware: Hardware = field(default_factory=Hardware)
    micro_batch: int | None = None
    """Sequences a GPU handles at a time; None: training.per_device_train_batch_size."""
    global_batch: int | None = None
    """Sequences an optimizer step; None: what micro-batch, accumulation and GPUs give."""
    whole_logits: bool = False
    """The loss builds all logits, as a model's own does, and not tile by tile, as TRL's."""

    def __post_init__(self) -> None:
        for option, value in (("--gpus", self.gpus), ("--nodes", self.nodes), ("--micro-batch", self.sequences)):
            if value < 1:
                raise UserError(f"{option} is {value}; it must be at least 1.")
        if self.gpus % self.nodes:
            raise UserError(f"--gpus {self.gpus} cannot be spread evenly over --nodes {self.nodes}.")
        if self.global_batch is not None:
            together = self.gpus * self.sequences
            if self.global_batch < 1:
                raise UserError(f"--global-batch is {self.global_batch}; it must be at least 1.")
            if self.global_batch % together:
                lower = self.global_batch // together * together
                near = [value for value in (lower, lower + together) if value]
                raise UserError(
                    f"--global-batch {self.global_batch} is not a multiple of {self.gpus} GPUs x "
                    f"{self.sequences} sequences = {together}; use {' or '.join(map(str, near))}, or another "
                    f"training.per_device_train_batch_size."
                )

    @property
    def sequences(self) -> int:
        """The micro-batch."""
        if self.micro_batch is not None:
            return self.micro_batch
        return int(self.config.training.get("per_device_train_batch_size", 8))

    @property
    def accumulation(self) -> int:
        """Micro-batches an optimizer step."""
        if self.global_batch is not None:
            return self.global_batch // (self.gpus * self.sequences)
        return int(self.config.training.get("gradient_accumulation_steps", 1))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.sequences * self.config.data.max_length

    @property
    def checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        keys = ("gradient_checkpointing", "activation_checkpointing")
        return any(bool(self.config.training.get(key)) for key in keys)

    @property
    def bf16(self) -> bool:
        """As training decides it on a GPU that has bfloat16."""
        return bool(self.config.training.get("bf16", not self.config.training.get("fp16")))


def find_gpu(name: str) -> Gpu:
    """Return a GPU's figures by name.

    Raises:
        UserError: it is not known.
    """
    if name.lower() not in GPUS:
        raise UserError(f"--gpu: '{name}' is not one of {', '.join(GPUS)}.{nearest(name.lower(), GPUS)}")
    return GPUS[name.lower()]


def parse_bytes(option: str, text: str) -> int:
    """Read `80GB`, `24GiB` or a number of bytes.

    Raises:
        UserError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B?)\s*", text, re.IGNORECASE)
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise UserError(f"{option} is '{text}'; write for example 80GB or 24GiB.")
    return int(float(match[1]) * _UNITS[match[2].upper()])
