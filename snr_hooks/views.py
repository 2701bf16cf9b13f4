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

from dataclasses import dataclass

import torch
from torch import Tensor

from snr_hooks._text import dimensions


@dataclass(frozen=True)
class MatrixView:
    """A weight flattened to a matrix with the output channels as rows.

    Attributes:
        out_axis: The dimension of the weight that holds the output channels.
    """

    out_axis: int = 0

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the weight as a matrix, shape ``(m, n)``; a view where strides allow."""
        return weight.movedim(self.out_axis, 0).flatten(1)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return ``(m, n)``, the number of outputs and of inputs."""
        m = weight.shape[self.out_axis]
        return m, weight.numel() // m

    def matvec(self, weight: Tensor, v: Tensor) -> Tensor:
        """Return W v, shape ``(..., m)``, for v of shape ``(..., n)``."""
        return torch.nn.functional.linear(v, self.matrix(weight))

    def rmatvec(self, weight: Tensor, u: Tensor) -> Tensor:
        """Return W^T u, shape ``(..., n)``, for u of shape ``(..., m)``."""
        return u @ self.matrix(weight)

    def add_outer_(self, grad: Tensor, u: Tensor, v: Tensor) -> None:
        """Add u v^T to a gradient in place, whatever its strides and dtype.

        Broadcasting reaches the gradient itself under any memory format, where
        ``grad.flatten(1).add_()`` would change a copy under channels_last. The product
        is formed in the dtype of u and v and rounded once, on its way into ``grad``.

        Args:
            grad: A tensor of the weight's shape.
            u: Shape ``(m,)``.
            v: Shape ``(n,)``.
        """
        rows = [1] * grad.ndim
        rows[self.out_axis] = -1
        columns = list(grad.shape)
        columns[self.out_axis] = 1
        grad.addcmul_(u.view(rows), v.view(columns))

    def describe(self, weight: Tensor) -> str:
        """Return how the matrix is made, e.g. ``64 x 147 matrix, flatten(1)``."""
        transpose = "" if self.out_axis == 0 else f"movedim({self.out_axis}, 0)."
        return f"{dimensions(self.shape(weight))} matrix, {transpose}flatten(1)"
