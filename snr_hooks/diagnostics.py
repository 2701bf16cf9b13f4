"""Read-only diagnostics: exact singular values, and how far estimates are from them.

Everything here works on a plain model as well as on an ``SNROptimizer``, costs an SVD a
weight, and changes nothing. All norms are of the weight as a matrix (see ``views``), not of
a convolution as an operator on images.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from snr_hooks._text import dimensions, table
from snr_hooks.discovery import Target, linear_maps


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
        sigma: Exact sigma_1 of the matrix by SVD in float64; NaN for a weight that is
            not finite.
        error: (sigma - estimate) / sigma, not negative but for rounding; 0 for a zero
            matrix, None without an estimate.
    """

    name: str
    shape: tuple[int, ...]
    view: str
    estimate: float | None
    sigma: float
    error: float | None


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
        header = ("parameter", "shape", "seen as", "estimate", "sigma_1 (matrix)", "rel. error")
        cells = [
            (
                row.name,
                dimensions(row.shape),
                row.view,
                "-" if row.estimate is None else f"{row.estimate:.5g}",
                f"{row.sigma:.5g}",
                "-" if row.error is None else f"{row.error:.1e}",
            )
            for row in self.rows
        ]
        return table(header, cells)


def audit(model_or_optimizer: nn.Module | Regularized) -> Audit:
    """Compare each weight's estimated with its exact spectral norm.

    Args:
        model_or_optimizer: An ``SNROptimizer``, to check its estimates; or a model, to
            see the norms of all its linear maps, frozen ones included.

    Returns:
        A row a weight; ``print`` shows a table.

    Raises:
        TypeError: The argument is neither.
    """
    estimates: Mapping[str, float] = {}
    if isinstance(model_or_optimizer, nn.Module):
        targets = tuple(linear_maps(model_or_optimizer))
    elif isinstance(model_or_optimizer, Regularized):
        targets = model_or_optimizer.targets
        estimates = model_or_optimizer.spectral_norms()
    else:
        raise TypeError(
            "expected a torch.nn.Module or an SNROptimizer, found "
            f"{type(model_or_optimizer).__name__}"
        )
    return Audit(tuple(_row(target, estimates.get(target.name)) for target in targets))


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Compute all singular values of each linear map of a model, frozen ones included.

    Args:
        model: Any module with values.

    Returns:
        By parameter name, the singular values of its matrix in float64 on the CPU, in
        descending order; NaN for a weight that is not finite.
    """
    return {target.name: _singular_values(target) for target in linear_maps(model)}


def _row(target: Target, estimate: float | None) -> AuditRow:
    sigma = float(_singular_values(target)[0])
    error = None
    if estimate is not None:
        error = 0.0 if estimate == sigma else (sigma - estimate) / sigma if sigma else math.inf
    weight, view = target.parameter, target.view.describe(target.parameter)
    return AuditRow(target.name, tuple(weight.shape), view, estimate, sigma, error)


def _singular_values(target: Target) -> Tensor:
    matrix = target.view.matrix(target.parameter.detach()).to("cpu", torch.float64)
    if not matrix.isfinite().all():
        return torch.full((min(matrix.shape),), torch.nan, dtype=torch.float64)
    values: Tensor = torch.linalg.svdvals(matrix)
    return values
