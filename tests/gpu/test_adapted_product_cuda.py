"""A layer's product and its update in one function, by a card's kernels."""

import pytest
import torch

from tests.adalora.products import DTYPES, IN, KINDS, OUT, gradients, is_fused, layer_of, trained

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("rows", [1, 40, 512])  # bitsandbytes has another kernel for one row, some, and many
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_plain_operations(kind, dtype, rows):
    """The products add in place to what other kernels made."""
    torch.backends.cuda.matmul.allow_tf32 = False
    layer = layer_of(kind, dtype).to("cuda")
    x, given = torch.randn(1, rows, IN).to("cuda", dtype), torch.randn(1, rows, OUT).to("cuda", dtype)
    assert is_fused(layer(x))
    y, found = gradients(layer, layer, x, given)
    expected, wanted = gradients(layer, lambda x: layer.plain(x, *trained(layer)), x, given)
    for name, one, other in zip("yxaeb", (y, *found), (expected, *wanted), strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 16 * torch.finfo(dtype).eps * other.norm(), name


def test_under_autocast_of_the_bases_own_dtype():
    """How a trainer computes a 16-bit base."""
    layer = layer_of("linear", torch.bfloat16).to("cuda")
    x, given = torch.randn(6, IN).to("cuda", torch.bfloat16), torch.randn(6, OUT).to("cuda", torch.bfloat16)
    alone = gradients(layer, layer, x, given)
    with torch.autocast("cuda", torch.bfloat16):
        assert is_fused(layer(x))
        under = gradients(layer, layer, x, given)
    torch.testing.assert_close(alone, under, rtol=0, atol=0)
