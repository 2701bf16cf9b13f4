"""The regularization term lambda * sigma * u v^T, at the scale the gradient has."""

import math
import warnings
from collections.abc import Callable
from functools import partial
from operator import is_
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

Prepared = tuple[int | None, int, int, Adder, float | Tensor]
"""What the hook of a target needs:

- version and address of the weight that the term was computed from, which change when it is written
  to or its memory exchanged (``p.data =``); no version if the term is used for several steps;
- the index of its param group, for lambda;
- what adds a multiple of u v^T to a gradient;
- psi'(sigma), negative where the optimizer ascends, for sigma is to shrink there, too.
"""


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
        self._outdated = True
        self._groups: list[list[Tensor]] = []
        self._group_of: dict[int, int] = {}
        self.regrouped = False
        """Whether parameters have come or gone since this was last set to False."""
        self.index_groups()

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: nothing that is true of these weights alone."""
        return self.__dict__ | {"_prepared": {}, "_groups": []}

    def index_groups(self) -> None:
        """Look up which param group holds which parameter; note whether others are held."""
        groups = [group["params"] for group in self._optimizer.param_groups]
        if len(groups) == len(self._groups) and all(map(_same, groups, self._groups)):
            return  # as good as always
        before = self._group_of.keys()
        self._prepared.clear()
        self._groups = [list(group) for group in groups]
        self._group_of = {id(p): i for i, group in enumerate(groups) for p in group}
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
        index = self._group_of.get(id(target.parameter))
        return 0.0 if index is None else self._strength_in(index, target)

    def _strength_in(self, index: int, target: Target) -> float:
        value = chosen = target.strength
        if value is None:
            value = self._optimizer.param_groups[index].get(STRENGTH, self.default)
        if type(value) is float and 0 <= value < math.inf:  # as good as always; spare the text
            return value
        what = f"{STRENGTH} of group {index}" if chosen is None else f"lambda of {target.name!r}"
        return self.now(value, what)

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
        # Between the gradients of two layers the caches forget nearly all of this: a call takes
        # about a microsecond, ten times as long as in a loop.
        prepared = self._prepared.get(target.name)
        if (
            self._outdated
            or prepared is None
            or (prepared[0] is not None and prepared[0] != target.parameter._version)
            or prepared[1] != local(target.parameter).data_ptr()
        ):
            if not self.strength(target):
                return
            prepared = self._prepare(target)
        _, _, index, add, slope = prepared
        strength = self._strength_in(index, target)
        if not strength:
            return
        factor = strength * slope
        if self.scaler is not None:
            factor = factor * self._scale(self.scaler, grad.device).double()
        add(grad, factor)

    def _prepare(self, asking: Target) -> Prepared:
        """Compute the terms of all targets that may be due in this step, as the weights are now."""
        prepared = self._prepared.get(asking.name)
        if self._outdated and prepared is not None:
            in_place = prepared[1] == local(asking.parameter).data_ptr()
            if in_place and self.estimator.again():
                self._outdated = False
                return prepared
        due = self._due(asking)
        # Before the products, which fill the caches with other things.
        held = self.estimator.n_steps > 1
        versions = [None if held else target.parameter._version for target in due]
        addresses = [local(target.parameter).data_ptr() for target in due]
        terms = self.estimator.advance(due)
        ascends = [group.get("maximize") for group in self._optimizer.param_groups]
        self._prepared = {}
        for target, term, version, address in zip(due, terms, versions, addresses, strict=True):
            index = self._group_of[id(target.parameter)]
            slope = _slope(target, term.sigma)
            slope = -slope if ascends[index] else slope
            self._prepared[target.name] = version, address, index, _adder(target, term), slope
        self._outdated = False
        return self._prepared[asking.name]

    def _due(self, asking: Target | None = None) -> list[Target]:
        """Return the targets that may have a term in this step, and one that surely has."""
        return [
            target
            for target in self.targets
            if target is asking or (_may_have_gradient(target) and self.strength(target))
        ]

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
        """Begin a step: when a term is asked for next, compute the terms of this step."""
        self._outdated = True

    def replace(self, estimator: Estimator) -> None:
        """Take the terms from another estimator."""
        self.estimator = estimator
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


def _may_have_gradient(target: Target) -> bool:
    """Whether a weight is trained, and the input has come by that its view waits for, if any."""
    size = target.view.observes
    return target.parameter.requires_grad and (size is None or size.value is not None)


def _same(group: list[Tensor], other: list[Tensor]) -> bool:
    return len(group) == len(other) and all(map(is_, group, other))


def _add_(change: Tensor, weight: Tensor) -> None:
    weight.add_(change)


def _slope(target: Target, sigma: float | Tensor) -> float | Tensor:
    """Return the derivative of the penalty by each singular value that counts, 0 for others."""
    is_sigma = target.penalty.derivative is HALF_SQUARE.derivative
    if is_sigma and not target.view.pooled:
        return sigma
    double = partial(torch.as_tensor, dtype=torch.float64, device=target.parameter.device)
    slope = sigma if is_sigma else target.penalty.derivative(double(sigma))
    if target.view.pooled:
        slope = _of_largest(double(slope), double(sigma), target.top)
    return slope


def _of_largest(slope: Tensor, sigma: Tensor, n: int) -> Tensor:
    """Set the slopes of all but the n largest singular values to 0."""
    largest = sigma.flatten().topk(min(n, sigma.numel())).indices
    return torch.zeros_like(slope).put_(largest, slope.take(largest))


def _adder(target: Target, term: Term) -> Adder:
    """Return what adds to a gradient, which has the dtype of the weight."""
    if target.parameter.dtype is torch.float16:
        return partial(_add_or_warn, target, term.add)
    return term.add


def _add_or_warn(target: Target, add: Adder, grad: Tensor, factor: float | Tensor) -> None:
    """Add, and say so if nothing of a term is left in a float16 gradient.

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
    add(grad, factor)
