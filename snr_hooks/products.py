"""Products of a matrix with a few vectors, close to the speed of reading the matrix.

W V and W^T U for one to eight vectors do so little arithmetic that the time is that of
reading W, if the kernel does not waste more. The vectors are rows and so are the products:
BLAS is up to twice as fast on ``V W^T`` with up to three rows as on ``W V^T`` with as many
columns (2 cores, MKL, float32, the weights of ResNet-18 and -50, MobileNetV3, ConvNeXt and ViT),
and three rows cost what two do. With more rows it is slow, unless the matrix is cut into slices,
which ``torch.bmm`` deals out to the cores. So is ``U W`` with a matrix of a million entries: cut,
it takes a fifth to two fifths less time. The choice depends on shapes alone, never on a timing, so
that every run of a program rounds alike.

Each function prepares a product, with all the views that it needs, and returns a function that
computes it from what matrix and vectors hold by then: for a small weight, making the views
takes longer than the product.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Product = Callable[[], object]
"""Computes a product that was prepared."""

_FEW = 3  # rows up to which a whole product is fast
_SMALL = 3 * 2**14  # entries of a matrix below which cutting it costs more than it saves
_THIN = 8  # rows of a slice, of which there is one product each
_LARGE = 2**20  # entries from which on cutting pays also where products are added up
_THICK = (64, 48, 50, 40, 32, 24)  # rows of a slice then, the first that divides
_MANY = 8  # vectors up to which it pays, and the products that are added up stay small


def times(matrix: Tensor, vectors: Tensor, out: Tensor) -> Product:
    """Prepare W v for each v.

    Args:
        matrix: Shape ``(m, n)``.
        vectors: Shape ``(k, n)``.
        out: Where to write the products, shape ``(k, m)``.

    Returns:
        A function without arguments.
    """
    (m, n), k = matrix.shape, len(vectors)
    if k > _FEW and m % _THIN == 0 and _can_be_cut(matrix, _SMALL):
        slices = matrix.view(m // _THIN, _THIN, n).mT
        repeated = vectors.expand(m // _THIN, k, n)
        pieces = out.view(k, m // _THIN, _THIN).transpose(0, 1)
        return partial(_multiply_and_copy, repeated, slices, pieces)
    return partial(torch.mm, vectors, matrix.mT, out=out)


def transposed_times(matrix: Tensor, vectors: Tensor, out: Tensor) -> Product:
    """Prepare W^T u for each u.

    Args:
        matrix: Shape ``(m, n)``.
        vectors: Shape ``(k, m)``.
        out: Where to write the products, shape ``(k, n)``.

    Returns:
        A function without arguments.
    """
    (m, n), k = matrix.shape, len(vectors)
    thickness = next((rows for rows in _THICK if m % rows == 0), None)
    if 1 < k <= _MANY and thickness is not None and _can_be_cut(matrix, _LARGE):
        slices = matrix.view(-1, thickness, n)
        pieces = vectors.view(k, -1, thickness).transpose(0, 1)
        return partial(_multiply_and_sum, pieces, slices, out)
    return partial(torch.mm, vectors, matrix, out=out)


def _can_be_cut(matrix: Tensor, least: int) -> bool:
    """Whether slices are views, on a CPU, of a matrix that is large enough to make it pay."""
    return matrix.is_cpu and matrix.is_contiguous() and matrix.numel() >= least


def _multiply_and_copy(vectors: Tensor, slices: Tensor, out: Tensor) -> None:
    out.copy_(torch.bmm(vectors, slices))


def _multiply_and_sum(vectors: Tensor, slices: Tensor, out: Tensor) -> None:
    torch.sum(torch.bmm(vectors, slices), 0, out=out)
