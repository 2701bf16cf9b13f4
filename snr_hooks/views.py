"""A weight as a linear map. All conventions about what is a matrix are fixed here.

A view turns a weight tensor into a map W from R^n (inputs) to R^m (outputs), where u
denotes a vector of outputs and v a vector of inputs. ``MatrixView`` is the definition of
the paper (section 3) and of ``torch.nn.utils.parametrizations.spectral_norm``: output
channels are rows, everything else is flattened into columns, in the tensor's logical order.

======================  =========================  ==============  ======================
layer                   weight                     view            matrix
======================  =========================  ==============  ======================
Linear                  (out, in)                  MatrixView(0)   (out, in)
Conv2d                  (out, in/g, kh, kw)        MatrixView(0)   (out, in/g * kh * kw)
ConvTranspose2d         (in, out/g, kh, kw)        MatrixView(1)   (out/g, in * kh * kw)
======================  =========================  ==============  ======================

and likewise in one and three dimensions. The norm of such a matrix is *not* the norm of a
convolution as an operator on images; tables that print it say "matrix".

A new way to see a weight is a new class with the same methods: the code that iterates
and adds the term never asks which view it holds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from snr_hooks._text import dimensions
from snr_hooks.observation import InputSize
from snr_hooks.products import Product, times, transposed_times
from snr_hooks.sharding import Part, local, whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Adder = Callable[[Tensor, float | Tensor], None]
"""Adds a multiple of a prepared matrix to a gradient, in place. No closure: copies and pickles of
a wrapper hold some of these, with vectors of their own."""


class View(Protocol):
    """What the code that iterates and adds needs of a view; ``MatrixView`` documents it."""

    @property
    def group(self) -> "ProcessGroup | None":
        """The processes over which products are to be added up, if there are several."""

    @property
    def version(self) -> object:
        """What products were prepared for, besides the weight: another one, and they are stale."""

    @property
    def pooled(self) -> bool:
        """Whether blocks are those of one map, whose largest singular values alone count."""

    @property
    def observes(self) -> InputSize | None:
        """The size of an input that forward passes are to be watched for, if any."""

    @property
    def is_linear(self) -> bool:
        """Whether the map is linear in the weight: then its gradients do not depend on it."""

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the map as a matrix, shape ``(m, n)``; blocks as ``(blocks, m, n)``."""

    def shape(self, weight: Tensor) -> tuple[int, ...]:
        """Return the shape of ``matrix``."""

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare W v for each row of v, ``(k, n)``, to be written to ``out``, ``(k, m)``."""

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare W^T u for each row of u, ``(k, m)``, to be written to ``out``, ``(k, n)``."""

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of multiples of u v^T to a gradient."""

    def describe(self, weight: Tensor) -> str:
        """Return how the matrix is made."""


@dataclass(frozen=True)
class MatrixView:
    """A weight flattened to a matrix with the output channels as rows.

    Attributes:
        out_axis: The dimension of the weight that holds the output channels.
    """

    out_axis: int = 0

    group = None  # this process holds all of the weight
    version = None
    observes = None
    is_linear = True
    pooled = False

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix, shape ``(m, n)``; a view where strides allow."""
        return weight.movedim(self.out_axis, 0).flatten(1)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return ``(m, n)``, the number of outputs and of inputs."""
        m = weight.shape[self.out_axis]
        return m, weight.numel() // m

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare W v for each row of v.

        The function that is returned may be called again and again as long as the tensors are
        where they are; it reads what they hold by then. A weight that is not in the dtype of
        the vectors, or whose strides are not those of a matrix, is copied at every call.

        Args:
            weight: The weight.
            v: Vectors of inputs, shape ``(k, n)``.
            out: A tensor for the products, shape ``(k, m)``, a row a vector.

        Returns:
            A function without arguments that writes to ``out``.
        """
        matrix, inputs, order = self._in_memory(weight)
        if weight.dtype != v.dtype or matrix.data_ptr() != weight.data_ptr():
            return lambda: times(self.matrix(weight).to(v.dtype), v, out)()
        if order is None:
            return times(matrix, v, out)
        reordered = torch.empty_like(v)
        source = v.view(len(v), *inputs).permute(0, *order)
        target = reordered.view(source.shape)
        product = times(matrix, reordered, out)

        def reorder_and_multiply() -> None:
            target.copy_(source)
            product()

        return reorder_and_multiply

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare W^T u for each row of u, as ``matvec`` does W v.

        Args:
            weight: The weight.
            u: Vectors of outputs, shape ``(k, m)``.
            out: A tensor for the products, shape ``(k, n)``, a row a vector.

        Returns:
            A function without arguments that writes to ``out``.
        """
        matrix, inputs, order = self._in_memory(weight)
        if weight.dtype != u.dtype or matrix.data_ptr() != weight.data_ptr():
            return lambda: transposed_times(self.matrix(weight).to(u.dtype), u, out)()
        if order is None:
            return transposed_times(matrix, u, out)
        unordered = out.new_empty(out.shape)
        target = out.view(len(out), *inputs).permute(0, *order)
        source = unordered.view(target.shape)
        product = transposed_times(matrix, u, unordered)

        def multiply_and_reorder() -> None:
            product()
            target.copy_(source)

        return multiply_and_reorder

    def _in_memory(self, weight: Tensor) -> tuple[Tensor, list[int], list[int] | None]:
        """Return the matrix with its columns in the order in which they lie in memory.

        Under channels_last that avoids a copy of the weight; the vectors are reordered
        instead. Where no order avoids it, the first value is a copy. The second value is the
        shape of a vector of inputs, the third the order of its axes, counted from 1, or None
        where it is the logical one.
        """
        outputs_first = weight.movedim(self.out_axis, 0)
        strides = outputs_first.stride()
        logical = list(range(1, weight.ndim))
        order = sorted(logical, key=lambda axis: -strides[axis])
        if outputs_first.is_contiguous() or order == logical:
            return outputs_first.flatten(1), [], None
        matrix = outputs_first.permute(0, *order).flatten(1)
        return matrix, list(outputs_first.shape[1:]), order

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of multiples of u v^T to a gradient.

        Broadcasting reaches the gradient itself under any memory format, where
        ``grad.flatten(1).add_()`` would change a copy under channels_last. The product
        is formed in the dtype of u and v and rounded once, on its way into the gradient.

        Args:
            weight: The weight; only its shape matters.
            u: Shape ``(m,)``, or ``(r, m)`` for a sum of r products.
            v: Shape ``(n,)``, or ``(r, n)``.

        Returns:
            A function of a gradient, of any strides and dtype, and a factor: a number, or a
            scalar tensor where reading a number would wait for the device; for r products a
            tensor of shape ``(r,)``.
        """
        rows = [1] * weight.ndim
        rows[self.out_axis] = -1
        columns = list(weight.shape)
        columns[self.out_axis] = 1
        if u.ndim == 1:
            return partial(_add_product_, u.view(rows), v.view(columns))
        pairs = [(a.view(rows), b.view(columns)) for a, b in zip(u, v, strict=True)]
        return partial(_add_products_, pairs)

    def describe(self, weight: Tensor) -> str:
        """Return how the matrix is made, e.g. ``64 x 147 matrix, flatten(1)``."""
        transpose = "" if self.out_axis == 0 else f"movedim({self.out_axis}, 0)."
        return f"{dimensions(self.shape(weight))} matrix, {transpose}flatten(1)"


@dataclass(frozen=True)
class ShardedView:
    """A weight of which this process holds some rows, or some columns, of the matrix.

    Vectors are whole on every process. A product is computed from the local part alone: with
    a part of the rows it is a part of the product and zero elsewhere, with a part of the
    columns a summand. Either way the product is the sum over the group.

    Attributes:
        view: How the whole weight is seen.
        part: What is held here, split along the first or second dimension of the matrix.
    """

    view: MatrixView
    part: Part

    version = None
    observes = None
    is_linear = True
    pooled = False

    @property
    def group(self) -> "ProcessGroup":
        """The processes over which products are to be added up."""
        return self.part.group

    def matrix(self, weight: Tensor) -> Tensor:
        """Gather the weight as a matrix, on all processes of the group."""
        return self.view.matrix(whole(weight))

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return ``(m, n)`` of the whole matrix."""
        return self.view.shape(weight)

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare this process's summand of W v, as ``MatrixView.matvec`` does W v."""
        rows, columns = self._rows_and_columns(weight)
        return _from_zero(out, self.view.matvec(local(weight), v[:, columns], out[:, rows]))

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare this process's summand of W^T u, as ``MatrixView.rmatvec`` does W^T u."""
        rows, columns = self._rows_and_columns(weight)
        return _from_zero(out, self.view.rmatvec(local(weight), u[:, rows], out[:, columns]))

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of this process's part of u v^T to its part of a gradient."""
        rows, columns = self._rows_and_columns(weight)
        add = self.view.adder(local(weight), u[..., rows], v[..., columns])
        return partial(_add_to_part, add)

    def describe(self, weight: Tensor) -> str:
        """Return how the matrix is made, and over how many processes it is split."""
        split = "rows" if self.part.axis == self.view.out_axis else "columns"
        return f"{self.view.describe(weight)}, {split} over {self.group.size()} processes"

    def _rows_and_columns(self, weight: Tensor) -> tuple[slice, slice]:
        """Return which rows and columns of the matrix are held here."""
        everything = slice(None)
        if self.part.axis == self.view.out_axis:
            return slice(self.part.start, self.part.stop), everything
        width = math.prod(weight.shape[2:])
        return everything, slice(self.part.start * width, self.part.stop * width)


def _add_to_part(add: Adder, grad: Tensor, factor: float | Tensor) -> None:
    add(local(grad), factor)


def _from_zero(out: Tensor, product: Product) -> Product:
    def compute() -> None:
        out.zero_()
        product()

    return compute


def _add_product_(rows: Tensor, columns: Tensor, grad: Tensor, factor: float | Tensor) -> None:
    if isinstance(factor, Tensor):
        grad.addcmul_(rows * factor, columns)
    else:
        grad.addcmul_(rows, columns, value=factor)


def _add_products_(pairs: Sequence[tuple[Tensor, Tensor]], grad: Tensor, factors: Tensor) -> None:
    """Add the product of each pair with its factor, of those along the last dimension."""
    for (rows, columns), factor in zip(pairs, factors.unbind(-1), strict=True):
        _add_product_(rows, columns, grad, factor)
