"""Properties of subspace iteration against exact SVD, drawn by Hypothesis."""

import itertools
import math

import pytest
import torch
from _oracles import SlowSubspace, matrix_with
from hypothesis import assume, given
from hypothesis import strategies as st

from snr_hooks import SNROptimizer
from snr_hooks.ritz import jacobi, rayleigh_ritz
from snr_hooks.rows import Rows, signs
from snr_hooks.subspace import Subspaces, starting_vectors
from snr_hooks.views import MatrixView

DTYPES = (torch.float32, torch.float64)
shapes = st.tuples(st.integers(1, 64), st.integers(1, 200))
scales = st.integers(-30, 30).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**31)
counts = st.sampled_from([1, 2, 3, 4, 5, 8])


@st.composite
def matrices(draw):
    """Dense, rank-deficient or repeated-sigma matrices of any scale, in both dtypes."""
    m, n = draw(shapes)
    seed, scale, dtype = draw(seeds), draw(scales), draw(st.sampled_from(DTYPES))
    rank = draw(st.integers(1, min(m, n)))
    values = draw(st.lists(st.floats(0.01, 1), min_size=rank, max_size=rank))
    return (matrix_with(values, m, n, seed) * scale).to(dtype), seed


def start(matrices_, k, seed=0, vectors=None):
    """Vectors of several matrices before their first step."""
    right, left = [], []
    for matrix in matrices_:
        m, n = matrix.shape
        right.append(starting_vectors(k, n, seed, "weight").to(matrix))
        kept = starting_vectors(k // 2, m, seed, "left").to(matrix)
        left.append(torch.cat([kept.new_zeros(k - k // 2, m), kept]))
    return Subspaces(vectors or right, left, next_is_right=True)


def step(subspaces, matrices_, weights=None):
    """One step, of all or of some; sigma, u and v of each matrix."""
    product = MatrixView().matvec if subspaces.next_is_right else MatrixView().rmatvec
    right = subspaces.next_is_right
    subspaces.reserve()
    for matrix, *tensors in zip(matrices_, *subspaces.multiplied(right=right), strict=True):
        product(matrix, *tensors)()
    subspaces.step(None if weights is None else subspaces.some(weights))
    sigmas = subspaces.sigma[:, 0]
    left, right = ([vectors[0] for vectors in side] for side in subspaces.pairs[right])
    return list(zip(sigmas, left, right, strict=True))


def iterate(matrix, n_products, k=4, seed=0, subspaces=None):
    """sigma, u and v after some products with one matrix."""
    subspaces = subspaces or start([matrix], min(k, *matrix.shape), seed)
    for _ in range(n_products):
        [triplet] = step(subspaces, [matrix])
    return triplet


def top(matrix):
    return torch.linalg.svdvals(matrix.double())[0].item()


def rounding(matrix):
    """Relative rounding error to allow in a product with the matrix."""
    return sum(matrix.shape) * torch.finfo(matrix.dtype).eps


@given(matrices(), counts, st.integers(1, 20))
def test_never_exceeds_sigma_1(drawn, k, n_products):
    matrix, seed = drawn
    sigma = iterate(matrix, n_products, k, seed)[0].item()
    assert 0 < sigma <= top(matrix) * (1 + rounding(matrix))


@given(matrices(), counts)
def test_does_not_decrease_on_a_fixed_matrix(drawn, k):
    matrix, seed = drawn
    subspaces = start([matrix], min(k, *matrix.shape), seed)
    sigmas = []
    for _ in range(20):
        subspaces.lean()
        sigmas.append(step(subspaces, [matrix])[0][0].item())
    assert max(sigmas) <= top(matrix) * (1 + rounding(matrix))
    for before, after in itertools.pairwise(sigmas):
        # Whitening takes up to a millionth of directions that almost coincide.
        assert after >= before * (1 - rounding(matrix) - 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e17])
def test_rank_deficient_matrices_do_not_break_the_iteration(dtype, scale):
    """Vectors that coincide, or whose images are noise, once gave NaN or a sigma of 1e150."""
    for seed in range(60):
        m, n, rank = 3 + seed % 7, 3 + seed % 5, 1 + seed % 3
        matrix = (matrix_with([0.9**i for i in range(rank)], m, n, seed) * scale).to(dtype)
        for k in (2, 3, 4, 8):
            subspaces = start([matrix], min(k, m, n), seed)
            sigmas = [step(subspaces, [matrix])[0][0].item() for _ in range(25)]
            assert max(sigmas) <= top(matrix) * (1 + rounding(matrix))
            assert sigmas[-1] == pytest.approx(top(matrix), rel=1e-3)


@given(shapes, seeds, st.floats(0.1, 0.9), st.integers(1, 24))
def test_a_single_vector_converges_at_the_rate_of_the_gap(shape, seed, ratio, n_products):
    m, n = shape
    matrix = matrix_with([1.0] + [ratio] * (min(m, n) - 1), m, n, seed)
    _, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    v = starting_vectors(1, n, seed, "weight")[0]
    # With every product the part of the vector outside v_1, or u_1, shrinks by the ratio
    # against the part along it; sigma is the length of the next image.
    along = abs(float(vh[0] @ v))
    within, beyond = (vh[1:] @ v).norm().item(), (v - vh.T @ (vh @ v)).norm().item()
    tangent = within / along * ratio ** (n_products - 1)
    lost = beyond / along if n_products == 1 else 0.0  # the null space, until the first image
    expected = math.sqrt((1 + (ratio * tangent) ** 2) / (1 + tangent**2 + lost**2))
    assert iterate(matrix, n_products, 1, seed)[0].item() == pytest.approx(expected, rel=1e-9)


def test_more_vectors_converge_faster_on_average():
    matrices_ = [matrix_with([0.97**i for i in range(40)], 40, 60, seed) for seed in range(20)]
    errors = []
    for k in (1, 2, 4, 8):
        subspaces = start(matrices_, k)
        for _ in range(12):
            found = step(subspaces, matrices_)
        errors.append(1 - sum(sigma.item() for sigma, _, _ in found) / len(found))
    for fewer, more in itertools.pairwise(errors):
        assert more < 0.7 * fewer


@given(
    st.lists(st.tuples(st.integers(20, 40), st.integers(20, 60)), min_size=1, max_size=6),
    seeds,
    counts,
    st.floats(0.1, 0.5),
)
def test_equals_the_slow_twin_while_the_matrices_move(shapes_, seed, k, drift):
    generator = torch.Generator().manual_seed(seed)

    def noise(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [noise(shape) for shape in shapes_]
    subspaces = start(weights, k, seed)
    twins = [
        SlowSubspace(right, left[k - k // 2 :])
        for right, left in zip(subspaces.right.each, subspaces.left.each, strict=True)
    ]
    for _ in range(8):
        subspaces.lean()
        for twin in twins:
            twin.lean()
        found = step(subspaces, weights)
        for weight, twin, (sigma, u, v) in zip(weights, twins, found, strict=True):
            expected_sigma, expected_u, expected_v = twin.step(weight)
            assume(twin.independent)
            assert sigma.item() == pytest.approx(expected_sigma, rel=1e-4)
            expected = torch.outer(expected_u, expected_v)
            torch.testing.assert_close(torch.outer(u, v), expected, rtol=0, atol=0.02)
        weights = [weight + drift * noise(weight.shape) for weight in weights]


@given(matrices(), counts, st.integers(-4, 4))
def test_scaling_the_matrix_scales_sigma(drawn, k, exponent):
    matrix, seed = drawn
    factor = 2.0**exponent  # exact, so nothing but sigma may change
    sigma, u, v = iterate(matrix, 3, k, seed)
    scaled_sigma, scaled_u, scaled_v = iterate(matrix * factor, 3, k, seed)
    assert scaled_sigma.item() == pytest.approx(sigma.item() * factor, rel=1e-6)
    torch.testing.assert_close(torch.outer(scaled_u, scaled_v), torch.outer(u, v))


@pytest.mark.slow
@given(shapes, seeds, counts)
def test_transposes_and_orthogonal_transforms_leave_the_converged_sigma(shape, seed, k):
    m, n = shape
    values = [0.7**i for i in range(min(m, n))]
    matrix = matrix_with(values, m, n, seed)
    rotation = matrix_with([1.0] * m, m, m, seed + 1)
    reflection = matrix_with([1.0] * n, n, n, seed + 2)
    for variant in (matrix, matrix.T, rotation @ matrix, matrix @ reflection):
        # So many iterations that a start almost orthogonal to v_1 does not show.
        assert iterate(variant, 100, k, seed)[0].item() == pytest.approx(1.0, rel=1e-9)


@given(matrices(), counts, st.integers(1, 9))
def test_the_term_is_the_exact_gradient_of_half_the_squared_bound(drawn, k, n_products):
    matrix, seed = drawn
    sigma, u, v = iterate(matrix, n_products, k, seed)
    tolerance = 10 * rounding(matrix)
    assert u.norm().item() == pytest.approx(1, rel=tolerance)
    assert v.norm().item() == pytest.approx(1, rel=tolerance)
    # |W v|^2 / 2 with v held has gradient W v v^T, |W^T u|^2 / 2 has u u^T W; in units of sigma.
    scaled = matrix.double() / sigma
    if n_products % 2:
        residual = (scaled @ v.double() - u).norm().item()
    else:
        residual = (u.double() @ scaled - v).norm().item()
    assert residual <= tolerance * top(matrix) / sigma.item()


@given(st.integers(2, 64), st.integers(2, 200), seeds, counts)
def test_repeated_sigma_1_gives_a_pair_in_the_top_subspace(m, n, seed, k):
    rank = min(m, n)
    multiplicity = max(2, rank // 2)
    matrix = matrix_with([1.0] * multiplicity + [0.5] * (rank - multiplicity), m, n, seed)
    sigma, u, v = iterate(matrix, 100, k, seed)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    assert sigma.item() == pytest.approx(1.0, rel=1e-9)
    assert (left[:, :multiplicity].T @ u).norm().item() == pytest.approx(1.0, rel=1e-6)
    assert (right[:multiplicity] @ v).norm().item() == pytest.approx(1.0, rel=1e-6)
    torch.testing.assert_close(matrix @ v, u, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=shapes, seed=seeds, scale=scales, k=counts)
def test_the_zero_matrix_gives_zero_and_recovers(dtype, shape, seed, scale, k):
    m, n = shape
    zero = torch.zeros(m, n, dtype=dtype)
    subspaces = start([zero], min(k, m, n), seed)
    sigma, u, v = iterate(zero, 3, k, seed, subspaces)
    assert sigma == 0
    assert torch.outer(u, v).isfinite().all()
    matrix = (matrix_with([0.5**i for i in range(min(m, n))], m, n, seed) * scale).to(dtype)
    recovered = iterate(matrix, 200, k, seed, subspaces)[0].item()
    assert recovered == pytest.approx(top(matrix), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed_vectors_keep_sigma_a_lower_bound(dtype):
    matrix = 2 * torch.eye(9, dtype=dtype)
    for k in (1, 2, 4):
        subspaces = start([matrix], k)
        step(subspaces, [matrix * 0])
        [(sigma, u, _)] = step(subspaces, [matrix])
        assert sigma.item() <= 2 * (1 + 4 * torch.finfo(dtype).eps)
        assert u.norm().item() == pytest.approx(1, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_recovers_from_vectors_that_the_new_matrix_annihilates(k):
    matrix = torch.zeros(3, 4)
    matrix[1, 3] = 2.0
    subspaces = start([matrix], k, vectors=[torch.eye(4)[:k]])
    assert iterate(matrix, 6, subspaces=subspaces)[0] == pytest.approx(2)


@pytest.mark.parametrize("k", [2, 3])
@pytest.mark.parametrize("apart", [0, 1e-7, 1e-6])
@pytest.mark.parametrize("length", [1e-10, 1.0, 10.0])
def test_vectors_that_almost_coincide_give_a_lower_bound(k, apart, length):
    """No iteration leaves such vectors behind, but a state dict may bring them."""
    generator = torch.Generator().manual_seed(k)
    for _ in range(5):
        matrix = torch.randn(7, 9, generator=generator)
        vector = length * torch.nn.functional.normalize(torch.randn(9, generator=generator), dim=0)
        vectors = vector * (1 + apart * torch.randn(k, 9, generator=generator))
        subspaces = start([matrix], k, vectors=[vectors])
        sigmas = [step(subspaces, [matrix])[0][0].item() for _ in range(50)]
        assert max(sigmas) <= top(matrix) * (1 + rounding(matrix))
        assert sigmas[-1] == pytest.approx(top(matrix), rel=1e-2)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_that_is_not_finite_leaves_vectors_usable(bad, k):
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    subspaces = start([matrix], k)
    assert not iterate(matrix, 2, subspaces=subspaces)[0].isfinite()
    assert iterate(2 * torch.eye(3), 4, subspaces=subspaces)[0] == pytest.approx(2)


@given(st.lists(shapes, min_size=1, max_size=8), seeds, counts)
def test_matrices_are_independent_of_what_they_are_stacked_with(shapes_, seed, k):
    k = min(k, *itertools.chain(*shapes_))
    weights = [matrix_with([0.9**i for i in range(min(s))], *s, seed) for s in shapes_]
    together = start(weights, k, seed)
    alone = [start([weight], k, seed) for weight in weights]
    for _ in range(4):
        found = step(together, weights)
        for weight, subspaces, (sigma, u, v) in zip(weights, alone, found, strict=True):
            [(own_sigma, own_u, own_v)] = step(subspaces, [weight])
            assert u.shape == (weight.shape[0],)
            assert v.shape == (weight.shape[1],)
            assert sigma.item() == pytest.approx(own_sigma.item(), rel=1e-9)
            torch.testing.assert_close(torch.outer(u, v), torch.outer(own_u, own_v))


lengths = st.tuples(st.integers(1, 300), st.one_of(st.none(), st.integers(1, 5)))


@given(st.lists(lengths, min_size=1, max_size=6), counts, seeds)
def test_rows_compute_for_every_map_what_is_computed_for_one(lengths_, k, seed):
    """Weights of all lengths, with blocks (a number of them) and without."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator)

    vectors = [noise(k, n) if b is None else noise(b, k, n) for n, b in lengths_]
    rows = Rows(vectors)
    entries = sum(vector.numel() for vector in vectors)
    assert rows.tensor.numel() <= 1.25 * entries
    maps = [m for vector in vectors for m in (vector if vector.ndim == 3 else vector[None])]
    expected = torch.stack([m.double() @ m.double().T for m in maps])
    torch.testing.assert_close(rows.gram(rows.tensor, rows.all), expected)
    h = k - k // 2
    factors = noise(len(maps), h, k)
    rows.combine(factors, rows.tensor, rows.images, rows.all)  # which are some of the vectors
    flat = iter(factors)
    for found, vector in zip(rows.parts(rows.images), vectors, strict=True):
        if vector.ndim == 2:
            torch.testing.assert_close(found, next(flat) @ vector)
        else:
            torch.testing.assert_close(found, torch.stack([next(flat) @ m for m in vector]))


@given(st.lists(lengths, min_size=1, max_size=6), counts, seeds, st.data())
def test_rows_of_some_maps_are_those_rows_of_all(lengths_, k, seed, data):
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.randn(*((b,) if b else ()), k, n, generator=generator) for n, b in lengths_]
    rows, changed = Rows(vectors), Rows(vectors)
    n_maps = len(rows.all.lengths)
    chosen = sorted(data.draw(st.sets(st.integers(0, n_maps - 1), min_size=1)))
    maps, some = torch.tensor(chosen), rows.some(torch.tensor(chosen))
    expected = rows.gram(rows.tensor, rows.all)[maps]
    torch.testing.assert_close(rows.gram(rows.tensor, some), expected)
    h = k - k // 2
    factors = torch.eye(h, k).expand(n_maps, h, k).clone()  # those of the others change nothing
    factors[maps] = torch.randn(len(maps), h, k, generator=generator)
    unknown = torch.rand(n_maps, h, generator=generator) < 0.3
    unknown &= torch.isin(torch.arange(n_maps), maps)[:, None]
    rows.combine(factors, rows.tensor, rows.images, rows.all)
    rows.fill(unknown, rows.all)
    changed.combine(factors[maps], changed.tensor, changed.images, some)
    changed.fill(unknown[maps], some)
    torch.testing.assert_close(changed.tensor, rows.tensor)


def steps_until_found(k, leaning):
    """Steps until a direction is found that no vector has a part in, once it is the largest.

    Rounding finds it, too, but not in sixty steps.
    """
    values = torch.linspace(1, 0.5, 10, dtype=torch.float64)
    matrix = torch.zeros(10, 15, dtype=torch.float64)
    matrix.fill_diagonal_(1).mul_(values[:, None])
    subspaces = start([matrix], k, vectors=[torch.eye(15, dtype=torch.float64)[:k]])
    for _ in range(6):
        step(subspaces, [matrix])
    matrix[-1, 9] = 1.05
    for n_steps in range(1, 60):
        if leaning:
            subspaces.lean()
        if step(subspaces, [matrix])[0][0].item() > 1.0499:
            return n_steps
    return None


@pytest.mark.parametrize("k", [3, 5])
def test_leaning_finds_a_direction_that_no_vector_has_a_part_in(k):
    assert steps_until_found(k, leaning=False) is None
    assert steps_until_found(k, leaning=True) < 40


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_a_single_image_and_one_that_is_kept_do_not_lean(k):
    matrix = matrix_with([0.9**i for i in range(10)], 10, 15, 0)
    subspaces = start([matrix], k)
    before = subspaces.right.tensor.clone()
    subspaces.lean()
    assert torch.equal(subspaces.right.tensor, before)


def test_what_leans_is_the_last_image_of_the_side_that_is_multiplied_next():
    matrices_ = [matrix_with([0.9**i for i in range(6)], 6, n, n) for n in (7, 200)]
    subspaces = start(matrices_, 5)
    for right in (True, False):
        here, there = subspaces.right, subspaces.left
        if not right:
            here, there = there, here
        before, beside = [part.clone() for part in here.each], there.tensor.clone()
        subspaces.lean()
        assert torch.equal(there.tensor, beside)
        for old, new in zip(before, here.each, strict=True):
            assert torch.equal(new[[0, 1, 3, 4]], old[[0, 1, 3, 4]])
            assert (new[2] - old[2]).norm().item() == pytest.approx(0.05, rel=1e-2)
        step(subspaces, matrices_)


def test_every_block_leans():
    subspaces = Subspaces([torch.randn(4, 3, 12)], [torch.randn(4, 3, 9)], next_is_right=True)
    before = subspaces.right.each[0].clone()
    subspaces.lean()
    moved = (subspaces.right.each[0] - before).norm(dim=-1)
    expected = torch.tensor([0, 0.05, 0]).expand(4, 3)
    torch.testing.assert_close(moved, expected, rtol=1e-2, atol=1e-7)


def test_a_step_of_some_weights_leaves_the_others_alone():
    matrices_ = [matrix_with([0.99**i for i in range(20)], 20, 30, seed) for seed in range(4)]
    subspaces, alone = start(matrices_, 4), start(matrices_[1:3], 4)
    for _ in range(3):
        step(subspaces, matrices_)
        expected = step(alone, matrices_[1:3])
    others = [[side.each[i].clone() for i in (0, 3)] for side in (subspaces.right, subspaces.left)]
    for _ in range(2):
        found = step(subspaces, matrices_, [1, 2])
        expected = step(alone, matrices_[1:3])
    for kept, side in zip(others, (subspaces.right, subspaces.left), strict=True):
        assert all(torch.equal(old, side.each[i]) for old, i in zip(kept, (0, 3), strict=True))
    for (sigma, u, v), (own_sigma, own_u, own_v) in zip(found[1:3], expected, strict=True):
        assert sigma.item() == pytest.approx(own_sigma.item(), rel=1e-12)
        torch.testing.assert_close(torch.outer(u, v), torch.outer(own_u, own_v))


def test_rising_weights_are_those_of_a_rising_map():
    right = [torch.randn(4, 12), torch.randn(3, 4, 9), torch.randn(4, 10)]
    left = [torch.randn(4, 7), torch.randn(3, 4, 8), torch.randn(4, 6)]
    subspaces = Subspaces(right, left, next_is_right=True)
    subspaces.sigma = torch.tensor([1.0, 1.0, 1.002, 1.0, 1.0]).double()[:, None].repeat(1, 2)
    subspaces._before = torch.ones(5, dtype=torch.float64)
    assert subspaces.rising(0.01) == []
    assert subspaces.rising(0.001) == [1]
    subspaces.some([1])
    assert subspaces.rising(0.001) == []  # since then
    subspaces.sigma = torch.full((5, 2), math.nan, dtype=torch.float64)
    assert subspaces.rising(0.0) == []


@pytest.mark.parametrize(
    ("sigma", "sound"), [(1.0, True), (0.0, False), (math.nan, False), (math.inf, False)]
)
def test_a_sigma_that_is_zero_or_not_finite_is_not_sound(sigma, sound):
    subspaces = start([torch.ones(6, 5), torch.ones(4, 8)], 3)
    subspaces.sigma = torch.tensor([[2.0], [sigma]], dtype=torch.float64)
    assert subspaces.is_sound() == sound


@given(st.integers(1, 9), seeds)
def test_jacobi_is_eigh(k, seed):
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(5, k, k, generator=generator, dtype=torch.float64)
    matrices_ = factors @ factors.mT
    matrices_[0] = torch.eye(k)
    values, vectors = jacobi(matrices_)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrices_))
    torch.testing.assert_close(matrices_ @ vectors, vectors * values[:, None])
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(k).double().expand_as(matrices_))


def test_an_accelerator_gets_the_same_from_jacobi(monkeypatch):
    matrix = matrix_with([0.9**i for i in range(20)], 20, 30, 0)
    expected = iterate(matrix, 6)
    monkeypatch.setattr("snr_hooks.ritz.symmetric_eigen", jacobi)
    for found, value in zip(iterate(matrix, 6), expected, strict=True):
        torch.testing.assert_close(found.abs(), value.abs())


@given(st.integers(1, 8), st.integers(8, 40), seeds)
def test_rayleigh_ritz_finds_the_best_vector_of_a_span(k, n, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(k, n, generator=generator, dtype=torch.float64)
    matrix = torch.randn(n, n, generator=generator, dtype=torch.float64)
    basis /= basis.norm(dim=1, keepdim=True)
    assume(torch.linalg.cond(basis) < 20)
    images = basis @ matrix.T
    ritz = rayleigh_ritz(
        (basis @ basis.T)[None], (images @ images.T)[None], k - k // 2, torch.float64
    )
    orthonormal, _ = torch.linalg.qr(basis.T)
    sigma = ritz.sigma[0, 0].item()
    assert sigma == pytest.approx(top(matrix @ orthonormal), rel=1e-3)
    x = ritz.best[0] @ basis
    torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)).double())
    assert (matrix @ x[0]).norm().item() == pytest.approx(sigma, rel=1e-9)


def test_directions_that_are_noise_stay_short():
    row = torch.randn(1, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = (row / row.norm()).repeat(3, 1)  # one direction, three times
    gram = (basis @ basis.T)[None]
    ritz = rayleigh_ritz(gram, 4 * gram, 2, torch.float32)
    assert ritz.sigma[0, 0].item() == pytest.approx(2, rel=1e-3)
    assert ritz.unknown.tolist() == [[False, True]]
    lengths = (ritz.best[0] @ basis).norm(dim=1)
    assert lengths[0].item() == pytest.approx(1, rel=1e-3)
    assert lengths[1] < 0.1


def test_starting_vectors_depend_on_seed_and_name_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    a = starting_vectors(3, 50, 0, "a")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, starting_vectors(3, 50, 0, "a"))
    assert not torch.equal(a, starting_vectors(3, 50, 0, "b"))
    assert not torch.equal(a, starting_vectors(3, 50, 1, "a"))
    torch.testing.assert_close(a @ a.T, torch.eye(3).double())


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000])
def test_fixed_vectors_are_independent(n):
    k = min(n, 4)
    assert torch.linalg.matrix_rank(signs(k, n)) == k


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


def test_weights_of_different_layers_start_from_different_vectors():
    vectors = starting_vectors(3, 50, 0, "0.weight")
    assert not torch.equal(vectors, starting_vectors(3, 50, 0, "2.weight"))


def test_directions_that_a_matrix_annihilates_are_unknown_in_double_precision_too():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.outer(*(torch.randn(n, generator=generator).double() for n in (9, 12)))
    basis = torch.linalg.qr(torch.randn(12, 3, generator=generator).double()).Q.T
    images = basis @ matrix.T
    ritz = rayleigh_ritz((basis @ basis.T)[None], (images @ images.T)[None], 2, torch.float64)
    assert ritz.unknown.tolist() == [[False, True]]
