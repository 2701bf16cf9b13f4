"""Products of a matrix with a few vectors, close to the speed of reading the matrix.

W V and W^T U for one to eight vectors do so little arithmetic that the time is that of
reading W, if the kernel does not waste more. BLAS wastes a lot here: its matrix-vector
product runs on one core, and a product with a few vectors is slower as ``V W^T`` than as
``W V^T``, and slower whole than in pieces. On CPU the matrix is therefore cut into pieces,
which ``torch.bmm`` deals out to the cores. The cuts below were measured (2 cores, MKL, float32)
on the weights of ResNet-18 and -50, MobileNetV3, ConvNeXt and ViT. They depend on shapes
alone, never on a timing, so that every run of a program rounds alike.

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

_SMALL = 2**14  # entries of a matrix below which cutting it costs more than it saves
_WIDE = 1536  # columns from which it is best cut into thin slices
_THIN = 16
_PIECES = 4


def times(matrix: Tensor, vectors: Tensor, out: Tensor) -> Product:
    """Prepare W v for each v.

    Args:
        matrix: Shape ``(m, n)``.
        vectors: Shape ``(k, n)``.
        out: Where to write the products, a contiguous tensor of shape ``(m, k)``.

    Returns:
        A function without arguments.
    """
    m, n = matrix.shape
    k = len(vectors)
    if n >= _WIDE and _can_cut(matrix, m, _THIN):
        slices = matrix.view(m // _THIN, _THIN, n).mT
        repeated = vectors.expand(m // _THIN, k, n)
        return partial(_multiply_and_copy, repeated, slices, out.view(-1, _THIN, k).mT)
    if _can_cut(matrix, m, _PIECES):
        slices = matrix.view(_PIECES, m // _PIECES, n)
        repeated = vectors.mT.expand(_PIECES, n, k)
        return partial(torch.bmm, slices, repeated, out=out.view(_PIECES, -1, k))
    return partial(torch.mm, matrix, vectors.mT, out=out)


def transposed_times(matrix: Tensor, vectors: Tensor, out: Tensor) -> Product:
    """Prepare W^T u for each u.

    Args:
        matrix: Shape ``(m, n)``.
        vectors: Shape ``(k, m)``.
        out: Where to write the products, shape ``(k, n)``.

    Returns:
        A function without arguments.
    """
    m, n = matrix.shape
    k = len(vectors)
    if k > 2 and _can_cut(matrix, n, _PIECES):
        slices = matrix.view(m, _PIECES, n // _PIECES).transpose(0, 1)
        repeated = vectors.expand(_PIECES, k, m)
        pieces = out.view(k, _PIECES, n // _PIECES).transpose(0, 1)
        return partial(_multiply_and_copy, repeated, slices, pieces)
    if k <= 2 and _can_cut(matrix, m, _PIECES):
        slices = matrix.view(_PIECES, m // _PIECES, n)
        pieces = vectors.view(k, _PIECES, m // _PIECES).transpose(0, 1)
        return partial(_multiply_and_sum, pieces, slices, out)
    return partial(torch.mm, vectors, matrix, out=out)


def _multiply_and_copy(vectors: Tensor, slices: Tensor, out: Tensor) -> None:
    out.copy_(torch.bmm(vectors, slices))


def _multiply_and_sum(vectors: Tensor, slices: Tensor, out: Tensor) -> None:
    torch.sum(torch.bmm(vectors, slices), 0, out=out)


def _can_cut(matrix: Tensor, size: int, n_pieces: int) -> bool:
    """Whether cutting a matrix pays: on the CPU only, and if it is not small."""
    return (
        matrix.is_cpu
        and matrix.numel() >= _SMALL
        and size % n_pieces == 0
        and matrix.is_contiguous()
    )
