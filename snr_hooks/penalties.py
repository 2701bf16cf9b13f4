"""Penalties: functions psi of the singular values whose sum is kept small.

The gradient of psi(sigma_1(W)) with respect to W is psi'(sigma_1) u_1 v_1^T, and likewise for
any other singular value, so a penalty is given by its derivative. The value is never needed
in training; it is there for logs, and for tests that put the penalty into the loss.

==================  ==========================  =================================
name                psi(sigma)                  psi'(sigma)
==================  ==========================  =================================
``half_square``     sigma^2 / 2 (the paper's)   sigma
``sigma``           sigma                       1, but 0 at 0
``hinge``           max(0, sigma - t)           1 above t, 0 up to it
``squared_hinge``   max(0, sigma - t)^2 / 2     sigma - t above t, 0 up to it
``around``          (sigma - t)^2 / 2           sigma - t: norms below t grow
==================  ==========================  =================================
"""

import math
from collections.abc import Callable, Mapping
from functools import cache, partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snr_hooks._text import nearest


class Penalty(NamedTuple):
    """A function of singular values, and its derivative.

    Both take a float64 tensor of singular values, of any shape, and return one of that shape.

    Attributes:
        value: psi.
        derivative: psi'. The term of a weight is lambda * psi'(sigma) u v^T.
        name: What tables print.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    name: str = "custom"


def hinge(target: float) -> Penalty:
    """Return max(0, sigma - target): a constant pull down, only above the target."""
    return _hinge(_checked_target(target, "hinge"))


@cache  # equal penalties are the same, so that patterns may agree
def _hinge(t: float) -> Penalty:
    return Penalty(partial(_excess, t), partial(_is_above, t), f"hinge at {t:g}")


def squared_hinge(target: float) -> Penalty:
    """Return max(0, sigma - target)^2 / 2: a pull that fades out at the target."""
    return _squared_hinge(_checked_target(target, "squared_hinge"))


@cache
def _squared_hinge(t: float) -> Penalty:
    return Penalty(partial(_half_squared_excess, t), partial(_excess, t), f"squared hinge at {t:g}")


def around(target: float) -> Penalty:
    """Return (sigma - target)^2 / 2: a pull to the target from above and below."""
    return _around(_checked_target(target, "around"))


@cache
def _around(t: float) -> Penalty:
    return Penalty(partial(_half_squared_distance, t), partial(_distance, t), f"around {t:g}")


# Functions of a module, because wrappers with their targets are copied and pickled.


def _identity(sigma: Tensor) -> Tensor:
    return sigma


def _half_squared_distance(t: float, sigma: Tensor) -> Tensor:
    return (sigma - t).square() / 2


def _distance(t: float, sigma: Tensor) -> Tensor:
    return sigma - t


def _half_squared_excess(t: float, sigma: Tensor) -> Tensor:
    return _excess(t, sigma).square() / 2


def _excess(t: float, sigma: Tensor) -> Tensor:
    return (sigma - t).clamp(min=0)


def _is_above(t: float, sigma: Tensor) -> Tensor:
    return (sigma > t).to(sigma.dtype)


HALF_SQUARE = Penalty(partial(_half_squared_distance, 0.0), _identity, "sigma^2 / 2")
"""The paper's penalty, equation (4)."""

SIGMA = Penalty(_identity, partial(_is_above, 0.0), "sigma")
"""The spectral norm itself."""

_PLAIN = {"half_square": HALF_SQUARE, "sigma": SIGMA}
_WITH_TARGET = {"hinge": hinge, "squared_hinge": squared_hinge, "around": around}


def as_penalty(value: Any) -> Penalty:
    """Return the penalty that a name, as in a YAML file, or a Penalty stands for.

    Args:
        value: A ``Penalty``, ``"half_square"``, ``"sigma"``, or one entry such as
            ``{"hinge": 1.0}``.

    Returns:
        The penalty.

    Raises:
        TypeError: The value is of another type, or a derivative does not return a tensor.
        ValueError: There is no such penalty, its target is not a number >= 0, or a derivative
            returns another shape or values that are not finite.
    """
    if isinstance(value, Penalty):
        _check_derivative(value)
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        [(name, target)] = value.items()
        if name in _WITH_TARGET:
            return _WITH_TARGET[name](target)
    else:
        name = value
        if isinstance(name, str) and name in _PLAIN:
            return _PLAIN[name]
    if not isinstance(name, str):
        raise TypeError(
            f"expected penalty to be a Penalty, a name or {{name: target}}, found {value!r}"
        )
    if name in _WITH_TARGET:
        raise ValueError(
            f"expected penalty {name!r} with the target, as {{{name!r}: 1.0}}, found {value!r}"
        )
    raise ValueError(
        f"expected penalty to be one of {', '.join((*_PLAIN, *_WITH_TARGET))}, found {value!r}; "
        f"{nearest(name, (*_PLAIN, *_WITH_TARGET))}"
    )


def _checked_target(target: object, name: str) -> float:
    if isinstance(target, bool) or not isinstance(target, Real):
        raise TypeError(f"expected the target of {name} to be a number >= 0, found {target!r}")
    if not 0 <= float(target) < math.inf:
        raise ValueError(f"expected the target of {name} to be finite and >= 0, found {target!r}")
    return float(target)


def _check_derivative(penalty: Penalty) -> None:
    """Try a derivative once, rather than in the middle of a backward pass."""
    sigma = torch.tensor([[0.25, 0.5], [1.0, 4.0]], dtype=torch.float64)
    found = penalty.derivative(sigma)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"expected the derivative of penalty {penalty.name!r} to map a float64 tensor of "
            f"singular values to a tensor, found {type(found).__name__}"
        )
    if found.shape != sigma.shape or not found.isfinite().all():
        raise ValueError(
            f"expected the derivative of penalty {penalty.name!r} to return finite values of the "
            f"shape of its argument, found {found} for {sigma}"
        )
