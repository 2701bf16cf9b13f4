"""The Rayleigh-Ritz step: the best vectors in the span of a few, from inner products alone.

The matrices are as small as the number of vectors, and those of all weights are worked on at once.
Nothing waits for the device.
"""

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_WHITENING = 1e-6
"""Added to the diagonal of Gram matrices. Directions in which the vectors differ by less
than its square root would be rounding noise blown up; they count for less, smoothly."""


class Ritz(NamedTuple):
    """What a Rayleigh-Ritz step found for each of L matrices, as factors of k vectors.

    Attributes:
        sigma: Shape ``(L, h)``, float64: |W x| at these x, the largest over the span first.
        best: Shape ``(L, h, k)``: rows that combine the vectors into the unit vectors x at
            which |W x| is largest, the best first.
        images: Shape ``(L, h, k)``: rows that combine the products W x into unit vectors.
        unknown: Shape ``(L, h)``: where ``images`` are noise, or not finite. True for a matrix that
            is zero or not finite, and in directions that it annihilates.
    """

    sigma: Tensor
    best: Tensor
    images: Tensor
    unknown: Tensor


def rayleigh_ritz(gram: Tensor, image_gram: Tensor, n_best: int, dtype: torch.dtype) -> Ritz:
    """Find the best vectors in the span of k vectors from their Gram matrices alone.

    Args:
        gram: Inner products of the vectors, shape ``(L, k, k)``, float64.
        image_gram: Inner products of their images, likewise.
        n_best: How many to find, h.
        dtype: Of the vectors. Images that are small beside its rounding error are noise, and
            those below its normal numbers cannot be made unit vectors.

    Returns:
        The factors, in float64.
    """
    info = torch.finfo(dtype)
    if gram.shape[-1] == 1:
        sigma = (image_gram / gram).sqrt()
        unknown = ~((sigma > info.tiny) & (sigma < math.inf))
        return Ritz(sigma[..., 0], gram.rsqrt(), sigma.reciprocal(), unknown[:, 0])
    best = _best(gram, image_gram, n_best)
    sigma = _forms(image_gram, best).sqrt_()
    # Whitening blows the rounding of the Gram matrices up by its inverse.
    faintest = max(1e3 * info.eps, 3.2e-5)
    unknown = ~(sigma > (faintest * sigma[:, :1]).clamp_(min=info.tiny))
    return Ritz(sigma, best, best / sigma[..., None], unknown)


def _best(gram: Tensor, image_gram: Tensor, n_best: int) -> Tensor:
    """Return the best vectors of each span, of unit length: ``(L, n_best, k)``.

    Of their two signs, between which rounding would choose, they have the one with which their
    coordinates in the basis that Gram-Schmidt makes of the k vectors have a sum of at least zero.
    """
    identity = _identity(gram)
    cholesky, failed = torch.linalg.cholesky_ex(torch.add(gram, identity, alpha=_WHITENING))
    if not failed.is_cpu or failed.any():  # then the vectors are taken as they are
        cholesky = torch.where(failed[:, None, None] == 0, cholesky, identity)
    whitening = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    # Nothing of a matrix that is not finite.
    image_gram = image_gram.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    # Negative, so that the largest come first.
    negative = torch.baddbmm(identity, whitening, image_gram, beta=0, alpha=-1)
    _, vectors = symmetric_eigen(torch.bmm(negative, whitening.mT))
    vectors = vectors[..., :n_best]
    best = torch.bmm(vectors.mT, whitening)
    # One, less what whitening took; near zero for directions that are noise, which stay short.
    lengths = _forms(gram, best).clamp_(min=1e-2).sqrt_()
    return best.div_(lengths.copysign_(vectors.sum(-2))[..., None])


def _forms(matrices: Tensor, vectors: Tensor) -> Tensor:
    """Return x^T A x for each row x of ``(L, h, k)``, of its own A of ``(L, k, k)``."""
    return torch.bmm(vectors, matrices).mul_(vectors).sum(-1)


@cache
def _eye(k: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.eye(k, dtype=dtype, device=device)


def _identity(like: Tensor) -> Tensor:
    return _eye(like.shape[-1], like.dtype, like.device)


def symmetric_eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, ascending, and eigenvectors, in columns, of small matrices.

    ``torch.linalg.eigh`` waits for a GPU to check that it converged. Elsewhere than on the
    CPU this is Jacobi's method instead, which needs no check.
    """
    if matrices.device.type == "cpu":
        values, vectors = torch.linalg.eigh(matrices)
        return values, vectors
    return jacobi(matrices)


def jacobi(matrices: Tensor, sweeps: int = 6) -> tuple[Tensor, Tensor]:
    """Diagonalize symmetric matrices by rotations in disjoint planes, without branches.

    Args:
        matrices: Shape ``(L, k, k)``.
        sweeps: Rounds over all planes; the error is squared in each, so that six are enough
            for any k of interest.

    Returns:
        Eigenvalues in ascending order, shape ``(L, k)``, and eigenvectors in columns.
    """
    k = matrices.shape[-1]
    vectors = torch.eye(k, dtype=matrices.dtype, device=matrices.device).expand_as(matrices)
    for _ in range(sweeps):
        for p, q in _rounds(k, matrices.device):
            difference = matrices[:, q, q] - matrices[:, p, p]
            angle = torch.atan2(2 * matrices[:, p, q], difference) / 2
            # The smaller of the two rotations that make the pair diagonal.
            angle = angle - torch.round(angle / (math.pi / 2)) * (math.pi / 2)
            rotation = torch.eye(k, dtype=matrices.dtype, device=matrices.device)
            rotation = rotation.repeat(len(matrices), 1, 1)
            rotation[:, p, p] = rotation[:, q, q] = angle.cos()
            rotation[:, p, q] = angle.sin()
            rotation[:, q, p] = -angle.sin()
            matrices = rotation.mT @ matrices @ rotation
            vectors = vectors @ rotation
    values, order = matrices.diagonal(dim1=-2, dim2=-1).sort()
    return values, vectors.gather(-1, order[:, None].expand_as(vectors))


@cache
def _rounds(k: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the rounds of a tournament of k: every pair once, disjoint in each round."""
    players = list(range(k + k % 2))
    rounds = []
    half = len(players) // 2
    for _ in range(len(players) - 1):
        pairs = zip(players[:half], reversed(players[half:]), strict=True)
        planes = [sorted(pair) for pair in pairs if max(pair) < k]
        p, q = torch.tensor(planes, dtype=torch.long, device=device).view(-1, 2).unbind(1)
        rounds.append((p, q))
        players = [players[0], players[-1], *players[1:-1]]
    return rounds
