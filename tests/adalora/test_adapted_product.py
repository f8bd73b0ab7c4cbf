"""An update computed in one function with the base's product: the same as the plain operations, wherever it is used."""

import copy
import functools
import io
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from adalora_scale.adalora.layer import AdaLoraLayer
from tests.adalora.products import DTYPES, IN, KINDS, OUT, gradients, is_fused, layer_of, trained
from tests.adalora.tiny import randomise

SHAPES = [(IN,), (5, IN), (2, 3, IN), (0, IN)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_plain_operations(kind, dtype, shape):
    """Every product of it can be left out, scaled twice or turned without a wrong shape."""
    layer = layer_of(kind, dtype)
    x = torch.randn(shape).to(dtype)
    assert is_fused(layer(x))
    given = torch.randn(*shape[:-1], OUT).to(dtype)
    y, found = gradients(layer, layer, x, given)
    expected, wanted = gradients(layer, lambda x: layer.plain(x, *trained(layer)), x, given)
    tolerance = {} if dtype == torch.float32 else {"rtol": 16 * torch.finfo(dtype).eps, "atol": 0.1}
    torch.testing.assert_close(y, expected, **tolerance)
    for name, one, other in zip("xaeb", found, wanted, strict=True):
        assert one.dtype == other.dtype, name
        if dtype == torch.float32:
            torch.testing.assert_close(one, other)
        elif other.numel() and shape[0]:
            assert (one - other).norm() <= 4 * torch.finfo(dtype).eps * other.norm(), name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_in_16_bits_it_is_as_near_to_float64_as_the_plain_operations(dtype):
    """Both round; neither may round more often."""
    layer = layer_of("linear", dtype)
    exact = copy.deepcopy(layer).double()
    squares = torch.zeros(2, 5, dtype=torch.float64)
    for _ in range(50):  # a gradient of E is four numbers; one draw's rounding is luck
        x, given = torch.randn(40, IN).to(dtype), torch.randn(40, OUT).to(dtype)
        wanted = gradients(exact, lambda x: exact.plain(x, *trained(exact)), x.double(), given.double())
        for row, forward in enumerate((layer, lambda x: layer.plain(x, *trained(layer)))):
            y, found = gradients(layer, forward, x, given)
            pairs = zip((y, *found), (wanted[0], *wanted[1]), strict=True)
            squares[row] += torch.stack([((one - other).norm() / other.norm()).square() for one, other in pairs])
    mine, plain = squares.sqrt()
    assert (mine < 1.1 * plain).all(), mine / plain


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_do_not_lie_one_after_another(kind):
    """Model code turns and cuts what it hands on, and a sum's gradient is one number for all places."""
    layer = layer_of(kind)
    for x in (torch.randn(2, 3, IN), torch.randn(3, IN, 2).mT, torch.randn(4, 2 * IN)[:, ::2], torch.randn(IN, 5).T):
        if kind == "conv1d" and x.dim() == 3 and not x.is_contiguous():
            continue  # transformers' own forward refuses it, by a view
        given = torch.ones(()).expand(*x.shape[:-1], OUT)
        y, found = gradients(layer, layer, x, given)
        expected, wanted = gradients(layer, lambda x: layer.plain(x, *trained(layer)), x, given)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 2), (1, 3), (0, 1, 3)], ids=str)
def test_what_needs_no_gradient_gets_none(kind, wanted):
    """A layer behind frozen inputs, and adapters that are frozen on their own or to train in stages."""
    layer = layer_of(kind)
    inputs = [torch.randn(6, IN), *trained(layer)]
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number in wanted)
    chosen = [inputs[number] for number in wanted]
    y = layer(inputs[0])
    assert is_fused(y) == (1 in wanted)
    given = torch.randn(6, OUT)
    found = torch.autograd.grad(y, chosen, given)
    torch.testing.assert_close(found, torch.autograd.grad(layer.plain(*inputs), chosen, given))


def test_a_frozen_adapter_keeps_no_input():
    """In stages most adapters are frozen; the input of each would be there until the backward."""
    layer = layer_of().requires_grad_(False)
    x = torch.randn(200, IN, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    assert not [tensor for tensor in saved if tensor.numel() == x.numel()]


def test_without_gradients_nothing_is_made_for_them():
    """A generated token costs products, and no graph."""
    layer = layer_of().requires_grad_(False)
    x = torch.randn(3, IN)
    with torch.no_grad(), mock.patch.object(layer, "plain") as plain:
        y = layer(x)
    assert not plain.called
    torch.testing.assert_close(y, layer(x))


def test_under_autocast_of_the_bases_own_dtype():
    """Trainers compute a 16-bit base under autocast; another dtype than the base's is autocast's affair."""
    layer = layer_of("linear", torch.bfloat16)
    x, given = torch.randn(6, IN).bfloat16(), torch.randn(6, OUT).bfloat16()
    alone = gradients(layer, layer, x, given)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_fused(layer(x))
        under = gradients(layer, layer, x, given)
        assert not is_fused(layer_of("linear")(x.float()))
        assert not is_fused(layer_of("4bit")(x.float()))
    torch.testing.assert_close(alone, under, rtol=0, atol=0)
    with torch.autocast("cpu", torch.float16):
        assert not is_fused(layer(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_a_backward_called_under_autocast_is_the_same(kind, dtype):
    """Loops that call it inside the context are common; products in another dtype cannot add onto the base's."""
    layer = layer_of(kind, dtype)
    x = torch.randn(6, IN, dtype=dtype, requires_grad=True)
    given = torch.randn(6, OUT, dtype=dtype)
    inputs = [x, *trained(layer)]
    expected = torch.autograd.grad(layer(x), inputs, given)
    for low in DTYPES[1:]:
        y = layer(x)
        assert is_fused(y)
        with torch.autocast("cpu", low):
            found = torch.autograd.grad(y, inputs, given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_gradients(kind):
    """A penalty on gradients differentiates them again; what the function keeps would count as constant."""
    layer = layer_of(kind)
    x, given = torch.randn(5, IN), torch.randn(5, OUT)

    def second(forward):
        mine = x.clone().requires_grad_()
        first = torch.autograd.grad(forward(mine), [mine, *trained(layer)], given, create_graph=True)
        return torch.autograd.grad(sum(one.square().sum() for one in first), [mine, *trained(layer)])

    torch.testing.assert_close(second(layer), second(lambda x: layer.plain(x, *trained(layer))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_it_is_the_same(kind, use_reentrant):
    """Checkpointing saves and packs what the function saves."""
    layer = layer_of(kind)
    x, given = torch.randn(2, 3, IN), torch.randn(2, 3, OUT)

    def run(forward):
        mine = x.clone().requires_grad_()
        layer.zero_grad()
        forward(mine).backward(given)
        return [mine.grad, *(parameter.grad for parameter in trained(layer))]

    recomputed = run(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant))
    torch.testing.assert_close(run(layer), recomputed, rtol=0, atol=0)


def test_model_code_may_change_the_output_in_place():
    """Residuals and activations are often added in place, which autograd forbids on a view made inside a function."""
    layer = layer_of()
    x = torch.randn(2, 3, IN)
    y = layer(x)
    assert is_fused(y)
    y += 1
    y.relu_().sum().backward()
    found = [parameter.grad for parameter in trained(layer)]
    plain = torch.relu(layer.plain(x, *trained(layer)) + 1).sum()
    torch.testing.assert_close(found, list(torch.autograd.grad(plain, trained(layer))))


def test_a_factor_that_changes_before_the_backward_is_noticed():
    """The function keeps the factors for the backward; an update in between would give wrong gradients."""
    layer = layer_of()
    y = layer(torch.randn(3, IN))
    with torch.no_grad():
        layer.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def a_hook(layer):
    layer.base_layer.register_forward_hook(lambda module, x, y: 2 * y)


def a_hook_before(layer):
    layer.base_layer.register_forward_pre_hook(lambda module, x: (2 * x[0],))


def another_forward(layer):
    old = layer.base_layer.forward
    layer.base_layer.forward = lambda x: 2 * old(x)


def another_class(layer):
    class Doubled(type(layer.base_layer)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.base_layer.__class__ = Doubled


@pytest.mark.parametrize("change", [a_hook, a_hook_before, another_forward, another_class])
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_does_more_than_multiply_is_called(kind, change):
    """ZeRO-3 and device maps bring weights in hooks, others change what goes in or comes out."""
    layer = layer_of(kind)
    x = torch.randn(3, IN)
    update = layer(x) - layer.base_layer(x)
    before = layer.base_layer(x)
    change(layer)
    y = layer(x)
    assert not is_fused(y)
    assert not torch.equal(layer.base_layer(x), before)
    torch.testing.assert_close(y, layer.base_layer(x) + update)


@pytest.mark.parametrize("wraps", [False, True], ids=["alone", "with its name and module"])
@pytest.mark.parametrize("before", [False, True], ids=["after the import", "before it"])
def test_a_forward_put_in_the_class_s_place_is_called(before, wraps, monkeypatch):
    """Packages that speed models up replace torch's own, for all layers at once."""
    layer = layer_of()
    x = torch.randn(3, IN)
    plain = layer(x)
    own = nn.Linear.forward
    other = lambda self, x: 2 * own(self, x)  # noqa: E731
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(own)(other) if wraps else other)
    if before:
        layer.adaptable = type(layer.adaptable)()
        monkeypatch.setattr(type(layer.adaptable), "product", type(layer.adaptable.product)())
    y = layer(x)
    assert not is_fused(y)
    torch.testing.assert_close(y, plain + own(layer.base_layer, x))


def test_a_hook_on_all_modules_sees_the_base():
    """Profilers count modules so."""
    layer, seen = layer_of(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(3, IN))
    finally:
        handle.remove()
    assert layer.base_layer in seen


def test_a_base_that_is_trained_gets_its_gradient():
    """A tied weight is trained where it is listed in modules_to_save."""
    layer = layer_of()
    layer.base_layer.requires_grad_(True)
    y = layer(torch.randn(3, IN))
    assert not is_fused(y)
    y.sum().backward()
    assert layer.base_layer.weight.grad.abs().sum() > 0


def test_an_input_or_a_bias_in_another_dtype_than_the_base_computes_in():
    """A 4-bit layer casts what it is given and what it adds, and gives back what it was given."""
    layer = layer_of("4bit", torch.bfloat16)
    bias = layer.bias.float()
    for dtype, own in ((torch.float32, None), (torch.bfloat16, bias)):
        layer.base_layer.bias = None if own is None else nn.Parameter(own, requires_grad=False)
        x = torch.randn(3, IN).to(dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert not is_fused(y)
        expected = layer.base_layer(x).float() + x.float() @ layer.delta_weight().T
        torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)


class Foreign(torch.Tensor):
    """A weight with a product of its own, as quantising libraries and tensor parallelism have them."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs)
        return -result if function is torch.nn.functional.linear else result


def test_a_weight_that_knows_better_is_left_to_its_layer():
    """Its backward need not be a product with what it shows as its values."""
    layer = layer_of("no bias")
    x = torch.randn(3, IN)
    before = layer.base_layer(x)
    layer.base_layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign), requires_grad=False)
    y = layer(x)
    assert not is_fused(y)
    torch.testing.assert_close(y.as_subclass(torch.Tensor), x @ layer.delta_weight().T - before)


def test_dropout_takes_the_plain_way():
    """The base's input is not the adapter's then."""
    assert not is_fused(layer_of(dropout=0.5)(torch.randn(3, IN)))


def test_other_ways_to_differentiate_and_to_trace_see_operations():
    """A function of its own has no rule for any of them, and they worked before there was one."""
    layer = layer_of()
    x = torch.randn(3, IN)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), expected)
    torch.testing.assert_close(torch.func.jacfwd(layer)(x), expected)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
    torch.testing.assert_close(tangent, expected.sum((2, 3)))
    written = io.BytesIO()
    torch.jit.save(torch.jit.trace(layer, x), written)  # a function of Python's could not be written
    written.seek(0)
    torch.testing.assert_close(torch.jit.load(written)(2 * x), layer(2 * x))
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(2 * x), layer(2 * x))


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_come_without_numbers(kind):
    """A plan traces a step with tensors that have no bytes; it has to trace what the step computes."""
    layer = layer_of(kind)
    meta = copy.deepcopy(layer).to("meta")
    assert is_fused(meta(torch.empty(2, 3, IN, device="meta")))
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.empty(2, 3, IN, requires_grad=True)
        y = layer(x)
        assert is_fused(y)
        y.sum().backward()
    assert x.grad.shape == (2, 3, IN)
    assert layer.lora_E.grad.shape == (4,)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_no_second_tensor_of_the_outputs_or_the_inputs_size_is_made(kind):
    """They are what LoRA costs on a GPU: of a long row each is the largest thing an adapter would make."""
    layer = layer_of(kind)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.append(result)
            return result

    def big(rows):
        found = {tensor.untyped_storage().data_ptr() for tensor in made if tensor.numel() >= rows * OUT}
        made.clear()
        return found

    rows = 2 * 100
    x = torch.randn(2, 100, IN, requires_grad=True)
    known = x.untyped_storage().data_ptr()
    with Watch():
        y = layer(x)
        assert len(big(rows) - {known}) == 1
        given = torch.randn(2, 100, OUT)
        made.clear()
        of_x, *_ = torch.autograd.grad(y, [x, *trained(layer)], given)
        assert big(rows) - {known, given.untyped_storage().data_ptr()} == {of_x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("kind", KINDS)
def test_selective_checkpointing_keeps_what_products_return(kind):
    """Its policies save products, and nothing may add onto what is saved."""
    layer = layer_of(kind)
    x, given = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, 3, OUT)
    inputs = [x, *trained(layer)]
    expected = torch.autograd.grad(layer(x), inputs, given)
    operators = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
    y = checkpoint(
        layer, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(operators)
    )  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(y, inputs, given), expected)


def twice(forward, inputs):
    """Gradients with a graph of their own."""
    return torch.autograd.grad(forward(), inputs, create_graph=True)


def test_gradients_with_a_graph_of_a_layer_that_is_called_twice():
    """ALBERT's blocks share their weights: what reaches the factors by the input is the other call's."""
    base = nn.Linear(IN, IN)
    layer = randomise(AdaLoraLayer(base, r=2, scaling=2.0))
    x = torch.randn(3, IN, requires_grad=True)
    inputs = [x, *trained(layer)]
    found = twice(lambda: layer(torch.tanh(layer(x))).square().sum(), inputs)
    plain = lambda x: layer.plain(x, *trained(layer))  # noqa: E731
    torch.testing.assert_close(found, twice(lambda: plain(torch.tanh(plain(x))).square().sum(), inputs))


def test_hooks_on_its_inputs_run_once_when_gradients_have_a_graph():
    """A hook that scales would scale twice."""
    layer = layer_of()
    x = torch.randn(3, IN, requires_grad=True) * 1.0
    ran = []
    for tensor in (x, layer.lora_A):
        tensor.register_hook(lambda gradient: ran.append(1))
    twice(lambda: layer(x).square().sum(), [x, *trained(layer)])
    assert len(ran) == 2


def test_gradients_with_a_graph_are_those_of_what_the_forward_computed_with():
    """Weights of a call alone, and a scaling that changed since."""
    layer = layer_of()
    x = torch.randn(3, IN, requires_grad=True)
    y = torch.func.functional_call(layer, {"base_layer.weight": torch.randn(OUT, IN)}, (x,))
    assert is_fused(y)
    layer.scaling = 7.0
    inputs = [x, *trained(layer)]
    expected = torch.autograd.grad(y.sum(), inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), inputs, create_graph=True), expected)


def test_of_a_part_of_a_tensor_only_the_part_is_kept():
    """A head that sees the last tokens would keep the whole row's states."""
    layer = layer_of()
    whole = torch.randn(4, 1000, IN)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        layer(whole[:, -10:])
    assert whole.untyped_storage().data_ptr() not in {tensor.untyped_storage().data_ptr() for tensor in saved}


def test_a_base_of_another_kind_put_in_its_place():
    """Quantising tools replace layers of a model that has adapters."""

    class Other(nn.Module):
        def forward(self, x):
            return torch.ones(*x.shape[:-1], OUT)

    layer = layer_of()
    layer.base_layer = Other()
    y = layer(torch.randn(3, IN))
    assert y.shape == (3, OUT)
    assert not is_fused(y)


@pytest.mark.parametrize("factor", ["lora_A", "lora_E", "lora_B"])
def test_factors_in_several_dtypes(factor):
    """Some tools cast parameters by their number of dimensions."""
    layer = layer_of("linear", torch.bfloat16)
    getattr(layer, factor).data = getattr(layer, factor).data.bfloat16()
    x = torch.randn(3, IN).bfloat16()
    given = torch.randn(3, OUT).bfloat16()
    y, found = gradients(layer, layer, x, given)
    expected, wanted = gradients(layer, lambda x: layer.plain(x, *trained(layer)), x, given)
    assert [one.dtype for one in found] == [one.dtype for one in wanted]
    torch.testing.assert_close([y, *found], [expected, *wanted], rtol=0.05, atol=0.1)


def test_another_product_in_the_functions_place_is_called(monkeypatch):
    """Its gradient is its own too."""
    layer = layer_of()
    x = torch.randn(3, IN)
    own = torch.nn.functional.linear

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    with Mode():
        assert not is_fused(layer(x))
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *given: own(*given))
    assert not is_fused(layer(x))


def test_what_the_gradients_do_not_need_may_change_before_the_backward():
    """A bias, and the weight where the input has no gradient, are none of the backward's."""
    layer = layer_of()
    y = layer(torch.randn(3, IN))
    with torch.no_grad():
        layer.base_layer.bias.add_(1)
        layer.base_layer.weight.add_(1)
    y.sum().backward()


def test_a_parametrised_weight_is_made_once_a_forward():
    """Some have a state that every making moves on."""
    made = []

    class Counting(nn.Module):
        def forward(self, weight):
            made.append(1)
            return weight

    layer = layer_of()
    torch.nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Counting())
    layer.base_layer.requires_grad_(False)
    made.clear()
    assert not is_fused(layer(torch.randn(3, IN)))
    assert len(made) == 1
