"""How much a sequence of layers can enlarge a difference: a bound, and what was seen.

The Lipschitz constant of a composition is at most the product of those of its parts. For a
linear layer that is the norm of its operator (of a convolution: on images, not of the
flattened kernel). At any input, the norm of the Jacobian is a lower bound.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from snr_hooks.checks import checked_int
from snr_hooks.diagnostics import is_written_out
from snr_hooks.discovery import Target, linear_maps
from snr_hooks.layouts import LINEAR
from snr_hooks.operators import ConvolutionView
from snr_hooks.viewing import SAME

# The largest slope of each, in float64 by a fine grid; the tests find it again.
_SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanh: 1.0,
    nn.Softplus: 1.0,
    nn.Sigmoid: 0.25,
    nn.GELU: 1.129,
    nn.SiLU: 1.1,
}
_APPLY = ("__call__", "forward", "_conv_forward")
"""What a layer is applied by."""
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


class Lipschitz(NamedTuple):
    """Bounds of a Lipschitz constant, in the l2 norm.

    Attributes:
        lower: The largest norm of a Jacobian at the inputs that were given.
        upper: The product of the constants of all layers. Of a convolution too large for an
            SVD that is an upper bound of its norm, by the Fourier transform.
        layers: The constant of each layer by its name.
    """

    lower: float
    upper: float
    layers: dict[str, float]


def lipschitz(sequence: nn.Sequential, inputs: Tensor, n_iterations: int = 50) -> Lipschitz:
    """Bound the Lipschitz constant of a sequence of layers in evaluation mode.

    Args:
        sequence: Layers that are applied one after the other: linear layers, convolutions, batch
            norms, common activations, max pooling without overlap, dropout, and sequences of
            these.
        inputs: A batch of inputs, shape ``(batch, ...)``. Their size is that of the images
            that convolutions get; the lower bound is the largest over the batch.
        n_iterations: Power iterations for the norms of Jacobians.

    Returns:
        The bounds.

    Raises:
        TypeError: ``sequence`` is no ``nn.Sequential``, or a layer in it is of a kind whose
            constant is not known; so is one whose forward is its own, whatever it inherits from.
            Forward hooks are taken to change nothing.
        ValueError: There are no inputs or no iterations.
    """
    if not _is_just(sequence, nn.Sequential):
        raise TypeError(
            f"expected a torch.nn.Sequential, found {type(sequence).__name__}: pass a part of the "
            "model whose layers are applied one after the other"
        )
    n_iterations = checked_int(n_iterations, "n_iterations", at_least=1)
    if not len(inputs):
        raise ValueError(f"expected a batch of at least one input, found shape {(*inputs.shape,)}")
    training = [module for module in sequence.modules() if module.training]
    sequence.eval()
    try:
        with torch.no_grad():
            layers = dict(_constants(sequence, inputs.clone()))
        lower = _jacobian_norm(sequence, inputs, n_iterations)
    finally:
        for module in training:
            module.training = True
    return Lipschitz(lower, math.prod(layers.values()), layers)


def _constants(sequence: nn.Sequential, x: Tensor, path: str = "") -> Iterable[tuple[str, float]]:
    """Yield the constant of each layer by name."""
    for name, layer in sequence._modules.items():  # a layer as often as it is applied
        assert layer is not None
        if _is_just(layer, nn.Sequential):
            yield from _constants(cast(nn.Sequential, layer), x, f"{path}{name}.")
        else:
            yield path + name, _constant(layer, x, path + name)
        x = layer(x)


def _is_just(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer does what one of some kinds does, and no more, as subclasses may."""
    # timm's batch norms, for one, apply an activation.
    return any(
        isinstance(layer, kind)
        and all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in _APPLY)
        and vars(layer).keys().isdisjoint(_APPLY)
        for kind in kinds
    )


def _constant(layer: Any, x: Tensor, name: str) -> float:
    if _is_just(layer, *LINEAR) or type(layer).__name__ in SAME:
        size = {"view": "operator"} | ({"input_size": tuple(x.shape[2:])} if x.ndim > 2 else {})
        choose = "matrix" if isinstance(layer, nn.Linear) else {"weight": size}
        maps = linear_maps(layer, choose) if "weight" in layer._parameters else []
        if maps:  # neither parametrized nor standardized
            return _norm(maps[0])
    if _is_just(layer, *_BATCH_NORMS) and layer.running_var is not None:
        scale = (layer.running_var + layer.eps).rsqrt()
        return float((scale if layer.weight is None else scale * layer.weight).abs().max())
    if _is_just(layer, *_DROPOUTS):
        return 1.0
    if _is_just(layer, nn.ELU):
        return max(1.0, abs(float(layer.alpha)))
    if _is_just(layer, nn.LeakyReLU):
        return max(1.0, abs(float(layer.negative_slope)))
    if _is_just(layer, *_POOLS) and _is_without_overlap(layer):
        return 1.0
    for kind, slope in _SLOPES.items():
        if _is_just(layer, kind):
            return slope
    raise TypeError(
        f"expected layers whose Lipschitz constants are known, found {name!r} of type "
        f"{type(layer).__name__}: pass a part of the model without it"
    )


def _norm(target: Target) -> float:
    """Return the norm of a linear layer, or an upper bound of it."""
    if isinstance(target.view, ConvolutionView) and not is_written_out(target):
        return target.view.bound(target.parameter)
    return float(torch.linalg.svdvals(target.view.matrix(target.parameter.detach()).double())[0])


def _is_without_overlap(pool: nn.MaxPool1d | nn.MaxPool2d | nn.MaxPool3d) -> bool:
    sizes = (pool.kernel_size, pool.stride, pool.dilation)
    kernel, stride, dilation = (torch.as_tensor(size, device="cpu") for size in sizes)
    return bool((kernel <= stride).all()) and bool((dilation == 1).all())


@torch.inference_mode(False)
@torch.enable_grad()
def _jacobian_norm(function: Callable[[Tensor], Tensor], inputs: Tensor, n: int) -> float:
    """Return the largest norm of the Jacobian over a batch of inputs, by power iteration."""
    x = inputs.detach().clone().requires_grad_()
    outputs = function(x.clone())  # the first layer may work in place
    generator = torch.Generator(device=x.device).manual_seed(0)
    u = torch.randn(outputs.shape, generator=generator, dtype=x.dtype, device=x.device)
    # J^T w is linear in w, so that its derivative gives the products with J.
    w = torch.zeros_like(outputs, requires_grad=True)
    pulled = torch.autograd.grad(outputs, x, w, create_graph=True)[0]
    norms = x.new_zeros(len(x))
    for _ in range(n):
        v = torch.autograd.grad(outputs, x, _unit(u), retain_graph=True)[0]
        u = torch.autograd.grad(pulled, w, _unit(v), retain_graph=True)[0]
        norms = u.flatten(1).norm(dim=1)
    return float(norms.max())


def _unit(vectors: Tensor) -> Tensor:
    """Divide each of a batch by its norm."""
    flat = vectors.flatten(1)
    return nn.functional.normalize(flat, dim=1).view(vectors.shape)
