"""Convolutions as operators, against the matrix that the layer itself gives when it is applied."""

import pytest
import torch
from _oracles import penalty_of, products_of, term_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2dSame, StdConv2dSame
from torch import nn
from torch.func import functional_call

from snr_hooks import SNROptimizer, discover

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def operator(module, weight, size):
    """The layer as a matrix, differentiable in the weight: its outputs for all unit images."""
    n = module.in_channels * torch.Size(size).numel()
    images = torch.eye(n, dtype=weight.dtype).view(n, module.in_channels, *size)
    return functional_call(module, {"weight": weight}, (images,)).flatten(1).T


@st.composite
def layers(draw):
    """A layer without bias and a size for its input, one to three dimensions."""
    d = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 2))
    largest = {1: 9, 2: 5, 3: 3}[d]
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    size, kernel, stride = each(1, largest), each(1, 3), each(1, 3)
    dilation = each(1, 2)
    options = {"groups": groups, "bias": False, "dtype": torch.float64}
    ins, outs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    if draw(st.booleans()):
        extra = tuple(
            draw(st.integers(0, max(s, e) - 1)) for s, e in zip(stride, dilation, strict=True)
        )
        module = TRANSPOSED[d](
            ins,
            outs,
            kernel,
            stride,
            padding=each(0, 2),
            output_padding=extra,
            dilation=dilation,
            **options,
        )
    else:
        padding = draw(st.one_of(st.just("valid"), st.just("same"), st.just(each(0, 2))))
        mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
        stride = (1,) * d if padding == "same" else stride
        module = CONVOLUTIONS[d](
            ins, outs, kernel, stride, padding, dilation, padding_mode=mode, **options
        )
    return module, size


@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@settings(max_examples=150)
@given(case=layers(), seed=st.integers(0, 2**31), top=st.sampled_from([1, 2]))
def test_products_and_term_equal_those_of_the_layer_as_a_matrix(case, seed, top):
    module, size = case
    weight = module.weight
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    try:
        expected = operator(module, weight, size)
    except RuntimeError:  # the kernel or the padding is too large for the image
        assume(False)
    assume(expected.numel() > 0)
    choice = {"view": "operator", "input_size": size, "top": top}
    [target], grad = term_of(module, "weight", choice)
    assert target.view.shape(weight) == tuple(expected.shape)
    torch.testing.assert_close(target.view.matrix(weight), expected, rtol=1e-10, atol=1e-12)
    for found, product in zip(*products_of(target, [expected.detach()], seed), strict=True):
        torch.testing.assert_close(found, product, rtol=1e-10, atol=1e-12)
    values = torch.linalg.svdvals(expected.detach())
    gaps = values[: top + 1].diff().abs()
    assume(len(gaps) == 0 or gaps.min() > 0.02 * values[0])  # else the gradient is not unique
    [gradient] = torch.autograd.grad(penalty_of([expected], top=top), weight)
    torch.testing.assert_close(grad, gradient, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
def test_the_norm_is_that_of_the_fft_for_circular_padding(size):
    module = nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular", dtype=torch.float64)
    kernel = module.weight.detach()
    transform = torch.fft.fft2(kernel, s=size)
    expected = torch.linalg.svdvals(transform.permute(2, 3, 0, 1)).max()
    [target] = discover(module, choose={"weight": {"view": "operator", "input_size": size}}).targets
    found = torch.linalg.svdvals(target.view.matrix(kernel))[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", [Conv2dSame, StdConv2dSame, ScaledStdConv2dSame])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (2, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("size", [(5, 6), (7, 8)])
def test_convolutions_of_timm_that_pad_by_the_size_of_the_input(kind, kernel, stride, size):
    module = kind(2, 3, kernel, stride=stride, bias=False).double()
    choose = {"weight": {"view": "operator", "weight": "effective", "input_size": size}}
    target = discover(module, choose=choose).targets[0]
    torch.testing.assert_close(
        target.view.matrix(module.weight), operator(module, module.weight, size).detach()
    )


def test_what_an_operator_is_called():
    size = {"view": "operator", "input_size": (5, 5)}
    [target] = discover(nn.Conv2d(2, 3, 3), choose={"weight": size}).targets
    assert target.view.describe(target.parameter) == (
        "convolution as operator, 2 x 5 x 5 to 3 x 3 x 3"
    )
    [target] = discover(nn.ConvTranspose2d(2, 3, 3), choose={"weight": size}).targets
    assert target.view.describe(target.parameter) == (
        "transposed convolution as operator, 2 x 5 x 5 to 3 x 7 x 7"
    )


def test_an_operator_that_is_too_large_is_not_written_out(monkeypatch):
    monkeypatch.setattr("snr_hooks.operators._LARGEST_MATRIX", 10)
    choose = {"weight": {"view": "operator", "input_size": (5, 5)}}
    [target] = discover(nn.Conv2d(2, 3, 3), choose=choose).targets
    with pytest.raises(ValueError, match="small enough to be written out, found an operator of 27"):
        target.view.matrix(target.parameter)


def test_what_is_no_convolution_is_seen_as_blocks():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MultiheadAttention(4, 2))
    found = {
        t.name: t.view.describe(t.parameter) for t in discover(model, choose="operator").targets
    }
    assert found["1.in_proj_weight"].startswith("3 maps (q k v)")
    assert found["1.out_proj.weight"].startswith("4 x 4 matrix")


@settings(max_examples=150)
@pytest.mark.filterwarnings("ignore:Using padding=.same.")
@given(case=layers())
def test_the_bound_holds(case):
    module, size = case
    try:
        exact = operator(module, module.weight.detach(), size)
    except RuntimeError:
        assume(False)
    assume(exact.numel() > 0)
    choose = {"weight": {"view": "operator", "input_size": size}}
    [target] = discover(module, choose=choose).targets
    bound = target.view.bound(target.parameter)
    assert bound >= torch.linalg.matrix_norm(exact, 2) * (1 - 1e-12)


def test_the_bound_is_close_on_large_images():
    module = nn.Conv2d(2, 3, 3, padding=1, bias=False, dtype=torch.float64)
    choose = {"weight": {"view": "operator", "input_size": (16, 16)}}
    [target] = discover(module, choose=choose).targets
    exact = torch.linalg.matrix_norm(operator(module, module.weight.detach(), (16, 16)), 2)
    assert exact <= target.view.bound(target.parameter) <= 1.05 * exact


def test_the_term_of_an_operator_is_rounded_once():
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        torch.manual_seed(0)
        layer = nn.Conv2d(8, 32, 3, bias=False).bfloat16().to(dtype)
        choose = {"weight": {"view": "operator", "input_size": 6}}
        base = torch.optim.SGD(layer.parameters(), lr=0.1)
        opt = SNROptimizer(base, layer, 0.3, choose=choose, exact=True)
        (layer.weight * 0).sum().backward()
        grads.append(layer.weight.grad.double())
        opt.remove()
    unit = torch.finfo(torch.bfloat16).eps * grads[1].abs()
    assert ((grads[0] - grads[1]).abs() <= 0.505 * unit + 1e-9).all()


def test_the_bound_of_a_padding_by_copies_is_attained():
    layer = nn.Conv1d(1, 1, 1, padding=1, padding_mode="circular", bias=False)
    nn.init.ones_(layer.weight)  # two of four inputs are there twice
    choose = {"weight": {"view": "operator", "input_size": 4}}
    [target] = discover(layer, choose=choose).targets
    norm = torch.linalg.matrix_norm(target.view.matrix(layer.weight.detach()), 2).item()
    assert target.view.bound(layer.weight) == pytest.approx(norm) == pytest.approx(2**0.5)
