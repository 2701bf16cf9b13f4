"""The regularization term lambda * sigma * u v^T, at the scale the gradient has."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from snr_hooks.checks import STRENGTH, learning_rate
from snr_hooks.choices import Strength, checked_strength
from snr_hooks.discovery import Target
from snr_hooks.estimators import Estimator, Term
from snr_hooks.penalties import HALF_SQUARE
from snr_hooks.sharding import local
from snr_hooks.views import Adder

Written = tuple[int, int]
"""What changes when a weight is written to, or its memory exchanged (``p.data =``)."""

Prepared = tuple[Written, Adder, float | Tensor]
"""What the hook of a target needs: what of the weight the term was computed from, what adds a
multiple of u v^T to a gradient, and psi'(sigma)."""


class SpectralTerm:
    """Adds the gradient of (lambda / 2) * sigma^2, the penalty of the paper (section 3).

    Args:
        optimizer: Holds lambda in its param groups. They are read anew for every term, so
            that lambda can be scheduled like a learning rate.
        estimator: Where sigma, u and v come from.
        default: lambda for groups that do not name one; a number or a function of the step.
        scaler: The loss scaler whose scale the gradients carry, if any.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        estimator: Estimator,
        default: Strength,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.estimator = estimator
        self.scaler = scaler
        self.default = default
        self.targets: tuple[Target, ...] = ()
        self.removed = False
        self.n_steps = 0
        """How many steps were taken, for what is scheduled."""
        self._optimizer = optimizer
        self._prepared: dict[str, Prepared] = {}
        self._groups: list[list[int]] = []
        self._group_of: dict[int, int] = {}
        self.regrouped = False
        """Whether parameters have come or gone since this was last set to False."""
        self.index_groups()

    def index_groups(self) -> None:
        """Look up which param group holds which parameter; note whether others are held."""
        groups = [list(map(id, group["params"])) for group in self._optimizer.param_groups]
        if groups == self._groups:  # as good as always
            return
        before = self._group_of.keys()
        self._groups = groups
        self._group_of = {key: i for i, group in enumerate(groups) for key in group}
        self.regrouped |= self._group_of.keys() != before

    def holds(self, parameter: Tensor) -> bool:
        """Return whether the optimizer updates the parameter."""
        return id(parameter) in self._group_of

    def strength(self, target: Target) -> float:
        """Return the current lambda of a target, 0 if no group holds its parameter any more.

        Raises:
            TypeError: The lambda that was chosen for it, or its param group's, is not a number.
            ValueError: It is negative or not finite.
        """
        return abs(self._signed_strength(target))

    def _signed_strength(self, target: Target) -> float:
        """Return lambda, negative where the optimizer ascends; sigma is to shrink there, too."""
        index = self._group_of.get(id(target.parameter))
        if index is None:
            return 0.0
        group = self._optimizer.param_groups[index]
        chosen = target.strength
        value = group.get(STRENGTH, self.default) if chosen is None else chosen
        if type(value) is not float or not 0 <= value < math.inf:  # else spare the text
            of_group = f"{STRENGTH} of group {index}"
            value = self.now(value, of_group if chosen is None else f"lambda of {target.name!r}")
        return -value if group.get("maximize") else value

    def now(self, strength: Strength, what: str) -> float:
        """Return lambda at this step."""
        value = strength(self.n_steps) if callable(strength) else strength
        return checked_strength(value, what)

    def _group(self, parameter: Tensor) -> dict[str, Any] | None:
        index = self._group_of.get(id(parameter))
        return None if index is None else self._optimizer.param_groups[index]

    def add(self, target: Target, grad: Tensor) -> None:
        """Add the term to the gradient in place; nothing is computed where lambda is 0.

        The first weight of a step to ask has the terms of all prepared, because together they
        cost less than one by one, and a hook finds the caches full of its gradient. A weight
        that was written to since then has them prepared again.
        """
        strength = self._signed_strength(target)
        if not strength:
            return
        prepared = self._prepared.get(target.name)
        if prepared is None or prepared[0] != _written(target.parameter):
            self._prepare(target)
            prepared = self._prepared[target.name]
        _, add, slope = prepared
        factor = strength * slope
        if self.scaler is not None:
            factor = factor * self._scale(self.scaler, grad.device).double()
        if grad.dtype is torch.float16:
            _warn_of_underflow(target, grad, add, factor)
        add(grad, factor)

    def _prepare(self, asking: Target) -> None:
        """Compute the terms of all targets that may be due in this step, as the weights are now."""
        due = self._due(asking)
        # Before the products, which fill the caches with other things.
        written = [_written(target.parameter) for target in due]
        terms = self.estimator.advance(due)
        adders = [term.add for term in terms]
        slopes = [_slope(target, term.sigma) for target, term in zip(due, terms, strict=True)]
        names = [target.name for target in due]
        self._prepared = dict(zip(names, zip(written, adders, slopes, strict=True), strict=True))

    def _due(self, asking: Target | None = None) -> list[Target]:
        """Return the targets that may have a term in this step, and one that surely has."""
        of_groups: dict[int | None, float] = {}
        due = []
        for target in self.targets:
            size = target.view.observes
            if target is asking:
                due.append(target)
            elif target.parameter.requires_grad and (size is None or size.value is not None):
                # Otherwise no gradient will come.
                if target.strength is None:  # as most: lambda is that of the group
                    index = self._group_of.get(id(target.parameter))
                    strength = of_groups.get(index)
                    if strength is None:
                        strength = of_groups[index] = self._signed_strength(target)
                else:
                    strength = self._signed_strength(target)
                if strength:
                    due.append(target)
        return due

    def decay(self) -> Callable[[], None]:
        """Prepare to subtract lr * lambda times the terms of the weights as they are now.

        Returns:
            A function that subtracts them from the weights that have a gradient by then, as
            AdamW decays weights (Loshchilov and Hutter 2019, algorithm 2, line 12).
        """
        due = self._due()
        terms = self.estimator.advance(due)
        changes = [self._change(*pair) for pair in zip(due, terms, strict=True)]

        @torch.no_grad()
        def subtract() -> None:
            for target, change in zip(due, changes, strict=True):
                if target.parameter.grad is not None:
                    change(target.parameter)

        return subtract

    @torch.no_grad()
    def _change(self, target: Target, term: Term) -> Callable[[Tensor], None]:
        """Return a function that subtracts the decoupled term, as it is now, from a weight."""
        lr = learning_rate(self._group(target.parameter) or {})
        factor = -lr * (self.strength(target) * _slope(target, term.sigma))
        if target.view.is_linear:
            return lambda weight: term.add(weight, factor)
        change = torch.zeros_like(target.parameter)  # by then it would depend on other weights
        term.add(change, factor)
        return partial(_add_, change)

    def outdate(self) -> None:
        """Compute the terms anew when one is asked for next."""
        self._prepared.clear()

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


def _add_(change: Tensor, weight: Tensor) -> None:
    weight.add_(change)


def _slope(target: Target, sigma: float | Tensor) -> float | Tensor:
    """Return the derivative of the penalty by each singular value that counts, 0 for others."""
    if target.penalty.derivative is HALF_SQUARE.derivative:
        slope = sigma
    else:
        slope = target.penalty.derivative(torch.as_tensor(sigma, dtype=torch.float64))
    if target.view.pooled:
        double = partial(torch.as_tensor, dtype=torch.float64)
        slope = _of_largest(double(slope), double(sigma), target.top)
    return slope


def _of_largest(slope: Tensor, sigma: Tensor, n: int) -> Tensor:
    """Set the slopes of all but the n largest singular values to 0."""
    largest = sigma.flatten().topk(min(n, sigma.numel())).indices
    return torch.zeros_like(slope).put_(largest, slope.take(largest))


def _warn_of_underflow(target: Target, grad: Tensor, add: Adder, factor: float | Tensor) -> None:
    """Say so if nothing of a term is left in a float16 gradient.

    Reading the largest entry waits for the device; gradients of other dtypes are spared it.
    """
    alone = torch.zeros_like(grad, dtype=torch.float32)
    add(alone, factor)
    largest = float(local(alone).abs().max()) if local(alone).numel() else 0.0
    if 0 < largest < 2**-25:  # half the smallest float16, rounded to zero
        warnings.warn(
            f"the term of {target.name!r} underflows: its largest entry is {largest:.2g}, and "
            "float16 gradients have none below 6e-8, so that the weight is not regularized: "
            "scale the loss and pass scaler=, or train in bfloat16 or with float32 weights under "
            "autocast",
            stacklevel=2,
        )


def _written(parameter: Tensor) -> Written:
    return parameter._version, local(parameter).data_ptr()
