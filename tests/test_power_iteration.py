"""Properties of power iteration against exact SVD, drawn by Hypothesis."""

import itertools
import math

import pytest
import torch
from _oracles import matrix_with
from hypothesis import given
from hypothesis import strategies as st

from snr_hooks import SNROptimizer
from snr_hooks.power_iteration import normalize, power_iteration, starting_vector

DTYPES = (torch.float32, torch.float64)
shapes = st.tuples(st.integers(1, 64), st.integers(1, 200))
scales = st.integers(-30, 30).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**31)


@st.composite
def matrices(draw):
    """Dense, rank-deficient or repeated-sigma matrices of any scale, in both dtypes."""
    m, n = draw(shapes)
    seed, scale, dtype = draw(seeds), draw(scales), draw(st.sampled_from(DTYPES))
    rank = draw(st.integers(1, min(m, n)))
    values = draw(st.lists(st.floats(0.01, 1), min_size=rank, max_size=rank))
    return (matrix_with(values, m, n, seed) * scale).to(dtype), seed


def iterate(matrix, n_iterations, seed=0, v=None):
    if v is None:
        v = starting_vector(matrix.shape[1], seed, "weight").to(matrix.dtype)
    return power_iteration(lambda v: matrix @ v, lambda u: u @ matrix, v, n_iterations)


def top(matrix):
    return torch.linalg.svdvals(matrix.double())[0].item()


def rounding(matrix):
    """Relative rounding error to allow in a product with the matrix."""
    return sum(matrix.shape) * torch.finfo(matrix.dtype).eps


@given(matrices(), st.integers(1, 20))
def test_never_exceeds_sigma_1(drawn, n_iterations):
    matrix, seed = drawn
    sigma = iterate(matrix, n_iterations, seed).sigma.double().item()
    assert 0 < sigma <= top(matrix) * (1 + rounding(matrix))


@given(matrices())
def test_does_not_decrease_on_a_fixed_matrix(drawn):
    matrix, seed = drawn
    sigmas, v = [], None
    for _ in range(10):
        triplet = iterate(matrix, 1, seed, v)
        sigmas.append(triplet.sigma.double().item())
        v = triplet.v
    for before, after in itertools.pairwise(sigmas):
        assert after >= before * (1 - rounding(matrix))


@given(shapes, seeds, st.floats(0.1, 0.9), st.integers(1, 12))
def test_converges_at_the_rate_of_the_gap(shape, seed, ratio, n_iterations):
    m, n = shape
    matrix = matrix_with([1.0] + [ratio] * (min(m, n) - 1), m, n, seed)
    _, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    v = starting_vector(n, seed, "weight")
    # After k full iterations the part of v outside v_1 has shrunk by ratio^(2k) against the
    # part along v_1; sigma = |W^T u| with u half an iteration further.
    along = abs(float(vh[0] @ v))
    within = (vh[1:] @ v).norm().item()
    tangent = within / along * ratio ** (2 * n_iterations - 1)
    expected = math.sqrt((1 + (ratio * tangent) ** 2) / (1 + tangent**2))
    assert iterate(matrix, n_iterations, seed).sigma.item() == pytest.approx(expected, rel=1e-9)


@given(matrices(), st.integers(-4, 4))
def test_scaling_the_matrix_scales_sigma(drawn, exponent):
    matrix, seed = drawn
    factor = 2.0**exponent  # exact, so nothing but sigma may change
    once, scaled = iterate(matrix, 3, seed), iterate(matrix * factor, 3, seed)
    assert scaled.sigma.item() == pytest.approx(once.sigma.item() * factor, rel=1e-6)
    torch.testing.assert_close(scaled.u, once.u)
    torch.testing.assert_close(scaled.v, once.v)


@given(shapes, seeds)
def test_transposes_and_orthogonal_transforms_leave_the_converged_sigma(shape, seed):
    m, n = shape
    values = [0.7**i for i in range(min(m, n))]
    matrix = matrix_with(values, m, n, seed)
    rotation = matrix_with([1.0] * m, m, m, seed + 1)
    reflection = matrix_with([1.0] * n, n, n, seed + 2)
    for variant in (matrix, matrix.T, rotation @ matrix, matrix @ reflection):
        # So many iterations that a start almost orthogonal to v_1 does not show.
        assert iterate(variant, 100, seed).sigma.item() == pytest.approx(1.0, rel=1e-9)


@given(matrices(), st.integers(1, 5))
def test_vectors_are_unit_and_belong_to_sigma(drawn, n_iterations):
    matrix, seed = drawn
    sigma, u, v = iterate(matrix, n_iterations, seed)
    tolerance = rounding(matrix)
    assert u.norm().item() == pytest.approx(1, rel=tolerance)
    assert v.norm().item() == pytest.approx(1, rel=tolerance)
    # In units of sigma: |W^T u - sigma v| = 0 and u^T W v = sigma.
    residual = (u @ (matrix / sigma) - v).norm().item()
    assert residual <= 10 * tolerance * top(matrix) / sigma.item()


@given(st.integers(2, 64), st.integers(2, 200), seeds)
def test_repeated_sigma_1_gives_a_pair_in_the_top_subspace(m, n, seed):
    rank = min(m, n)
    multiplicity = max(2, rank // 2)
    matrix = matrix_with([1.0] * multiplicity + [0.5] * (rank - multiplicity), m, n, seed)
    sigma, u, v = iterate(matrix, 100, seed)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert sigma.item() == pytest.approx(1.0, rel=1e-9)
    assert (left[:, :multiplicity].T @ u).norm().item() == pytest.approx(1.0, rel=1e-6)
    assert (right[:multiplicity] @ v).norm().item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(matrix @ v, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, seed=seeds, scale=scales)
def test_the_zero_matrix_gives_zero_and_recovers(dtype, shape, seed, scale):
    m, n = shape
    zero = torch.zeros(m, n, dtype=dtype)
    sigma, u, v = iterate(zero, 3, seed)
    assert sigma == 0
    assert (u == 0).all()
    assert v.norm().item() == pytest.approx(1, rel=1e-5)
    matrix = (matrix_with([0.5**i for i in range(min(m, n))], m, n, seed) * scale).to(dtype)
    recovered = iterate(matrix, 100, seed, v).sigma.double().item()
    assert recovered == pytest.approx(top(matrix), rel=1e-4)


def test_recovers_from_a_vector_that_the_new_matrix_annihilates():
    v = torch.tensor([1.0, 0, 0, 0])
    matrix = torch.zeros(3, 4)
    matrix[1, 3] = 2.0
    assert iterate(matrix, 5, v=v).sigma == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_leaves_v_usable(bad):
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    poisoned = iterate(matrix, 2)
    assert not poisoned.sigma.isfinite()
    assert iterate(2 * torch.eye(3), 1, v=poisoned.v).sigma == pytest.approx(2)


def test_leading_dimensions_are_independent_problems():
    batch = torch.stack([matrix_with([3.0, 1], 4, 5, 0), torch.zeros(4, 5).double()])
    v = starting_vector(5, 0, "weight").expand(2, 5)
    sigma, u, v = power_iteration(
        lambda v: (batch @ v.unsqueeze(-1)).squeeze(-1),
        lambda u: (u.unsqueeze(-2) @ batch).squeeze(-2),
        v,
        50,
    )
    assert sigma.tolist() == pytest.approx([3.0, 0.0])
    assert u.shape == (2, 4)
    assert v.shape == (2, 5)


@given(st.integers(1, 300), seeds, st.integers(-38, 38))
def test_normalize_at_every_scale(n, seed, exponent):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed)).clamp(-3, 3)
    x = (x.double() * 10.0**exponent).float()
    unit, norm = normalize(x)
    exact = x.double().norm().item()
    if exact > torch.finfo(torch.float32).tiny and exact < torch.finfo(torch.float32).max:
        assert norm.item() == pytest.approx(exact, rel=1e-5)
        assert unit.norm().item() == pytest.approx(1, rel=1e-5)


def test_starting_vectors_depend_on_seed_and_name_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    a = starting_vector(50, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, starting_vector(50, 0, "a"))
    assert not torch.equal(a, starting_vector(50, 0, "b"))
    assert not torch.equal(a, starting_vector(50, 1, "a"))


@given(matrices())
def test_the_term_is_rank_one_with_frobenius_norm_lambda_sigma(drawn):
    matrix, _ = drawn
    layer = torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, dtype=matrix.dtype)
    with torch.no_grad():
        layer.weight.copy_(matrix)
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, 0.5)
    sigma = opt.spectral_norms()["weight"]
    (layer.weight * 0).sum().backward()
    values = torch.linalg.svdvals(layer.weight.grad.double() / sigma)
    tolerance = 10 * rounding(matrix)
    assert values.norm().item() == pytest.approx(0.5, rel=tolerance)
    assert values[0].item() == pytest.approx(0.5, rel=tolerance)
