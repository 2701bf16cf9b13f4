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

One product is enough where a weight moves little, as most do with SGD. Where it moves far, or a
direction that none of the vectors sees becomes the largest, the next products raise sigma, and so
tell that it was too low. ``rising`` says of which weights; two more steps of these alone follow,
on either side, and so on while they raise it, a few times.

Where few rise by even a fraction of that, the weights are at rest, and the product with the best
vector alone is as good for a few steps: its term is again the exact gradient of a lower bound, for
the weights as they are. A single vector takes less time than a few, and no Rayleigh-Ritz step.
``stay`` tells of which it does not do any more: the product is longer than along its partner. Two
steps of these alone follow there, too, and ``sit`` takes what they find into the rest.

What no product can tell is that a direction is missing in which none of the vectors has a part
but for rounding, and the term presses down the others until it is the largest. So at the end of
a step the last image of an odd number of vectors leans a little towards a fixed direction, which
has a part in all but those that are orthogonal to it.

The module knows no layers. The vectors of all matrices lie in one tensor a side, and the small
matrices of the Rayleigh-Ritz step are worked on for all weights at once: apart from the
products themselves, the number of kernels a step does not depend on the number of weights.
Nothing but ``stay``, ``is_sound``, ``rising`` and ``some`` wait for the device.
"""

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snr_hooks.ritz import rayleigh_ritz
from snr_hooks.rows import Chunks, Rows

_LEANING = 0.05
"""How far, beside the length of the image, which is 1; 0.03 and 0.1 did about as well."""


class Some(NamedTuple):
    """Some of the weights.

    Attributes:
        maps: Which maps they are, in ascending order.
        right: Chunks of their right vectors.
        left: Chunks of their left vectors.
    """

    maps: Tensor
    right: Chunks
    left: Chunks


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
        device = self.right.tensor.device
        counts = torch.tensor(self.right.counts, device=device)
        self._weights = torch.arange(len(counts), device=device).repeat_interleave(counts)
        k = len(self.right.tensor)
        self.sigma = self.right.tensor.new_zeros(len(self._weights), k // 2 or 1).double()
        """Lower bounds of the largest singular values that the last step of each map found, in
        descending order, shape ``(L, r)``."""
        self._before = self.sigma[:, 0]
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
        first = slice(0, 1)
        self.pair_at_rest = _rows(self.left.each, first), _rows(self.right.each, first)
        """The same after ``stay``, on either side, with r = 1: that is where it takes products."""
        # The first image, and the first vector that is kept.
        self._compared = {
            right: there.tensor[:: len(there.images)][:2]
            for right, there in ((True, self.left), (False, self.right))
        }

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

    def lean(self, some: Some | None = None) -> None:
        """Let the last image of the side that is multiplied next lean towards a fixed direction.

        Only where there is one more of them than kept vectors, as with 3, 5, ... vectors. Of an
        even number the kept ones hold what the last image was before, and the step would choose
        that. A single vector has to be the best.

        Args:
            some: Of these weights alone.
        """
        here, of = self._side(some, right=self.next_is_right)
        if len(here.images) > len(here.kept) > 0:
            here.lean(_LEANING, of)

    def stay(self, tolerance: float) -> list[int] | None:
        """Take sigma from the best vector alone, and move none.

        For two vectors or more, after a step that found unit vectors, and after the products of
        ``pair_at_rest``: of v, written to u, before a step on the right; of u, written to v,
        before one on the left. No step needs what was there.

        Args:
            tolerance: By how much a product may be longer than along the vector of its side that
                the last step found, relative to it. Power iteration would raise sigma by that.

        Returns:
            The weights with a product that is longer, of which steps are due. None, and sigma is
            what it was, if one is zero or not finite: then a step of all weights is due.
        """
        there, of = self._side(None, right=not self.next_is_right)
        square, along = there.gram(self._compared[self.next_is_right], of)[:, 0].unbind(1)
        sigma = square.sqrt()
        least = torch.finfo(there.tensor.dtype).tiny  # as rayleigh_ritz has it
        # As numbers: for so few that takes less time than kernels.
        lengths, parts = sigma.tolist(), along.tolist()
        if not all(least < length < math.inf for length in lengths):
            return None
        self.sigma = sigma[:, None]
        there.scale(self.sigma.reciprocal())
        pairs = zip(lengths, parts, strict=True)
        if all(length < (1 + tolerance) * part for length, part in pairs):
            return []
        return self._owners(sigma >= (1 + tolerance) * along)

    def sit(self, some: Some) -> None:
        """Take the pairs that steps of some weights found for those of ``pair_at_rest``.

        After ``stay`` and an even number of such steps: the last image, on the side that is
        multiplied next, is there already; its partner is the best vector that is kept of the other
        side, and is copied over an older image.
        """
        there, of = self._side(some, right=not self.next_is_right)
        there.repeat_kept(of)

    def some(self, weights: Sequence[int]) -> Some:
        """Choose weights for two steps of these alone, and note their sigma for ``rising``."""
        self._before = self.sigma[:, 0]
        chosen = torch.tensor(weights, device=self._weights.device)
        maps = torch.isin(self._weights, chosen).nonzero()[:, 0]
        return Some(maps, self.right.some(maps), self.left.some(maps))

    def step(self, some: Some | None = None) -> None:
        """Find the best unit vector of this side, once the products have been computed.

        Args:
            some: Of these weights alone. The others stay as they are, and two such steps bring
                all to the same side again.
        """
        right = self.next_is_right
        here, of_here = self._side(some, right=right)
        there, of_there = self._side(some, right=not right)
        products = self._room.like_first if right else self._room.like_second
        k = len(here.tensor)
        image_gram = there.gram(products, of_there)
        gram = here.gram(here.tensor, of_here) if k > 1 else torch.ones_like(image_gram)
        ritz = rayleigh_ritz(gram, image_gram, k - k // 2, here.tensor.dtype)
        if k > 1:
            here.combine(ritz.best[:, : k // 2], here.tensor, here.kept, of_here)
        there.combine(ritz.images, products, there.images, of_there)
        self._room.release()
        there.fill(ritz.unknown, of_there)
        self.next_is_right = not right
        if some is None:
            self.sigma = ritz.sigma[:, : k // 2 or 1]
            self._before = (image_gram[:, 0, 0] / gram[:, 0, 0]).sqrt()  # of the first vector
        else:
            sigma = ritz.sigma[:, : self.sigma.shape[1]]  # one after ``stay``
            self.sigma = self.sigma.index_copy(0, some.maps, sigma)

    def is_sound(self) -> bool:
        """Return whether no sigma is zero or not finite; ``stay`` would refuse that."""
        sigma = self.sigma[:, 0]
        return bool(((sigma > 0) & (sigma < math.inf)).all())

    def rising(self, tolerance: float) -> list[int]:
        """Return the weights whose sigma has risen by more than a tolerance, relative to it.

        By what a step of all found in place of the sigma that the best vector of the step before
        has by now; after ``some``, by what steps of these found since. Reads the figures, for
        which an accelerator would have to be waited.
        """
        risen = self.sigma[:, 0] > (1 + tolerance) * self._before
        return self._owners(risen) if risen.any() else []

    def _owners(self, maps: Tensor) -> list[int]:
        """Return the weights of some maps, given by a mask."""
        return sorted(set(self._weights[maps].tolist()))

    def _side(self, some: Some | None, *, right: bool) -> tuple[Rows, Chunks]:
        """Return the vectors of a side, and the chunks of all weights there, or of some."""
        rows = self.right if right else self.left
        if some is None:
            return rows, rows.all
        return rows, some.right if right else some.left


class _Room:
    """Memory of two tensors, of which one at a time is needed, and after a step none.

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
        torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    ).Q
    return orthonormal.mT.contiguous()
