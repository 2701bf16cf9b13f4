"""Vectors of many weights in one tensor, so that all are worked on at once."""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """The chunks of all maps, or of some.

    Attributes:
        numbers: Which they are among all chunks; None for all.
        owners: For each of them, which of these maps it belongs to.
        lengths: How many each of these maps has.
    """

    numbers: Tensor | None
    owners: Tensor
    lengths: Tensor


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
        lengths_in_chunks = chunks.repeat_interleave(counts)
        maps = torch.arange(sum(self.counts), device=vectors[0].device)
        owners = maps.repeat_interleave(lengths_in_chunks)
        self.all = Chunks(None, owners, lengths_in_chunks)
        n = self._chunk * len(owners)
        k = vectors[0].shape[-2]
        self.tensor = vectors[0].new_zeros(k, n)
        self.images, self.kept = self.tensor[: k - k // 2], self.tensor[k - k // 2 :]
        self._first_image = self._cut(self.images[:1], self.all)
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

    def some(self, maps: Tensor) -> Chunks:
        """Return the chunks of some maps, whose numbers are given in ascending order."""
        chosen = torch.zeros_like(self.all.lengths, dtype=torch.bool).index_fill_(0, maps, True)
        numbers = chosen.index_select(0, self.all.owners).nonzero()[:, 0]
        places = chosen.cumsum(0) - 1
        owners = places.index_select(0, self.all.owners.index_select(0, numbers))
        return Chunks(numbers, owners, self.all.lengths.index_select(0, maps))

    def gram(self, tensor: Tensor, of: Chunks) -> Tensor:
        """Return the inner products of each map's vectors, float64, ``(L, k, k)``.

        In float32 the Gram matrix of vectors that almost coincide would not be positive, and
        squares of 1e20 would overflow.

        Args:
            tensor: k vectors, laid out like these.
            of: Of which maps.
        """
        k = len(tensor)
        chunks = self._cut(tensor, of).double().transpose(0, 1)
        products = torch.bmm(chunks, chunks.mT).view(-1, k * k)
        # Not checked, for that would wait for a GPU.
        sums = torch.segment_reduce(products, "sum", lengths=of.lengths, unsafe=True)
        return sums.view(-1, k, k)

    def combine(self, factors: Tensor, vectors: Tensor, out: Tensor, of: Chunks) -> None:
        """Write linear combinations of the k vectors of each map.

        Args:
            factors: Shape ``(L, h, k)``.
            vectors: Laid out like these.
            out: h rows laid out like these; may be among the vectors.
            of: Of which maps; the others are left alone.
        """
        factors = factors.to(vectors.dtype).index_select(0, of.owners)
        chunks = self._cut(vectors, of)
        if len(out) == 1:  # bmm would take three to six times as long
            combined = chunks[:1] * factors[:, 0, :1]
            for i in range(1, len(vectors)):
                combined.addcmul_(chunks[i : i + 1], factors[:, 0, i : i + 1])
        else:
            combined = torch.bmm(factors, chunks.transpose(0, 1)).transpose(0, 1)
        self._put(combined, out, of)

    def scale(self, factors: Tensor) -> None:
        """Multiply the first image of each map by a factor of its own, ``(L, 1)``."""
        factors = factors.to(self.tensor.dtype).index_select(0, self.all.owners)
        self._first_image.mul_(factors)

    def repeat_kept(self, of: Chunks) -> None:
        """Copy the first vector that is kept to the place of the first image."""
        self._put(self._cut(self.kept[:1], of), self.images[:1], of)

    def lean(self, length: float, of: Chunks) -> None:
        """Add to the last image a fixed direction, at some length."""
        last = self.images[-1:]
        self._put(self._cut(last, of).add(self._cut(self._direction, of), alpha=length), last, of)

    def fill(self, unknown: Tensor, of: Chunks) -> None:
        """Replace the first vectors by fixed unit vectors, where ``unknown``, ``(L, h)``, says."""
        if unknown.is_cpu and not unknown.any():
            return
        h = unknown.shape[1]
        mask = unknown.index_select(0, of.owners).T[..., None]
        vectors, fixed = (self._cut(tensor[:h], of) for tensor in (self.images, self._fixed))
        self._put(torch.where(mask, fixed, vectors), self.images[:h], of)

    def _cut(self, tensor: Tensor, of: Chunks) -> Tensor:
        chunks = tensor.view(len(tensor), -1, self._chunk)
        return chunks if of.numbers is None else chunks.index_select(1, of.numbers)

    def _put(self, chunks: Tensor, out: Tensor, of: Chunks) -> None:
        places = out.view(len(out), -1, self._chunk)
        if of.numbers is None:
            places.copy_(chunks)
        else:
            places.index_copy_(1, of.numbers, chunks)

    @cached_property
    def _direction(self) -> Tensor:
        """A fixed unit vector of each map, laid out in one row like these, in half precision."""
        return self._signs(self.tensor.new_zeros(1, self.tensor.shape[1], dtype=torch.bfloat16))

    @cached_property
    def _fixed(self) -> Tensor:
        """Fixed unit vectors, laid out like these; made only if they are needed."""
        return self._signs(torch.zeros_like(self.tensor))

    def _signs(self, rows: Tensor) -> Tensor:
        for part in self.parts(rows):
            k, n = part.shape[-2:]
            part.copy_(signs(k, n).double() / math.sqrt(n))
        return rows


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


def signs(k: int, n: int) -> Tensor:
    """Return k rows of n signs without a pattern that a weight is likely to annihilate."""
    first, second = (torch.arange(1, end + 1, device="cpu") for end in (k, n))
    multiples = first[:, None] * second * (math.sqrt(5) - 1) / 2
    return torch.where(multiples.frac() < 0.5, 1.0, -1.0)
