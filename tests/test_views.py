"""Views against a matrix that is built entry by entry."""

import pytest
import torch
from _oracles import as_matrix, from_matrix
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from snr_hooks.views import MatrixView

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=5).map(tuple)


@st.composite
def weights(draw):
    shape, seed = draw(shapes), draw(st.integers(0, 2**31))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    # Any memory layout: permute the storage, keep the logical shape.
    order = draw(st.permutations(range(len(shape))))
    inverse = [order.index(axis) for axis in range(len(shape))]
    return weight.permute(order).contiguous().permute(inverse)


@pytest.mark.parametrize("out_axis", [0, 1])
@given(weight=weights(), seed=st.integers(0, 2**31))
def test_products_and_term_equal_those_of_the_materialized_matrix(out_axis, weight, seed):
    view = MatrixView(out_axis)
    matrix = as_matrix(weight, transposed=out_axis == 1)
    m, n = matrix.shape
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(m, generator=generator, dtype=torch.float64)
    v = torch.randn(n, generator=generator, dtype=torch.float64)
    assert view.shape(weight) == (m, n)
    torch.testing.assert_close(view.matrix(weight), matrix)
    grad, strides = weight.clone(), weight.clone().stride()
    view.adder(weight, u, v)(grad, 2.0)
    view.adder(weight, u, v)(grad, torch.tensor(3.0, dtype=torch.float64))
    expected = weight + 5 * from_matrix(torch.outer(u, v), weight, transposed=out_axis == 1)
    torch.testing.assert_close(grad, expected)
    assert grad.stride() == strides


@st.composite
def large_weights(draw):
    """Also weights that are cut into pieces, and sizes that pieces do not fit."""
    shape = draw(
        st.one_of(
            shapes,
            st.tuples(st.sampled_from([64, 65, 120]), st.sampled_from([300, 301, 1600])),
            st.tuples(st.sampled_from([32, 34]), st.sampled_from([64, 65]), st.just(3), st.just(3)),
        )
    )
    channels_last = len(shape) == 4 and draw(st.booleans())
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    format_ = torch.channels_last if channels_last else torch.contiguous_format
    return weight.double().contiguous(memory_format=format_)


@pytest.mark.parametrize("out_axis", [0, 1])
@given(weight=st.one_of(weights(), large_weights()), k=st.sampled_from([1, 2, 3, 4, 8]))
def test_prepared_products_equal_those_of_the_materialized_matrix(out_axis, weight, k):
    view = MatrixView(out_axis)
    m, n = view.shape(weight)
    v, u = torch.randn(k, n, dtype=torch.float64), torch.randn(k, m, dtype=torch.float64)
    # Parts of longer rows, where the vectors of all weights are.
    tensors = v, u, torch.full_like(u, torch.nan), torch.full_like(v, torch.nan)
    v, u, out, back = (functional.pad(rows, (2, 1))[:, 2:-1] for rows in tensors)
    product, transposed = view.matvec(weight, v, out), view.rmatvec(weight, u, back)
    for _ in range(2):
        matrix = as_matrix(weight, transposed=out_axis == 1)
        product()
        transposed()
        torch.testing.assert_close(out, v @ matrix.T)
        torch.testing.assert_close(back, u @ matrix)
        for tensor in (weight, v, u):  # prepared once, computed from what is there now
            tensor.mul_(-0.5)


@pytest.mark.parametrize("k", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("shape", [(1024, 1024), (1000, 1056), (1009, 1040), (240, 512, 3, 3)])
def test_products_with_a_large_matrix_equal_those_in_double_precision(shape, k):
    weight = torch.randn(shape)
    if len(shape) == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    view = MatrixView()
    matrix = weight.double().flatten(1)
    m, n = matrix.shape
    v, u = torch.randn(k, n + 1)[:, 1:], torch.randn(k, m + 1)[:, 1:]
    out, back = torch.full((k, m + 2), torch.nan)[:, :-2], torch.full((k, n + 2), torch.nan)[:, :-2]
    view.matvec(weight, v, out)()
    view.rmatvec(weight, u, back)()
    torch.testing.assert_close(out.double(), v.double() @ matrix.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(back.double(), u.double() @ matrix, rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_precision_weights_are_taken_in_the_dtype_of_the_vectors(dtype):
    weight, v, u = torch.randn(40, 60).to(dtype), torch.randn(2, 60), torch.randn(2, 40)
    out, back = torch.empty(2, 40), torch.empty(2, 60)
    MatrixView().matvec(weight, v, out)()
    MatrixView().rmatvec(weight, u, back)()
    torch.testing.assert_close(out, v @ weight.float().T)
    torch.testing.assert_close(back, u @ weight.float())


def test_a_channels_last_weight_is_not_copied():
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    matrix, _, _ = MatrixView()._in_memory(weight)
    assert matrix.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_term_is_rounded_once_into_a_half_precision_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(40, 60, generator=generator).to(dtype)
    u, v = torch.randn(40, generator=generator), torch.randn(60, generator=generator)
    expected = (grad.double() + torch.outer(u.double(), v.double())).to(dtype)
    MatrixView().adder(grad, u, v)(grad, 1.0)
    torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "out_axis"),
    [
        (torch.nn.Linear(5, 3), 0),
        (torch.nn.Conv1d(4, 6, 3, groups=2), 0),
        (torch.nn.Conv2d(4, 6, 3), 0),
        (torch.nn.Conv3d(4, 6, 2), 0),
        (torch.nn.ConvTranspose1d(4, 6, 3), 1),
        (torch.nn.ConvTranspose2d(4, 6, 3), 1),
        (torch.nn.ConvTranspose3d(4, 6, 2), 1),
    ],
)
def test_the_matrix_is_the_one_of_torchs_own_spectral_norm(layer, out_axis):
    torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    weight = layer.weight.detach().double()
    view = MatrixView(out_axis)
    sigma = torch.linalg.matrix_norm(view.matrix(weight), 2)
    layer = layer.double()
    torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500)
    torch.testing.assert_close(layer.weight.detach() * sigma, weight)
    m, n = view.shape(weight)
    assert view.describe(weight).startswith(f"{m} x {n} matrix")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_term_with_a_tensor_as_factor_is_rounded_once_too(dtype):
    grad, u, v = torch.randn(40, 60).to(dtype), torch.randn(40), torch.randn(60)
    expected = (grad.double() + 0.75 * torch.outer(u.double(), v.double())).to(dtype)
    MatrixView().adder(grad, u, v)(grad, torch.tensor(0.75, dtype=torch.float64))
    assert torch.equal(grad, expected)
