"""Views against a matrix that is built entry by entry."""

import pytest
import torch
from _oracles import as_matrix, from_matrix
from hypothesis import given
from hypothesis import strategies as st

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
    torch.testing.assert_close(view.matvec(weight, v), matrix @ v)
    torch.testing.assert_close(view.rmatvec(weight, u), matrix.T @ u)
    grad, strides = weight.clone(), weight.clone().stride()
    view.add_outer_(grad, u, v)
    expected = weight + from_matrix(torch.outer(u, v), weight, transposed=out_axis == 1)
    torch.testing.assert_close(grad, expected)
    assert grad.stride() == strides


def test_products_take_vectors_in_rows():
    weight, vectors = torch.randn(3, 4, 2), torch.randn(5, 8)
    products = MatrixView().matvec(weight, vectors)
    torch.testing.assert_close(products, vectors @ weight.flatten(1).T)
    torch.testing.assert_close(MatrixView().rmatvec(weight, products), products @ weight.flatten(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_term_is_rounded_once_into_a_half_precision_gradient(dtype):
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(40, 60, generator=generator).to(dtype)
    u, v = torch.randn(40, generator=generator), torch.randn(60, generator=generator)
    expected = (grad.double() + torch.outer(u.double(), v.double())).to(dtype)
    MatrixView().add_outer_(grad, u, v)
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
    torch.nn.init.normal_(layer.weight)
    weight = layer.weight.detach().double()
    view = MatrixView(out_axis)
    sigma = torch.linalg.matrix_norm(view.matrix(weight), 2)
    layer = layer.double()
    torch.nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=500)
    torch.testing.assert_close(layer.weight.detach() * sigma, weight)
    m, n = view.shape(weight)
    assert view.describe(weight).startswith(f"{m} x {n} matrix")
