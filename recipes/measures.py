"""What the paper measures of a trained network, for any model and any loader.

A loader is any iterable of (images, labels) batches. Every measurement puts the model into
evaluation mode, where batch norm uses its running statistics so that images do not influence
each other, and leaves it in the mode and with the gradients that it found.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loader = Iterable[tuple[Tensor, Tensor]]
Loss = Callable[..., Tensor]
"""A mean over a batch, or a sum with ``reduction="sum"``, as in torch.nn.functional."""


class Eigenvalue(NamedTuple):
    """The largest eigenvalue of a Hessian and how well it is known.

    Attributes:
        value: The eigenvalue; NaN if the iteration did not converge, or a weight is not finite.
        residual: ``|H v - value v| / |value|`` for the unit vector v found: some eigenvalue
            lies within this relative distance.
        n_products: How many products with the Hessian were made.
        n_images: Over how many images the loss was averaged.
    """

    value: float
    residual: float
    n_products: int
    n_images: int


def best_accuracy(history: Sequence[Mapping[str, Any]]) -> float:
    """Return the best test accuracy of a run.

    Args:
        history: One mapping an epoch, with ``test_accuracy``.

    Returns:
        The largest of them, in their unit.
    """
    return max(float(row["test_accuracy"]) for row in history)


def generalization_gap(
    history: Sequence[Mapping[str, Any]], alpha: float, train: str = "train_eval_accuracy"
) -> float:
    """Return the smallest gap between training and test accuracy once the test accuracy is good.

    Yoshida & Miyato 2017: the minimum of train minus test accuracy over the epochs
    whose test accuracy is at least alpha.

    Args:
        history: One mapping an epoch, with ``test_accuracy`` and the training accuracy.
        alpha: The threshold, in the unit of the accuracies.
        train: Under which name the training accuracy is found.

    Returns:
        The gap in the unit of the accuracies; NaN if no epoch reaches alpha.
    """
    gaps = [
        float(row[train]) - float(row["test_accuracy"])
        for row in history
        if float(row["test_accuracy"]) >= alpha
    ]
    return min(gaps, default=math.nan)


def sensitivity(
    model: nn.Module, loader: Loader, loss: Loss = nn.functional.cross_entropy
) -> float:
    """Return the mean over images of the l2 norm of the gradient of the loss at the image.

    Yoshida & Miyato 2017.

    Args:
        model: Maps images to what the loss takes.
        loader: The images; the gradient is in the units in which they come.
        loss: Of an image, ``loss(model(images), labels, reduction="sum")``.

    Returns:
        The mean norm.

    Raises:
        ValueError: The loader has no images.
    """
    total, n_images = 0.0, 0
    with _evaluating(model) as device:
        for images, labels in loader:
            images = images.to(device).detach().requires_grad_()
            value = loss(model(images), labels.to(device), reduction="sum")
            (gradient,) = torch.autograd.grad(value, images)
            total += float(gradient.flatten(1).double().norm(dim=1).sum())
            n_images += len(images)
    if n_images == 0:
        raise ValueError("expected a loader of images, found none in it")
    return total / n_images


def hessian_eigenvalue(
    model: nn.Module,
    loader: Loader,
    loss: Loss = nn.functional.cross_entropy,
    *,
    tolerance: float = 1e-2,
    max_restarts: int = 50,
    seed: int = 0,
) -> Eigenvalue:
    """Find the largest eigenvalue of the Hessian of the mean loss over all images of a loader.

    The Hessian with respect to all parameters that require a gradient, times a vector, by
    differentiating twice; the eigenvalue by ARPACK's restarted Lanczos iteration. It is the
    largest one, not that of the largest absolute value.

    Args:
        model: Maps images to what the loss takes.
        loader: The images, in the same batches every time.
        loss: Mean loss of a batch.
        tolerance: Relative accuracy asked of the iteration.
        max_restarts: After so many restarts of 9 products each, give up.
        seed: Of the vector to start with.

    Returns:
        The eigenvalue, with the residual that was reached.

    Raises:
        ValueError: The loader has no images, or the model fewer than two parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    size, n_products = sum(p.numel() for p in parameters), 0
    # Fused attention has no second derivative.
    with _evaluating(model) as device, sdpa_kernel(SDPBackend.MATH):
        batches = [(images.to(device), labels.to(device)) for images, labels in loader]
        n_images = sum(len(images) for images, _ in batches)
        if size < 2 or n_images == 0:
            raise ValueError(
                "expected two parameters that require a gradient and an image at least, found "
                f"{size} and {n_images}"
            )

        def product(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            nonlocal n_products
            n_products += 1
            direction = torch.from_numpy(vector.ravel()).to(parameters[0])
            total = torch.zeros(size, dtype=torch.float64, device=device)
            for images, labels in batches:
                share = len(images) / n_images
                value = loss(model(images), labels) * share
                total += _hessian_product(value, parameters, direction)
            return total.cpu().numpy()

        operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
        start = np.random.default_rng(seed).standard_normal(size)
        options: dict[str, Any] = {"k": 1, "which": "LA", "v0": start, "tol": tolerance}
        try:
            values, vectors = eigsh(operator, ncv=min(10, size), maxiter=max_restarts, **options)
        except ArpackError:  # no convergence, numbers that are not finite, or a Hessian of zero
            unknown = math.nan if product(start).any() else 0.0
            return Eigenvalue(unknown, unknown, n_products, n_images)
        value, vector = float(values[0]), vectors[:, 0]
        error = float(np.linalg.norm(product(vector) - value * vector))
        residual = error / abs(value) if value else math.inf
    return Eigenvalue(value, residual, n_products, n_images)


def _hessian_product(value: Tensor, parameters: Sequence[Tensor], direction: Tensor) -> Tensor:
    """Return the product of the Hessian of a value with a vector, in float64."""
    gradients = torch.autograd.grad(value, parameters, create_graph=True, materialize_grads=True)
    slope = torch.cat([gradient.flatten() for gradient in gradients]) @ direction
    if not slope.requires_grad:  # linear in the parameters
        return torch.zeros_like(direction, dtype=torch.float64)
    products = torch.autograd.grad(slope, parameters, materialize_grads=True)
    return torch.cat([product.flatten() for product in products]).double()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into evaluation mode for a while; yield the device of its parameters."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in training.items():
            module.training = mode
