"""Weights of which forward uses a function: standardized, parametrized, followed by batch norm.

The penalty then acts on what forward uses, and its gradient reaches the stored parameters
through that function, by a vector-Jacobian product, as autograd would carry it there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from snr_hooks.products import Product
from snr_hooks.views import Adder, View


class Standardized:
    """The weight of timm's StdConv2d and ScaledStdConv2d, standardized for each output.

    Args:
        module: One of these.
        path: What the names of its parameters begin with.
    """

    name = "standardized"

    def __init__(self, module: Any, path: str) -> None:
        self._module, self._path = module, path

    def __call__(self) -> Tensor:
        """Return (W - mean) / std, times gain * scale where there is a gain."""
        module, weight = self._module, self._module.weight
        gain = getattr(module, "gain", None)
        scale = None if gain is None else (gain * module.scale).view(-1)
        rows = weight.reshape(1, len(weight), -1)
        standardized = functional.batch_norm(
            rows, None, None, weight=scale, training=True, momentum=0.0, eps=module.eps
        )
        return standardized.reshape_as(weight)

    def sources(self) -> dict[str, nn.Parameter]:
        """Return the stored parameters by name."""
        names = ("weight", "gain") if hasattr(self._module, "gain") else ("weight",)
        return {self._path + name: getattr(self._module, name) for name in names}


class Parametrized:
    """A tensor under ``torch.nn.utils.parametrize``.

    Args:
        module: The module.
        tensor: The name of the tensor there.
        path: What the names of its parameters begin with.
    """

    name = "parametrized"

    def __init__(self, module: Any, tensor: str, path: str) -> None:
        self._module, self._tensor, self._path = module, tensor, path

    def __call__(self) -> Tensor:
        """Return the tensor, computed as in evaluation: no state of a parametrization moves."""
        parts = self._module.parametrizations[self._tensor].modules()
        training = [part for part in parts if part.training]
        for part in training:
            part.training = False
        try:
            # Not the attribute, which parametrize.cached() would keep for forward.
            tensor: Tensor = self._module.parametrizations[self._tensor]()
            return tensor
        finally:
            for part in training:
                part.training = True

    def sources(self) -> dict[str, nn.Parameter]:
        """Return what is stored, and what parametrizations are made of, by name."""
        stored = self._module.parametrizations[self._tensor].named_parameters()
        prefix = f"{self._path}parametrizations.{self._tensor}."
        return {prefix + name: parameter for name, parameter in stored}


class Stored:
    """A weight as it is, to be folded.

    Args:
        module: Its owner.
        path: What the names of its parameters begin with.
    """

    def __init__(self, module: Any, path: str) -> None:
        self._module, self._path = module, path

    def __call__(self) -> Tensor:
        """Return it."""
        weight: Tensor = self._module.weight
        return weight

    def sources(self) -> dict[str, nn.Parameter]:
        """Return it by its name."""
        return {f"{self._path}weight": self._module.weight}


class Folded:
    """The weight of a convolution times what the batch norm after it multiplies by.

    That is gamma / sqrt(running_var + eps), as in evaluation. The running variance counts
    as a constant: it has no gradient.

    Args:
        weight: What the convolution uses.
        module: The convolution.
        norm: The batch norm.
        norm_name: The name of the norm in the model.
    """

    def __init__(self, weight: Any, module: Any, norm: Any, norm_name: str) -> None:
        self._weight, self._module, self._norm = weight, module, norm
        self._norm_name = norm_name
        self.name = f"folded with {norm_name}"

    def __call__(self) -> Tensor:
        """Return the folded weight."""
        weight, norm = self._weight(), self._norm
        scale = (norm.running_var + norm.eps).rsqrt().to(weight.dtype)
        if norm.weight is not None:
            scale = scale * norm.weight
        if getattr(self._module, "transposed", False):
            groups = self._module.groups
            scale = scale.view(groups, -1).repeat_interleave(len(weight) // groups, 0)
        folded: Tensor = weight * scale.view(*scale.shape, *(1,) * (weight.ndim - scale.ndim))
        return folded

    def sources(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the convolution and the scale of the norm by name."""
        sources: dict[str, nn.Parameter] = self._weight.sources()
        gamma = self._norm.weight
        return sources if gamma is None else {**sources, f"{self._norm_name}.weight": gamma}


@dataclass(frozen=True)
class EffectiveView:
    """The view of a function of some parameters, and of its gradient by one of them.

    Attributes:
        view: Of the tensor that the function returns.
        function: Computes it from the parameters that its module holds.
        source: The parameter whose gradient gets the term. Targets of the other parameters
            see the same tensor and have vectors of their own.
        size: The shape of the tensor.
        name: What tables say was done to the weight.
    """

    view: View
    function: Callable[[], Tensor]
    source: nn.Parameter
    size: torch.Size
    name: str

    group = None  # this process holds all of the weight
    is_linear = False

    @property
    def version(self) -> object:
        """That of the inner view."""
        return self.view.version

    @property
    def observes(self) -> Any:
        """That of the inner view."""
        return self.view.observes

    @property
    def pooled(self) -> bool:
        """That of the inner view."""
        return self.view.pooled

    def matrix(self, weight: Tensor) -> Tensor:
        """Return what forward uses, as the inner view's matrix."""
        del weight
        return self.view.matrix(self._value())

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        del weight
        return self.view.shape(torch.empty(self.size, device="meta"))

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare W v, W computed anew at every call."""
        del weight
        return lambda: self.view.matvec(self._value(), v, out)()

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare W^T u, W computed anew at every call."""
        del weight
        return lambda: self.view.rmatvec(self._value(), u, out)()

    def _value(self) -> Tensor:
        """Compute the tensor without a graph; a module may keep it, and train with it."""
        with torch.inference_mode(False), torch.no_grad():
            return self.function()

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of the term's vector-Jacobian product to a gradient.

        Args:
            weight: Not used: the function reads its module.
            u: As the inner view wants it.
            v: Likewise.

        Returns:
            A function of a gradient of ``source`` and a factor, or factors. It raises RuntimeError
            where autograd cannot be used.
        """
        del weight
        return partial(self._add, u, v)

    def _add(self, u: Tensor, v: Tensor, grad: Tensor, factor: float | Tensor) -> None:
        with torch.enable_grad():
            effective = self.function()
        if not effective.requires_grad:
            raise RuntimeError(
                "expected autograd to be available in backward hooks, which the gradient "
                f"through a weight that is {self.name} needs, found it switched off (compiled "
                "autograd does that): do not compile the backward pass, or choose weight "
                "'stored'"
            )
        term = torch.zeros_like(effective, dtype=u.dtype)
        self.view.adder(term, u, v)(term, factor)
        with torch.enable_grad():
            (through,) = torch.autograd.grad(effective, self.source, term.to(effective.dtype))
        grad.add_(through)

    def describe(self, weight: Tensor) -> str:
        """Return how it is seen, and what was done to it."""
        del weight
        inner = self.view.describe(torch.empty(self.size, device="meta"))
        return f"{inner}, {self.name}"
