"""Locally optimal subspace iteration, one product with each matrix a step.

Power iteration as it is usually written multiplies by W and by W^T in every step and keeps
one vector. Both products are not needed: for any unit v, W v v^T is the exact gradient of
|W v|^2 / 2, and for any unit u, u u^T W that of |W^T u|^2 / 2; both values are lower bounds
of sigma_1^2 / 2 and equal it at the singular vectors. So the steps alternate between the
sides and read W once. And a product with a few vectors costs little more than with one, so a
few are kept, and each step picks the best unit vector in their span (Rayleigh-Ritz).

What the few are makes the difference. One half are the images, under the product just
taken, of the best vectors of the other side: that is subspace iteration. The other half
are the best vectors of this side from two steps ago. The span of both holds the line along
which the singular vectors move while W is trained, and the conjugate direction that makes
LOBPCG (A. Knyazev, SIAM J. Sci. Comput. 23, 2001) faster than the power method.

The module knows no layers. The vectors of all matrices lie in one tensor a side, and the small
matrices of the Rayleigh-Ritz step are worked on for all weights at once: apart from the
products themselves, the number of kernels a step does not depend on the number of weights.
Nothing waits for the device.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

import torch
from torch import Tensor

_WHITENING = 1e-6
"""Added to the diagonal of Gram matrices. Directions in which the vectors differ by less
than its square root would be rounding noise blown up; they count for less, smoothly."""


class Rows:
    """The vectors of weights on one side: the i-th of all weights in the i-th row of a tensor.

    In a row the maps lie one after the other, each filled up with zeros, which change no inner
    product, to a whole number of chunks. Inner products and combinations are computed chunk by
    chunk, for all weights in one batch. The blocks of a weight that is several maps are L maps
    among the others.

    The first k - k // 2 vectors are images, the others are kept.

    Args:
        vectors: Shape ``(k, length)`` for each weight, ``(blocks, k, length)`` for one with
            blocks; k is the same for all.
    """

    def __init__(self, vectors: Sequence[Tensor]) -> None:
        self._shapes = [vector.shape for vector in vectors]
        self.counts = [math.prod(shape[:-2]) for shape in self._shapes]
        lengths = [shape[-1] for shape in self._shapes]
        self._chunk = _chunk(lengths, self.counts)
        self._chunks = [-(-length // self._chunk) for length in lengths]
        counts = torch.tensor(self.counts, device=vectors[0].device)
        chunks = torch.tensor(self._chunks, device=vectors[0].device)
        self._chunks_of_maps = chunks.repeat_interleave(counts)
        maps = torch.arange(sum(self.counts), device=vectors[0].device)
        self._map_of_chunk = maps.repeat_interleave(self._chunks_of_maps)
        n = self._chunk * len(self._map_of_chunk)
        k = vectors[0].shape[-2]
        self.tensor = vectors[0].new_zeros(k, n)
        self.images, self.kept = self.tensor[: k - k // 2], self.tensor[k - k // 2 :]
        self.each = self.parts(self.tensor)
        """The vectors of each weight: views, in the order of the weights."""
        for part, vector in zip(self.each, vectors, strict=True):
            part.copy_(vector)

    def parts(self, tensor: Tensor) -> list[Tensor]:
        """Take a tensor apart that is laid out like this one's.

        Args:
            tensor: h rows.

        Returns:
            One view a weight, shape ``(h, length)``, or ``(blocks, h, length)``.
        """
        pairs = zip(self.counts, self._chunks, strict=True)
        widths = [count * chunks * self._chunk for count, chunks in pairs]
        parts = []
        for part, shape in zip(torch.split(tensor, widths, dim=1), self._shapes, strict=True):
            *batch, _, length = shape
            blocks = part.view(len(tensor), *batch, -1).movedim(0, -2)
            parts.append(blocks[..., :length])
        return parts

    def gram(self, tensor: Tensor) -> Tensor:
        """Return the inner products of each map's vectors, float64, ``(L, k, k)``.

        In float32 the Gram matrix of vectors that almost coincide would not be positive, and
        squares of 1e20 would overflow.
        """
        k = len(tensor)
        chunks = tensor.double().view(k, -1, self._chunk).transpose(0, 1)
        products = torch.bmm(chunks, chunks.mT).view(-1, k * k)
        # Not checked, for that would wait for a GPU.
        sums = torch.segment_reduce(products, "sum", lengths=self._chunks_of_maps, unsafe=True)
        return sums.view(-1, k, k)

    def combine(self, factors: Tensor, vectors: Tensor, out: Tensor) -> None:
        """Write linear combinations of the k vectors of each map.

        Args:
            factors: Shape ``(L, h, k)``.
            vectors: Laid out like these.
            out: h rows laid out like these; may be among the vectors.
        """
        factors = factors.to(vectors.dtype).index_select(0, self._map_of_chunk)
        chunks = vectors.view(len(vectors), -1, self._chunk)
        if len(out) == 1:  # bmm would take three to six times as long
            combined = chunks[0] * factors[:, 0, :1]
            for i in range(1, len(vectors)):
                combined.addcmul_(chunks[i], factors[:, 0, i : i + 1])
        else:
            combined = torch.bmm(factors, chunks.transpose(0, 1)).transpose(0, 1)
        out.view(len(out), -1, self._chunk).copy_(combined)

    def fill(self, unknown: Tensor) -> None:
        """Replace the first vectors by fixed unit vectors, where ``unknown``, ``(L, h)``, says."""
        if unknown.is_cpu and not unknown.any():
            return
        h = unknown.shape[1]
        mask = unknown.index_select(0, self._map_of_chunk).T[..., None]
        vectors, fixed = (
            tensor[:h].view(h, -1, self._chunk) for tensor in (self.images, self._fixed)
        )
        vectors.copy_(torch.where(mask, fixed, vectors))

    @cached_property
    def _fixed(self) -> Tensor:
        """Unit vectors of signs, laid out like these; made only if they are needed."""
        fixed = torch.zeros_like(self.tensor)
        for part in self.parts(fixed):
            k, n = part.shape[-2:]
            part.copy_(signs(k, n).double() / math.sqrt(n))
        return fixed


def _chunk(lengths: Sequence[int], counts: Sequence[int]) -> int:
    """Return the largest chunk, up to 128 entries, that adds no more than a quarter of zeros.

    Large chunks are few, and large enough for BLAS.
    """
    maps = list(zip(lengths, counts, strict=True))
    entries = sum(length * count for length, count in maps)

    def padded(chunk: int) -> int:
        return sum(-(-length // chunk) * chunk * count for length, count in maps)

    chunks = (128, 64, 32, 16, 8, 4, 2, 1)
    return next(chunk for chunk in chunks if padded(chunk) <= 1.25 * entries)


class Ritz(NamedTuple):
    """What a Rayleigh-Ritz step found for each of L matrices, as factors of k vectors.

    Attributes:
        sigma: Shape ``(L, h)``, float64: |W x| at these x, the largest over the span first.
        best: Shape ``(L, h, k)``: rows that combine the vectors into the unit vectors x at
            which |W x| is largest, the best first.
        images: Shape ``(L, h, k)``: rows that combine the products W x into unit vectors.
        informative: Shape ``(L, h)``: where ``images`` can be used. False for a matrix that
            is zero or not finite, and in directions that it annihilates.
    """

    sigma: Tensor
    best: Tensor
    images: Tensor
    informative: Tensor


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
        informative = (sigma > info.tiny) & (sigma < math.inf)
        images = torch.where(informative, sigma, 1).reciprocal()
        return Ritz(sigma[..., 0], gram.rsqrt(), images, informative[:, 0])
    if gram.shape[-1] == 2:
        best = _better_of_two(gram, image_gram)
    else:
        best = _best_of_many(gram, image_gram, n_best)
    # One, less what whitening took; near zero for directions that are noise, which stay short.
    squares = _forms(gram, best).clamp_(min=1e-2)
    values = _forms(image_gram, best).div_(squares)
    best = best / squares.sqrt()[..., None]
    # Whitening blows the rounding of the Gram matrices up by its inverse.
    faintest = max((1e3 * info.eps) ** 2, 1e-9)
    sigma = values.sqrt()
    informative = (values > faintest * values[:, :1]) & (sigma > info.tiny)
    images = best / sigma.masked_fill(~informative, 1)[..., None]
    return Ritz(sigma, best, images, informative)


def _best_of_many(gram: Tensor, image_gram: Tensor, n_best: int) -> Tensor:
    """Return the best vectors of each span, orthonormal but for whitening: ``(L, n_best, k)``."""
    # Negative, so that the largest come first; nothing of a matrix that is not finite.
    negative = image_gram.neg().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    identity = _identity(gram)
    cholesky, failed = torch.linalg.cholesky_ex(torch.add(gram, identity, alpha=_WHITENING))
    if not failed.is_cpu or failed.any():  # then the vectors are taken as they are
        cholesky = torch.where(failed[:, None, None] == 0, cholesky, identity)
    whitening = torch.linalg.solve_triangular(cholesky, identity, upper=False)
    _, vectors = symmetric_eigen(torch.bmm(torch.bmm(whitening, negative), whitening.mT))
    return torch.bmm(vectors[..., :n_best].mT, whitening)


def _better_of_two(gram: Tensor, image_gram: Tensor) -> Tensor:
    """Return the same of two vectors, ``(L, 1, 2)``, written out, for the default has two.

    It saves a tenth of a step on MobileNetV3, whose weights are small: 2.75 in place of 3.05
    times weight decay (2 cores, medians of four alternating runs that vary by as much).

    The second vector is made orthogonal to the first and both to unit vectors, which is the
    Cholesky factor, and one rotation is Jacobi's method.
    """
    a, b, _, c = gram.flatten(1).unbind(1)
    image_a, image_b, _, image_c = image_gram.flatten(1).unbind(1)
    a = a + _WHITENING
    shift = b / a
    rest = c + _WHITENING - shift * b  # more than whitening, because b^2 is at most a c
    image_rest = image_b - shift * image_a
    length = rest.sqrt()
    twice = 2 * image_rest / (a.sqrt() * length)
    difference = image_a / a - (image_c - shift * (image_b + image_rest)) / rest
    angle = (torch.atan2(twice, difference) / 2).nan_to_num_(0.0)  # of a matrix not finite
    second = angle.sin() / length
    return torch.stack([angle.cos() / a.sqrt() - shift * second, second], 1)[:, None]


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


class Subspaces:
    """The vectors of L maps with equal numbers of vectors, k.

    On the side that is multiplied next, a weight's vectors are images of the last product,
    then k // 2 vectors kept from the step before. On the other side the first k - k // 2 wait
    to be replaced by images of the next product, and the others are kept already.

    Args:
        right: Right vectors of each weight, shape ``(k, n)``, or ``(blocks, k, n)``.
        left: Left vectors of each weight, shape ``(k, m)``, or ``(blocks, k, m)``.
        next_is_right: Whether the next product is W V; it is W^T U otherwise.
    """

    def __init__(
        self, right: Sequence[Tensor], left: Sequence[Tensor], *, next_is_right: bool
    ) -> None:
        self.right = Rows(right)
        self.left = Rows(left)
        self.next_is_right = next_is_right
        # Products with right vectors are left vectors, and the other way round.
        self._room = _Room(self.left.tensor, self.right.tensor)
        self._products = {
            True: self.left.parts(self._room.like_first),
            False: self.right.parts(self._room.like_second),
        }
        k = len(self.right.tensor)
        # A single vector is the best there is.
        images, best = slice(0, k // 2 or 1), slice(k - k // 2 if k > 1 else 0, None)
        self.pairs = {
            True: (_rows(self.left.each, images), _rows(self.right.each, best)),
            False: (_rows(self.left.each, best), _rows(self.right.each, images)),
        }
        """For a step on the right, and on the left: u, shape ``(r, m)``, and v, shape ``(r, n)``,
        of each weight, after its blocks, if any; the best first, r is k // 2 or 1: views that
        hold what the step found until the next. With their sigma, the sum of sigma u v^T is
        W V^T V, or U^T U W, the gradient of half the sum of the squared bounds."""

    def multiplied(self, *, right: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Return the vectors of each weight on a side, and where their products are expected.

        There is room for products from ``reserve()`` to ``step()``, and before the first step, so
        that products can be prepared. Right vectors have shape ``(k, n)``, their products
        ``(k, m)``; left vectors ``(k, m)``, their products ``(k, n)``; all after the blocks, if
        any.
        """
        return (self.right if right else self.left).each, self._products[right]

    def reserve(self) -> None:
        """Make room for products, all zero."""
        self._room.reserve()

    def step(self) -> Tensor:
        """Find the best unit vector of this side, once the products have been computed.

        Returns:
            sigma of each map, shape ``(L, r)``, float64: lower bounds of the largest singular
            values, in descending order.
        """
        right = self.next_is_right
        here, there = (self.right, self.left) if right else (self.left, self.right)
        products = self._room.like_first if right else self._room.like_second
        k = len(here.tensor)
        image_gram = there.gram(products)
        gram = here.gram(here.tensor) if k > 1 else torch.ones_like(image_gram)
        ritz = rayleigh_ritz(gram, image_gram, k - k // 2, here.tensor.dtype)
        if k > 1:
            here.combine(ritz.best[:, : k // 2], here.tensor, here.kept)
        there.combine(ritz.images, products, there.images)
        self._room.release()
        there.fill(~ritz.informative)
        self.next_is_right = not right
        return ritz.sigma[:, : k // 2 or 1]


class _Room:
    """Memory of two tensors, of which one at a time is needed, and between steps none.

    The memory comes and goes under the tensors, so that the views of every weight are made once,
    at the beginning, while there is memory.

    Args:
        first: What one of the tensors is like.
        second: What the other is like.
    """

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self._all = first.new_empty(max(first.numel(), second.numel()))
        self._n_bytes = self._all.nbytes
        self.like_first = self._all[: first.numel()].view_as(first)
        self.like_second = self._all[: second.numel()].view_as(second)

    def reserve(self) -> None:
        """Take memory and fill it with zeros."""
        self._all.untyped_storage().resize_(self._n_bytes)
        self._all.zero_()

    def release(self) -> None:
        """Give the memory back, where torch can."""
        if self._all.device.type in ("cpu", "cuda"):
            self._all.untyped_storage().resize_(0)


def _rows(vectors: Sequence[Tensor], rows: slice) -> list[Tensor]:
    return [vector[..., rows, :] for vector in vectors]


def signs(k: int, n: int) -> Tensor:
    """Return k rows of n signs without a pattern that a weight is likely to annihilate."""
    multiples = torch.arange(1, k + 1)[:, None] * torch.arange(1, n + 1) * (math.sqrt(5) - 1) / 2
    return torch.where(multiples.frac() < 0.5, 1.0, -1.0)


def starting_vectors(k: int, n: int, seed: int, name: str, n_blocks: int | None = None) -> Tensor:
    """Draw orthonormal vectors from which the iteration for one weight starts.

    They depend on the arguments alone: not on the global random stream (which is not
    touched), the device, or the other weights, so that every process of a distributed
    run, and a resumed run, starts from the same vectors.

    Args:
        k: How many, at most n.
        n: Length of a vector.
        seed: The user's seed.
        name: Name of the parameter, so that equal shapes get different vectors.
        n_blocks: Of how many blocks, if the weight has blocks.

    Returns:
        Rows in float64 on the CPU, shape ``(k, n)``, or ``(n_blocks, k, n)``.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:7], "big"))
    shape = (n, k) if n_blocks is None else (n_blocks, n, k)
    orthonormal: Tensor = torch.linalg.qr(
        torch.randn(shape, generator=generator, dtype=torch.float64)
    ).Q
    return orthonormal.mT.contiguous()
