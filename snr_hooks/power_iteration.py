"""Power iteration: the largest singular value of a linear map given as two callables.

The module knows no layers and no weights, and imports nothing of this package. A map
W from R^n to R^m is a pair ``matvec(v) = W v`` and ``rmatvec(u) = W^T u``. Vectors
live in the last dimension; leading dimensions, if any, are independent problems.

Reference: Y. Yoshida, T. Miyato, "Spectral Norm Regularization for Improving the
Generalizability of Deep Learning", arXiv 1705.10941, algorithm 1. In contrast to the
pseudo-code that circulates, u and v are unit vectors here, so that the gradient of
sigma^2 / 2 is sigma * u v^T and not sigma^2 times something.
"""

import hashlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LinearMap = Callable[[Tensor], Tensor]


class SingularTriplet(NamedTuple):
    """A singular value with its vectors: ``W^T u = sigma v``.

    Attributes:
        sigma: Shape ``(...)``, not negative. From power iteration it is a lower bound of
            sigma_1, because it equals u^T W v for unit u and v.
        u: Left vector, shape ``(..., m)``, of norm 1 (0 where sigma is 0).
        v: Right vector, shape ``(..., n)``, of norm 1.
    """

    sigma: Tensor
    u: Tensor
    v: Tensor


def power_iteration(
    matvec: LinearMap, rmatvec: LinearMap, v: Tensor, n_iterations: int
) -> SingularTriplet:
    """Improve ``v`` towards the top right singular vector of a linear map.

    One iteration is u <- W v / |W v|, v <- W^T u / |W^T u|, sigma = |W^T u|. In exact
    arithmetic sigma never decreases and its relative error shrinks by
    (sigma_2 / sigma_1)^4 an iteration.

    Where W^T u is zero or not finite (a zero matrix, a matrix with a NaN), v has nothing
    to learn from W. It is then rolled by one place: it stays a finite vector of the same
    norm, and a v that W annihilates does not stay stuck once W has changed.

    Args:
        matvec: v, shape ``(..., n)``, to W v, shape ``(..., m)``.
        rmatvec: u, shape ``(..., m)``, to W^T u, shape ``(..., n)``.
        v: The starting vector, shape ``(..., n)``, any norm but 0.
        n_iterations: At least 1.

    Returns:
        The triplet after the last iteration.
    """
    for _ in range(n_iterations):
        u, _ = normalize(matvec(v))
        v_next, sigma = normalize(rmatvec(u))
        informative = (sigma > 0).unsqueeze(-1)  # not if sigma is 0 or NaN
        v = torch.where(informative, v_next, v.roll(1, dims=-1))
    return SingularTriplet(sigma, u, v)


def normalize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a vector into direction and length, at any scale the dtype can hold.

    Dividing by the largest entry first keeps the squares of entries such as 1e-30 or
    1e30 in float32 from under- or overflowing.

    Args:
        x: Shape ``(..., n)``.

    Returns:
        The unit vector, shape ``(..., n)``, and the norm, shape ``(...)``. Both are 0
        for a zero vector.
    """
    largest = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True)
    scaled = x / torch.where(largest > 0, largest, 1)
    norm = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    unit = scaled / torch.where(norm > 0, norm, 1)
    return unit, (largest * norm).squeeze(-1)


def starting_vector(n: int, seed: int, name: str) -> Tensor:
    """Draw the unit vector from which the iteration for one weight starts.

    It depends on its arguments alone: not on the global random stream (which is not
    touched), the device, or the other weights, so that every process of a distributed
    run, and a resumed run, starts from the same vector.

    Args:
        n: Length of the vector.
        seed: The user's seed.
        name: Name of the parameter, so that equal shapes get different vectors.

    Returns:
        A unit vector in float64 on the CPU, shape ``(n,)``.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    unit, _ = normalize(torch.randn(n, generator=generator, dtype=torch.float64))
    return unit
