"""Two ways to get (sigma, u, v) of a target: power iteration with a warm start, and SVD.

An estimator knows targets and their views, but no gradients, hooks or optimizers.
"""

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, Self

import torch
from torch import Tensor

from snr_hooks.discovery import Target
from snr_hooks.power_iteration import SingularTriplet, power_iteration, starting_vector

WARM_UP = 15
"""Iterations the first time a weight is needed, when its vector is still random."""


class Estimator(Protocol):
    """What the optimizer needs of an estimator."""

    def advance(self, target: Target) -> SingularTriplet:
        """Return the triplet for the next term, and keep what the one after needs."""

    def peek(self, target: Target) -> SingularTriplet:
        """Return the triplet that ``advance`` would return, and change nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return, by parameter name, what a run needs to continue bitwise the same."""

    def restored(self, state: Mapping[str, Tensor], targets: Iterable[Target]) -> Self:
        """Return an estimator in a saved state; raise ValueError if it does not fit."""


class PowerIteration:
    """Power iteration that starts where it ended in the step before (paper, section 3).

    A weight moves little in a step, so an iteration a step keeps up. The first time a
    weight is needed, its random vector gets ``WARM_UP`` iterations; not at construction,
    because weights are often loaded after the optimizer is built.

    Args:
        n_iterations: Iterations a step, at least 1.
        seed: Seed of the starting vectors.
        vectors: Right vectors to continue from, by parameter name.
    """

    def __init__(
        self, n_iterations: int, seed: int, vectors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.n_iterations = n_iterations
        self.seed = seed
        self.vectors = dict(vectors or {})

    def advance(self, target: Target) -> SingularTriplet:
        """Return the triplet for the next term, and keep v for the one after."""
        triplet = self.peek(target)
        self.vectors[target.name] = triplet.v
        return triplet

    def peek(self, target: Target) -> SingularTriplet:
        """Return the triplet that ``advance`` would return, and change nothing."""
        view = target.view
        weight = target.parameter.detach()
        # Half precision is too coarse for an iteration that feeds on its own result.
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        v, n_iterations = self.vectors.get(target.name), self.n_iterations
        if v is None:
            v = starting_vector(view.shape(weight)[1], self.seed, target.name)
            n_iterations = max(WARM_UP, n_iterations)
        with _without_autocast(weight.device.type):
            return power_iteration(
                lambda v: view.matvec(weight, v),
                lambda u: view.rmatvec(weight, u),
                v.to(weight.device, weight.dtype),
                n_iterations,
            )

    def __repr__(self) -> str:
        return f"{self.n_iterations} power iteration{'s'[: self.n_iterations > 1]} a step"

    def state_dict(self) -> dict[str, Tensor]:
        """Return v, shape ``(n,)``, of each weight needed so far."""
        return dict(self.vectors)

    def restored(self, state: Mapping[str, Tensor], targets: Iterable[Target]) -> Self:
        """Return an estimator that continues from saved vectors.

        A target without one starts from the seed, as it would have in the saved run.

        Args:
            state: From ``state_dict()``.
            targets: The weights that will be asked for.

        Returns:
            A new estimator; this one is left alone.

        Raises:
            ValueError: A vector is of another shape, zero, or not finite.
        """
        lengths = {target.name: target.view.shape(target.parameter)[1] for target in targets}
        for name in lengths.keys() & state.keys():
            _check_vector(name, state[name], lengths[name])
        unknown = sorted(state.keys() - lengths.keys())
        if unknown:
            warnings.warn(
                f"the state dict has vectors of {len(unknown)} weights that are not "
                f"regularized here, the first {unknown[0]!r}; they are ignored and power "
                "iteration starts afresh for weights without a vector",
                stacklevel=3,
            )
        known = {name: state[name].detach().clone() for name in lengths if name in state}
        return type(self)(self.n_iterations, self.seed, known)


class ExactSVD:
    """The top triplet of ``torch.linalg.svd`` in float64: slow, exact, without state."""

    def advance(self, target: Target) -> SingularTriplet:
        """Return the top singular triplet."""
        return self.peek(target)

    def peek(self, target: Target) -> SingularTriplet:
        """Return the top singular triplet."""
        matrix = target.view.matrix(target.parameter.detach()).double()
        u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
        return SingularTriplet(sigma[0], u[:, 0], vh[0])

    def __repr__(self) -> str:
        return "torch.linalg.svd at every step"

    def state_dict(self) -> dict[str, Tensor]:
        """Return nothing: there is nothing to continue from."""
        return {}

    def restored(self, state: Mapping[str, Tensor], targets: Iterable[Target]) -> Self:
        """Return this estimator: saved vectors of power iteration do not matter to it."""
        return self


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Autocast is still active in a hook when backward() runs inside its block."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_vector(name: str, vector: object, length: int) -> None:
    expected = f"expected for {name!r} a finite non-zero vector of shape ({length},), found"
    remedy = "load a state dict of this model, or delete its 'snr_hooks' entry"
    if not isinstance(vector, Tensor):
        raise ValueError(f"{expected} a {type(vector).__name__}; {remedy}")
    if vector.shape != (length,):
        raise ValueError(f"{expected} shape {tuple(vector.shape)}; {remedy}")
    if not vector.isfinite().all() or not vector.any():
        raise ValueError(f"{expected} one that is zero or not finite; {remedy}")
