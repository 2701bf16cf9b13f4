"""A weight as several linear maps of equal shape: groups, heads, gates, experts.

A grouped convolution is block-diagonal, a fused qkv projection is three maps, or three for
each head. Each is a stack of matrices inside one weight, and which entries belong to which is
said by one reshape and the roles of its dimensions:

==============================  =============================  ==========  ======
weight                          reshaped to                    blocks      rows
==============================  =============================  ==========  ======
grouped Conv2d                  (g, out/g, in/g, kh, kw)       0           1
grouped ConvTranspose2d         (g, in/g, out/g, kh, kw)       0           2
qkv, (3 * heads * d, in)        (3, heads * d, in)             0           1
the same per head               (3, heads, d, in)              0, 1        2
output projection per head      (out, heads, d)                1           0
LSTM weight_ih, (4 * h, in)     (4, h, in)                     0           1
CondConv2d, (experts, flat)     (experts, out, flat / out)     0           1
==============================  =============================  ==========  ======

All other dimensions are columns. The products of all blocks are one ``torch.bmm``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from snr_hooks._text import dimensions
from snr_hooks.products import Product
from snr_hooks.views import Adder


@dataclass(frozen=True)
class BlockView:
    """Blocks of a weight, each a matrix with singular values of its own.

    Attributes:
        sizes: The shape that the weight is reshaped to. Its dimensions are split, never merged.
        blocks: Which of these dimensions number the blocks.
        rows: Which of them are rows. The others are columns.
        part: A dimension, a start and a stop, of which alone the blocks are made; None for all.
        pooled: Whether the blocks are one block-diagonal map. Its singular values are those of
            all blocks, and the largest are those that count. Otherwise each block is a map.
        unit: What a block is called in tables.
    """

    sizes: tuple[int, ...]
    blocks: tuple[int, ...] = (0,)
    rows: tuple[int, ...] = (1,)
    part: tuple[int, int, int] | None = None
    pooled: bool = False
    unit: str = "blocks"

    group = None  # this process holds all of the weight
    version = None
    observes = None
    is_linear = True

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the blocks, shape ``(blocks, m, n)``; a view where strides allow."""
        return self._arranged(weight).reshape(self.shape(weight))

    def shape(self, weight: Tensor) -> tuple[int, int, int]:
        """Return ``(blocks, m, n)``."""
        del weight  # the sizes say it all, also of one that is elsewhere
        b, r, c = self._shapes()
        return math.prod(b), math.prod(r), math.prod(c)

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare W v for each block and each of its vectors.

        Args:
            weight: The weight.
            v: Vectors of inputs, shape ``(blocks, k, n)``.
            out: A tensor for the products, shape ``(blocks, k, m)``.

        Returns:
            A function without arguments that writes to ``out``; see ``MatrixView.matvec``.
        """
        return self._prepared(weight, v.dtype, lambda matrix: torch.bmm(v, matrix.mT, out=out))

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare W^T u for each block and each of its vectors, as ``matvec`` does W v.

        Args:
            weight: The weight.
            u: Vectors of outputs, shape ``(blocks, k, m)``.
            out: A tensor for the products, shape ``(blocks, k, n)``.

        Returns:
            A function without arguments that writes to ``out``.
        """
        return self._prepared(weight, u.dtype, lambda matrix: torch.bmm(u, matrix, out=out))

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of multiples of u v^T of each block to a gradient.

        Args:
            weight: The weight; its shape does not matter, for ``sizes`` has it.
            u: Shape ``(blocks, r, m)``.
            v: Shape ``(blocks, r, n)``.

        Returns:
            A function of a gradient, of any strides and dtype, and of factors, shape
            ``(blocks, r)``.
        """
        del weight
        b, r, c = self._shapes()
        ones_r, ones_c = (1,) * len(r), (1,) * len(c)
        products = [
            (rows.view(*b, *r, *ones_c), columns.view(*b, *ones_r, *c))
            for rows, columns in zip(u.unbind(1), v.unbind(1), strict=True)
        ]
        return partial(self._add, products)

    def _add(
        self,
        products: Sequence[tuple[Tensor, Tensor]],
        grad: Tensor,
        factors: float | Tensor,
    ) -> None:
        arranged = self._arranged(grad)
        b, r, c = self._shapes()
        each = torch.as_tensor(factors).to(products[0][0].dtype).unbind(-1)
        for (rows, columns), factor in zip(products, each, strict=True):
            scaled = rows * factor.view(*b, *(1,) * len(r + c))
            arranged.addcmul_(scaled, columns)

    def describe(self, weight: Tensor) -> str:
        """Return how many blocks of which shape, and which of their norms count."""
        n_blocks, m, n = self.shape(weight)
        norm = "the largest norm" if self.pooled else "each"
        return f"{n_blocks} {self.unit} of {dimensions((m, n))}, {norm}"

    def _arranged(self, tensor: Tensor) -> Tensor:
        """Return a view of a weight or gradient with dimensions of blocks, rows and columns."""
        arranged = tensor.view(self.sizes)
        if self.part is not None:
            axis, start, stop = self.part
            arranged = arranged.narrow(axis, start, stop - start)
        return arranged.permute(*self.blocks, *self.rows, *self._columns())

    def _columns(self) -> list[int]:
        taken = {*self.blocks, *self.rows}
        return [axis for axis in range(len(self.sizes)) if axis not in taken]

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Return the sizes of the dimensions of blocks, of rows and of columns."""
        sizes = list(self.sizes)
        if self.part is not None:
            axis, start, stop = self.part
            sizes[axis] = stop - start
        b, r, c = (
            tuple(sizes[axis] for axis in axes)
            for axes in (self.blocks, self.rows, self._columns())
        )
        return b, r, c

    def _prepared(
        self, weight: Tensor, dtype: torch.dtype, product: Callable[[Tensor], object]
    ) -> Product:
        """Fix the matrix of a product, or make it anew at every call where it is a copy."""
        matrix = self.matrix(weight)
        is_copied = matrix.data_ptr() != self._arranged(weight).data_ptr()
        if is_copied or weight.dtype != dtype:
            return lambda: product(self.matrix(weight).to(dtype))
        return partial(product, matrix)
