"""The regularization term lambda * sigma * u v^T, at the scale the gradient has."""

import warnings

import torch
from torch import Tensor

from snr_hooks.checks import STRENGTH, checked_strength
from snr_hooks.discovery import Target
from snr_hooks.estimators import Estimator, Term
from snr_hooks.sharding import local


class SpectralTerm:
    """Adds the gradient of (lambda / 2) * sigma^2, the penalty of the paper (section 3).

    Args:
        optimizer: Holds lambda in its param groups. They are read anew for every term, so
            that lambda can be scheduled like a learning rate.
        estimator: Where sigma, u and v come from.
        default: lambda for groups that do not name one.
        scaler: The loss scaler whose scale the gradients carry, if any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        default: float,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.estimator = estimator
        self.scaler = scaler
        self.default = default
        self.targets: tuple[Target, ...] = ()
        self.removed = False
        self._optimizer = optimizer
        self._terms: dict[str, tuple[tuple[int, int], Term]] = {}
        self._group_of: dict[int, int] = {}
        self.regrouped = False
        """Whether parameters have come or gone since this was last set to False."""
        self.index_groups()

    def index_groups(self) -> None:
        """Look up which param group holds which parameter; note whether others are held."""
        before = self._group_of.keys()
        self._group_of = {
            id(parameter): i
            for i, group in enumerate(self._optimizer.param_groups)
            for parameter in group["params"]
        }
        self.regrouped |= self._group_of.keys() != before

    def holds(self, parameter: Tensor) -> bool:
        """Return whether the optimizer updates the parameter."""
        return id(parameter) in self._group_of

    def strength(self, parameter: Tensor) -> float:
        """Return the current lambda of a parameter, 0 if no group holds it any more.

        Raises:
            TypeError: Its param group's lambda is not a number.
            ValueError: It is negative or not finite.
        """
        index = self._group_of.get(id(parameter))
        if index is None:
            return 0.0
        group = self._optimizer.param_groups[index]
        return checked_strength(group.get(STRENGTH, self.default), f"{STRENGTH} of group {index}")

    def add(self, target: Target, grad: Tensor) -> None:
        """Add the term to the gradient in place; nothing is computed where lambda is 0."""
        strength = self.strength(target.parameter)
        if strength == 0:
            return
        term = self._current(target)
        factor = self._direction(target.parameter) * strength * term.sigma
        if self.scaler is not None:
            factor = factor * self._scale(self.scaler, grad.device).double()
        if grad.dtype is torch.float16:
            _warn_of_underflow(target, term, factor)
        term.add(grad, factor)

    def _direction(self, parameter: Tensor) -> float:
        """Return -1 for a group that maximizes, whose optimizer ascends along gradients.

        Sigma is to shrink there too, as a weight does under weight decay.
        """
        group = self._optimizer.param_groups[self._group_of[id(parameter)]]
        return -1.0 if group.get("maximize") else 1.0

    def outdate(self) -> None:
        """Compute the terms anew when one is asked for next."""
        self._terms.clear()

    def _current(self, target: Target) -> Term:
        """Return the term of a weight as it is now.

        The first weight of a step to ask has the terms of all computed, because together they
        cost less than one by one. A weight that was written to since then has them computed
        again.
        """
        known = self._terms.get(target.name)
        if known is None or known[0] != _written(target.parameter):
            active = [t for t in self.targets if self._is_due(t, asked=target)]
            terms = self.estimator.advance(active)
            self._terms = {
                t.name: (_written(t.parameter), term) for t, term in zip(active, terms, strict=True)
            }
            known = self._terms[target.name]
        return known[1]

    def _is_due(self, target: Target, *, asked: Target) -> bool:
        if target is asked:
            return True
        return target.parameter.requires_grad and self.strength(target.parameter) > 0

    @staticmethod
    def _scale(scaler: torch.amp.GradScaler, device: torch.device) -> Tensor:
        if scaler.is_enabled() and scaler._scale is None:
            raise RuntimeError(
                "expected the loss to be scaled by the scaler that was passed, found a scaler "
                "that never scaled one: the term would be far too large; call "
                "scaler.scale(loss).backward(), or wrap without scaler="
            )
        # The public way to read the scale without a host synchronization.
        return scaler.scale(torch.ones((), device=device))


def _warn_of_underflow(target: Target, term: Term, factor: float | Tensor) -> None:
    """Say so if nothing of a term is left in a float16 gradient.

    Reading the largest entry waits for the device; gradients of other dtypes are spared it.
    """
    largest = abs(float(factor)) * float(term.u.abs().max() * term.v.abs().max())
    if 0 < largest < 2**-25:  # half the smallest float16, rounded to zero
        warnings.warn(
            f"the term of {target.name!r} underflows: its largest entry is {largest:.2g}, and "
            "float16 gradients have none below 6e-8, so that the weight is not regularized: "
            "scale the loss and pass scaler=, or train in bfloat16 or with float32 weights under "
            "autocast",
            stacklevel=2,
        )


def _written(parameter: Tensor) -> tuple[int, int]:
    """Return what changes when a weight is written to, or its memory exchanged (``p.data =``)."""
    return parameter._version, local(parameter).data_ptr()
