"""Blocks of weights against matrices that are cut out one by one."""

import pytest
import torch
from _oracles import as_matrix, penalty_of, products_of, term_of
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from snr_hooks import discover
from snr_hooks.blocks import BlockView
from snr_hooks.layouts import Projection

seeds = st.integers(0, 2**31)


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def of_groups(module, weight):
    chunks = weight.chunk(module.groups)
    return [as_matrix(c, transposed=isinstance(module, TRANSPOSED)) for c in chunks]


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@st.composite
def grouped(draw):
    """A grouped or depthwise convolution, and its weight cut into groups."""
    kind = draw(st.sampled_from(CONVOLUTIONS))
    groups = draw(st.integers(2, 4))
    ins, outs, kernel = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    module = kind(ins * groups, outs * groups, kernel, groups=groups).double()
    if draw(st.booleans()) and module.weight.ndim == 4:
        module = module.to(memory_format=torch.channels_last)
    return module, "weight", lambda weight: of_groups(module, weight), {"view": "blocks"}


@st.composite
def recurrent(draw):
    kind, gates = draw(st.sampled_from([(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)]))
    module = kind(draw(st.integers(1, 4)), draw(st.integers(1, 4))).double()
    name = draw(st.sampled_from(["weight_ih_l0", "weight_hh_l0"]))
    return module, name, lambda weight: weight.chunk(gates), {"view": "blocks"}


@st.composite
def torch_attention(draw):
    heads, d = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    module = nn.MultiheadAttention(heads * d, heads).double()
    per_head = draw(st.booleans())
    n_blocks = 3 * heads if per_head else 3
    choice = {"view": "heads" if per_head else "blocks"}
    return module, "in_proj_weight", lambda weight: weight.chunk(n_blocks), choice


class CondConv2d(nn.Module):
    """As timm's: a flat kernel of (out, in / groups, kh, kw) for each expert."""

    def __init__(self, n_experts, outs, ins, kernel, groups):
        super().__init__()
        self.out_channels, self.groups = outs, groups
        self.weight = nn.Parameter(torch.zeros(n_experts, outs * ins * kernel * kernel))


@st.composite
def experts(draw):
    n, outs, ins, kernel, groups = (draw(st.integers(1, 3)) for _ in range(5))
    module = CondConv2d(n, outs * groups, ins, kernel, groups).double()

    def cut(weight):
        kernels = [flat.view(outs * groups, ins, kernel, kernel) for flat in weight]
        return [as_matrix(part) for whole in kernels for part in whole.chunk(groups)]

    return module, "weight", cut, {"view": "blocks"}


@pytest.mark.parametrize("norm", [None, "each", "largest"])
@pytest.mark.parametrize("top", [1, 2])
@given(case=st.one_of(grouped(), recurrent(), torch_attention(), experts()), seed=seeds)
def test_products_and_term_equal_those_of_matrices_that_are_cut_out(case, norm, top, seed):
    module, name, cut, choice = case
    choice = {**choice, "top": top} | ({"norm": norm} if norm else {})
    weight = module.get_parameter(name)
    with torch.no_grad():
        weight.copy_(randn(*weight.shape, seed=seed))
    pooled = norm == "largest" or (norm is None and isinstance(module, CONVOLUTIONS))
    [target], grad = term_of(module, name, choice)
    for found, expected in zip(*products_of(target, cut(weight.detach()), seed), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    expected = torch.autograd.grad(penalty_of(cut(weight), top=top, pooled=pooled), weight)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-12)


# --- projections of attention ---


@st.composite
def projections(draw):
    """A projection, how its rows are cut into parts and heads, and a weight for it."""
    heads, d = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    columns = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["equal", "grouped queries", "heads first", "unequal"]))
    if kind == "equal":
        n_parts = draw(st.integers(2, 3))
        projection = Projection((heads * d,) * n_parts, (heads,) * n_parts)
        parts = lambda w: w.chunk(n_parts)  # noqa: E731
        per_head = lambda w: w.chunk(n_parts * heads)  # noqa: E731
        rows = n_parts * heads * d
    elif kind == "grouped queries":
        kv = draw(st.integers(1, heads))
        sizes = heads * d, kv * d, kv * d
        projection = Projection(sizes, (heads, kv, kv))
        parts = lambda w: w.split(sizes)  # noqa: E731
        per_head = lambda w: w.split(d)  # noqa: E731
        rows = sum(sizes)
    elif kind == "heads first":
        projection = Projection((d, d, d), (heads,) * 3, heads_first=True)
        by_head = lambda w: [h.chunk(3) for h in w.chunk(heads)]  # noqa: E731
        parts = lambda w: [torch.cat(p) for p in zip(*by_head(w), strict=True)]  # noqa: E731
        per_head = lambda w: [p for h in by_head(w) for p in h]  # noqa: E731
        rows = 3 * heads * d
    else:
        sizes = d, d, d + draw(st.integers(1, 3))
        projection = Projection(sizes, (heads,) * 3, heads_first=True)
        by_head = lambda w: [h.split(sizes) for h in w.chunk(heads)]  # noqa: E731
        parts = lambda w: [torch.cat(p) for p in zip(*by_head(w), strict=True)]  # noqa: E731
        per_head = lambda w: [h[i] for i in range(3) for h in by_head(w)]  # noqa: E731
        rows = heads * sum(sizes)
    return projection, randn(rows, columns, seed=draw(seeds)), parts, per_head


@pytest.mark.parametrize("heads", [False, True])
@given(case=projections())
def test_projections_are_cut_into_parts_and_heads(case, heads):
    projection, weight, parts, per_head = case
    views = projection.views(weight, per_head=heads)
    expected = (per_head if heads else parts)(weight)
    found = [block for view in views.values() for block in view.matrix(weight)]
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    # Every entry is in exactly one block.
    count = torch.zeros_like(weight)
    for view in views.values():
        n_blocks, m, n = view.shape(weight)
        ones = torch.ones(n_blocks, 1, m).double(), torch.ones(n_blocks, 1, n).double()
        view.adder(weight, *ones)(count, torch.ones(n_blocks, 1).double())
    assert torch.equal(count, torch.ones_like(weight))


@given(heads=st.integers(1, 4), d=st.integers(1, 3), out=st.integers(1, 4), seed=seeds)
def test_output_projections_are_cut_along_columns(heads, d, out, seed):
    weight = randn(out, heads * d, seed=seed)
    projection = Projection((heads * d,), (heads,), of_columns=True)
    assert projection.views(weight, per_head=False) is None
    view = projection.views(weight, per_head=True)[""]
    for block, expected in zip(view.matrix(weight), weight.chunk(heads, dim=1), strict=True):
        assert torch.equal(block, expected)


def test_products_that_were_prepared_read_the_weight_as_it_is_by_then():
    """Of a grouped transposed convolution no matrix is a view: it is copied at every call."""
    layer = nn.ConvTranspose2d(4, 6, 2, groups=2).double()
    [target] = discover(layer, choose="blocks").targets
    weight = layer.weight.detach()
    n_blocks, m, n = target.view.shape(weight)
    v, u = randn(n_blocks, 2, n), randn(n_blocks, 2, m)
    right, left = v.new_empty(n_blocks, 2, m), v.new_empty(n_blocks, 2, n)
    products = target.view.matvec(weight, v, right), target.view.rmatvec(weight, u, left)
    weight.mul_(-2)
    for product in products:
        product()
    matrices = torch.stack(of_groups(layer, weight))
    torch.testing.assert_close(right, v @ matrices.mT)
    torch.testing.assert_close(left, u @ matrices)


def test_separate_projections_of_attention_and_projected_lstms():
    module = nn.MultiheadAttention(4, 2, kdim=3, vdim=5)
    shapes = {t.name: t.view.shape(t.parameter) for t in discover(module, choose="heads").targets}
    assert shapes == {
        "q_proj_weight": (2, 2, 4),
        "k_proj_weight": (2, 2, 3),
        "v_proj_weight": (2, 2, 5),
        "out_proj.weight": (2, 4, 2),
    }
    found = discover(nn.LSTM(3, 4, proj_size=2), choose="blocks")
    shapes = {t.name: t.view.shape(t.parameter) for t in found.targets}
    assert shapes == {"weight_ih_l0": (4, 4, 3), "weight_hh_l0": (4, 4, 2)}
    assert [skip.name for skip in found.skipped] == ["weight_hr_l0"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_terms_of_blocks_are_rounded_once(dtype):
    grad, u, v = randn(40, 60).to(dtype), randn(2, 1, 20).float(), randn(2, 1, 60).float()
    factors = torch.tensor([[0.75], [0.3]], dtype=torch.float64)
    term = (factors[..., None].float().double() * u.double()).mT @ v.double()
    expected = grad.double() + term.view(40, 60)
    BlockView((2, 20, 60)).adder(grad, u, v)(grad, factors)
    unit = torch.finfo(dtype).eps * expected.abs() + 2 * torch.finfo(dtype).smallest_normal
    assert ((grad.double() - expected).abs() <= 0.51 * unit).all()
