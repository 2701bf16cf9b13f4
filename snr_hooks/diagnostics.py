"""Read-only diagnostics: exact singular values, and how far estimates are from them.

Everything here works on a plain model as well as on an ``SNROptimizer``, costs an SVD a
weight, and changes nothing. Which norm is meant is said beside every number: of the weight as
a matrix unless ``choose``, or what was chosen for the optimizer, says otherwise. The operator
of a convolution is too large for an SVD but on small images; its largest singular value then
comes from iterating until it does not grow any more.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snr_hooks._text import dimensions, table
from snr_hooks.choices import Choose
from snr_hooks.discovery import Target, linear_maps
from snr_hooks.estimators import SubspaceIteration

_LARGEST_MATRIX = 2**20
"""Entries of a matrix up to which an operator is written out for its SVD."""


@runtime_checkable
class Regularized(Protocol):
    """What ``audit`` needs of an optimizer."""

    @property
    def targets(self) -> tuple[Target, ...]:
        """The weights to report on."""

    def spectral_norms(self) -> Mapping[str, float]:
        """Return the current estimates by parameter name."""


class AuditRow(NamedTuple):
    """One weight of an audit.

    Attributes:
        name: Name of the parameter.
        shape: Its shape.
        view: How it is seen as a matrix.
        estimate: The optimizer's estimate of sigma_1; None for a plain model.
        sigma: Exact sigma_1, the largest of all blocks, by SVD in float64; NaN for a weight
            that is not finite. Of an operator that is not written out, iterated until it hardly
            grows: a little below.
        error: (sigma - estimate) / sigma, not negative but for rounding; 0 for a zero
            matrix, None without an estimate.
        stable_rank: The squared Frobenius norm over the squared sigma, of all blocks together;
            None for an operator that is not written out.
    """

    name: str
    shape: tuple[int, ...]
    view: str
    estimate: float | None
    sigma: float
    error: float | None
    stable_rank: float | None = None


@dataclass(frozen=True)
class Audit:
    """The rows of an audit; iterable, and printable as a table."""

    rows: tuple[AuditRow, ...]

    def __iter__(self) -> Iterator[AuditRow]:
        """Iterate over the rows in the model's order."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.rows)

    def __str__(self) -> str:
        """Return the rows as a table in plain text."""
        header = (
            "parameter",
            "shape",
            "seen as",
            "estimate",
            "sigma_1",
            "rel. error",
            "stable rank",
        )
        cells = [
            (
                row.name,
                dimensions(row.shape),
                row.view,
                "-" if row.estimate is None else f"{row.estimate:.5g}",
                f"{row.sigma:.5g}",
                "-" if row.error is None else f"{row.error:.1e}",
                "-" if row.stable_rank is None else f"{row.stable_rank:.1f}",
            )
            for row in self.rows
        ]
        return table(header, cells)


def audit(model_or_optimizer: nn.Module | Regularized, choose: Choose = None) -> Audit:
    """Compare each weight's estimated with its exact spectral norm.

    Args:
        model_or_optimizer: An ``SNROptimizer``, to check its estimates; or a model, to
            see the norms of all its linear maps, frozen ones included.
        choose: How the weights of a model are seen; not with an optimizer, which says so itself.

    Returns:
        A row a weight; ``print`` shows a table.

    Raises:
        TypeError: The argument is neither.
        ValueError: ``choose`` does not fit or comes with an optimizer, or an operator's input
            size is not known.
    """
    targets = _targets(model_or_optimizer, choose)
    estimates: Mapping[str, float] = {}
    if not isinstance(model_or_optimizer, nn.Module):
        estimates = model_or_optimizer.spectral_norms()
    return Audit(tuple(_row(target, estimates.get(target.name)) for target in targets))


def spectra(
    model_or_optimizer: nn.Module | Regularized, choose: Choose = None
) -> dict[str, Tensor]:
    """Compute all singular values of each linear map of a model, frozen ones included.

    Args:
        model_or_optimizer: Any module with values; or an ``SNROptimizer``, for the weights that
            it regularizes as it sees them.
        choose: How the weights of a model are seen; not with an optimizer, which says so itself.
            The singular values of blocks come together.

    Returns:
        By parameter name, the singular values in float64 on the CPU, in descending order; NaN
        for a weight that is not finite. Of an operator that is too large to be written out, the
        four largest, iterated until they hardly grow.

    Raises:
        TypeError: The first argument is neither.
        ValueError: ``choose`` does not fit or comes with an optimizer, or an operator's input
            size is not known.
    """
    targets = _targets(model_or_optimizer, choose)
    return {target.name: _singular_values(target) for target in targets}


def stable_rank(singular_values: Tensor) -> float:
    """Return the sum of squares over the largest square, at most the rank; 0 for a zero matrix.

    Args:
        singular_values: Shape ``(n,)``.

    Returns:
        The stable rank (Rudelson and Vershynin 2007, section 1).
    """
    squares = singular_values.double().square()
    return float(squares.sum() / squares.max()) if squares.max() != 0 else 0.0  # NaN stays NaN


class ComparisonRow(NamedTuple):
    """One weight of two models.

    Attributes:
        name: Name of the parameter.
        view: How it is seen.
        before: sigma_1 in the first model.
        after: sigma_1 in the second.
        rank_before: Stable rank in the first model, None where ``AuditRow`` has none.
        rank_after: Stable rank in the second.
    """

    name: str
    view: str
    before: float
    after: float
    rank_before: float | None
    rank_after: float | None


@dataclass(frozen=True)
class Comparison:
    """The rows of a comparison; iterable, and printable as a table."""

    rows: tuple[ComparisonRow, ...]

    def __iter__(self) -> Iterator[ComparisonRow]:
        """Iterate over the rows in the first model's order."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of weights."""
        return len(self.rows)

    def __str__(self) -> str:
        """Return the rows as a table in plain text."""
        header = ("parameter", "seen as", "sigma_1", "then", "ratio", "stable rank", "then")
        cells = [
            (
                row.name,
                row.view,
                f"{row.before:.5g}",
                f"{row.after:.5g}",
                f"{row.after / row.before:.3f}" if row.before else "-",
                "-" if row.rank_before is None else f"{row.rank_before:.1f}",
                "-" if row.rank_after is None else f"{row.rank_after:.1f}",
            )
            for row in self.rows
        ]
        return table(header, cells)


def compare(before: nn.Module, after: nn.Module, choose: Choose = None) -> Comparison:
    """Compare the spectral norms and stable ranks of two checkpoints of one model.

    Args:
        before: A model with the values of the first.
        after: One with those of the second.
        choose: How their weights are seen.

    Returns:
        A row a weight; ``print`` shows a table.

    Raises:
        ValueError: The models do not have the same weights, or ``choose`` does not fit.
    """
    first, second = audit(before, choose), audit(after, choose)
    weights = [
        [f"{row.name} ({dimensions(row.shape)})" for row in rows] for rows in (first, second)
    ]
    if weights[0] != weights[1]:
        other = set(weights[0]) ^ set(weights[1])
        raise ValueError(
            "expected two models with the same weights, found "
            f"{', '.join(sorted(other)[:3]) or 'another order'} in one of them only: build "
            "both by the same call, and load a checkpoint into each"
        )
    return Comparison(
        tuple(
            ComparisonRow(
                row.name,
                row.view,
                row.sigma,
                then.sigma,
                row.stable_rank,
                then.stable_rank,
            )
            for row, then in zip(first, second, strict=True)
        )
    )


def _targets(model_or_optimizer: nn.Module | Regularized, choose: Choose) -> Sequence[Target]:
    if isinstance(model_or_optimizer, nn.Module):
        return linear_maps(model_or_optimizer, choose)
    if not isinstance(model_or_optimizer, Regularized):
        raise TypeError(
            "expected a torch.nn.Module or an SNROptimizer, found "
            f"{type(model_or_optimizer).__name__}"
        )
    if choose is not None:
        raise ValueError(
            f"expected choose with a model only, found {choose!r} with an optimizer, whose weights "
            "are seen as was chosen for it: leave choose out, or pass the model"
        )
    return model_or_optimizer.targets


def _row(target: Target, estimate: float | None) -> AuditRow:
    weight, view = target.parameter, target.view.describe(target.parameter)
    values = _singular_values(target)
    sigma = float(values[0])
    rank = stable_rank(values) if is_written_out(target) else None
    error = None
    if estimate is not None:
        error = 0.0 if estimate == sigma else (sigma - estimate) / sigma if sigma else math.inf
    return AuditRow(target.name, tuple(weight.shape), view, estimate, sigma, error, rank)


def is_written_out(target: Target) -> bool:
    """Return whether the matrix is not much larger than the weight, or small: then an SVD is taken.

    Args:
        target: What is seen, the sizes of its inputs known.

    Returns:
        False for the operators of convolutions on large images.
    """
    entries = math.prod(target.view.shape(target.parameter))
    return entries <= max(4 * target.parameter.numel(), _LARGEST_MATRIX)


def _singular_values(target: Target) -> Tensor:
    if not is_written_out(target):
        return _converged(target)
    matrix = target.view.matrix(target.parameter.detach()).to("cpu", torch.float64)
    *batch, m, n = matrix.shape
    if not matrix.isfinite().all():
        return matrix.new_full((math.prod(batch) * min(m, n),), torch.nan)
    values: Tensor = torch.linalg.svdvals(matrix).flatten().sort(descending=True).values
    return values


def _converged(target: Target, tolerance: float = 1e-5) -> Tensor:
    """Return the four largest singular values of an operator, iterated until they hardly grow."""
    iteration = SubspaceIteration(n_products=20, n_vectors=8, tolerance=math.inf, seed=0)
    target = target._replace(top=4)
    sigma = last = torch.zeros(4, dtype=torch.float64, device="cpu")
    for _ in range(500):
        (term,) = iteration.advance([target])
        last, sigma = sigma, torch.as_tensor(term.sigma, device="cpu")
        if not (sigma - last > tolerance * sigma).any():  # also where it is not a number
            break
    return sigma
