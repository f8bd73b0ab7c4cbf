"""What a 4-bit base is made of: the options, and the sizes that follow from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adalora_scale.errors import UserError

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Block sizes that bitsandbytes has kernels for."""
NESTED_BLOCK = 256
"""First-level scales that share one second-level scale; fixed in bitsandbytes' kernels."""
CODES = 256
"""Values of the 8-bit codes of the first-level scales."""
_QUANT_TYPES = ("nf4", "fp4")
_COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """Options of a 4-bit base, named as in `model:` of a run's config without their prefix ``bnb_4bit_``.

    Raises:
        UserError: a value that bitsandbytes has no kernel for.

    Source: QLoRA, arXiv 2305.14314, sections 2 and 3.
    """

    quant_type: str = "nf4"
    """Code book: nf4 or fp4."""
    blocksize: int = 64
    """Weights that share one first-level scale (absmax)."""
    double_quant: bool = True
    """Keep the first-level scales as 8-bit codes (double quantisation); else as float32."""
    compute_dtype: torch.dtype = torch.bfloat16
    """Dtype of the dequantised matrix product."""

    def __post_init__(self) -> None:
        if self.quant_type not in _QUANT_TYPES:
            raise UserError(f"model.bnb_4bit_quant_type is {self.quant_type!r}; it must be nf4 or fp4.")
        if self.blocksize not in BLOCK_SIZES:
            raise UserError(
                f"model.bnb_4bit_blocksize is {self.blocksize}; it must be one of {', '.join(map(str, BLOCK_SIZES))}."
            )
        if self.compute_dtype not in _COMPUTE_DTYPES:
            raise UserError(
                f"model.bnb_4bit_compute_dtype is {self.compute_dtype}; it must be float32, bfloat16 or float16."
            )

    def blocks(self, in_features: int, out_features: int, name: str = "a layer") -> int:
        """Return the number of blocks of an (out_features, in_features) weight.

        Raises:
            UserError: the block size does not divide the number of weights.
        """
        weights = in_features * out_features
        if weights % self.blocksize:
            raise UserError(
                f"model.bnb_4bit_blocksize={self.blocksize} does not divide the {weights} weights of '{name}' "
                f"({out_features} x {in_features}); choose a smaller one, or add '{name.split('.')[-1]}' to "
                f"model.bnb_4bit_skip_modules."
            )
        return weights // self.blocksize

    def scales_shape(self, blocks: int) -> tuple[int, ...]:
        """Return the shape of the uint8 tensor of first-level scales: one code a block, or a float32's four bytes."""
        return (blocks,) if self.double_quant else (blocks, 4)

    def nested_bytes(self, blocks: int) -> int:
        """Return the bytes of the second level (`functional` says what they are), 0 without double quantisation."""
        return 4 * (-(-blocks // NESTED_BLOCK) + 1 + CODES) if self.double_quant else 0
