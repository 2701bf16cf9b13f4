"""A convolution as the linear map that it is: from images to images.

The norm of this map, unlike that of the flattened kernel, says how much the layer can enlarge
a difference between two inputs. It depends on the size of the input, for at the borders a
convolution does less, and on stride, padding and dilation. Nothing is materialized: W v is the
convolution of an image v, W^T u its exact adjoint, and the gradient of u^T W v with respect to
the kernel is that of a convolution layer (Sedghi et al. 2019 treat circular padding by the
FFT; here all paddings are what they are).

A transposed convolution is the adjoint of a convolution with the same kernel, so everything
is said of the latter, the *kernel map*: from large images, padded and convolved, to small.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from snr_hooks._text import dimensions
from snr_hooks.observation import InputSize
from snr_hooks.products import Product
from snr_hooks.views import Adder

_CONVOLUTION = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}
_WEIGHT_GRADIENT: dict[int, Callable[..., Tensor]] = {
    1: conv1d_weight,
    2: conv2d_weight,
    3: conv3d_weight,
}

_LARGEST_MATRIX = 2**27
"""Entries of an operator from which it is not written out as a matrix: a gigabyte."""


@dataclass(frozen=True)
class ConvolutionView:
    """A convolution, or a transposed one, on images of a size.

    Attributes:
        stride: Of the layer.
        padding: Before and after, for each dimension; or ``"same"``, the padding that keeps
            ceil(size / stride).
        dilation: Of the layer.
        groups: Of the layer.
        mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``.
        output_padding: Of a transposed convolution; None for one that is not transposed.
        size: Of the layer's input.
    """

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...] | str
    dilation: tuple[int, ...]
    groups: int
    mode: str
    output_padding: tuple[int, ...] | None
    size: InputSize

    group = None  # this process holds all of the weight
    pooled = False
    is_linear = True

    @property
    def observes(self) -> InputSize | None:
        """What is to be watched in forward passes."""
        return None if self.size.is_given else self.size

    @property
    def version(self) -> tuple[int, ...] | None:
        """The size of the input, by which vectors are as long as they are."""
        return self.size.value

    def matrix(self, weight: Tensor) -> Tensor:
        """Return the operator as a matrix, shape ``(m, n)``, for small images.

        Raises:
            ValueError: It has too many entries.
        """
        m, n = self.shape(weight)
        if m * n > _LARGEST_MATRIX:
            raise ValueError(
                f"expected a convolution small enough to be written out, found an operator of "
                f"{m} x {n}: use the iteration (exact=False), or view 'matrix' or 'blocks'"
            )
        identity = torch.eye(n, dtype=weight.dtype, device=weight.device)
        return self._forward(weight, identity).mT

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """Return ``(m, n)``: the numbers of entries of an output and of an input."""
        small, large = self._images(weight)
        ends = math.prod(small), math.prod(large)
        return ends if self.output_padding is None else ends[::-1]

    def matvec(self, weight: Tensor, v: Tensor, out: Tensor) -> Product:
        """Prepare W v for each row of v, ``(k, n)``, to be written to ``out``, ``(k, m)``."""
        return lambda: out.copy_(self._forward(weight.to(v.dtype), v))

    def rmatvec(self, weight: Tensor, u: Tensor, out: Tensor) -> Product:
        """Prepare W^T u for each row of u, ``(k, m)``, to be written to ``out``, ``(k, n)``."""
        return lambda: out.copy_(self._adjoint(weight.to(u.dtype), u))

    def adder(self, weight: Tensor, u: Tensor, v: Tensor) -> Adder:
        """Prepare the addition of multiples of the gradient of u^T W v to a gradient.

        Args:
            weight: The weight.
            u: Shape ``(m,)``, or ``(r, m)`` for a sum of r.
            v: Shape ``(n,)``, or ``(r, n)``.

        Returns:
            A function of a gradient and a factor, or factors of shape ``(r,)``.
        """
        return partial(self._add, weight, u, v)

    def _add(
        self, weight: Tensor, u: Tensor, v: Tensor, grad: Tensor, factor: float | Tensor
    ) -> None:
        scaled = u * torch.as_tensor(factor, dtype=u.dtype, device=u.device)[..., None]
        small, large = (scaled, v) if self.output_padding is None else (v, scaled)
        grad.add_(self._weight_gradient(weight, small, large))

    def describe(self, weight: Tensor) -> str:
        """Return on what images the convolution is seen."""
        kind = "convolution" if self.output_padding is None else "transposed convolution"
        if self.size.value is None:
            return f"{kind} as operator, on the input of the first forward pass"
        small, large = self._images(weight)
        ends = (large, small) if self.output_padding is None else (small, large)
        return f"{kind} as operator, {dimensions(ends[0])} to {dimensions(ends[1])}"

    def bound(self, weight: Tensor) -> float:
        """Return an upper bound of the norm, however large the images are.

        Without its padding, the kernel map is a part of the circular convolution on the padded
        image, which the Fourier transform makes block-diagonal (Sedghi et al. 2019, theorem 6):
        its norm is the largest over all frequencies. Padding by zeros keeps norms; by copies, it
        enlarges them at most by the root of how often an entry is copied along each axis.

        Args:
            weight: The weight.

        Returns:
            The bound; close to the norm where the image is large, and padded by zeros.
        """
        _, (_, *sizes) = self._images(weight)
        paddings = self._paddings(weight)
        kernel = weight.detach().double().view(self.groups, -1, *weight.shape[1:])
        pairs = zip(self.dilation, kernel.shape[3:], strict=True)
        shape = [dilation * (size - 1) + 1 for dilation, size in pairs]
        dilated = kernel.new_zeros(*kernel.shape[:3], *shape)
        spread = dilated
        for axis, dilation in enumerate(self.dilation, start=3):
            spread = spread.movedim(axis, 0)[::dilation].movedim(0, axis)
        spread.copy_(kernel)
        axes = tuple(range(3, kernel.ndim))
        padded = [
            max(size + sum(padding), least)
            for size, padding, least in zip(sizes, paddings, shape, strict=True)
        ]
        transform = torch.fft.rfftn(dilated, padded, axes)
        blocks = transform.flatten(3).permute(0, 3, 1, 2)
        largest = float(torch.linalg.svdvals(blocks).max())
        copies = 1
        if self.mode != "zeros":
            for size, padding in zip(sizes, paddings, strict=True):
                places = torch.empty(1, 1, size, device="cpu")
                copies *= int(self._sources(places, 2, padding).bincount().max())
        return largest * math.sqrt(copies)

    # --- the kernel map and its adjoint ---

    def _forward(self, weight: Tensor, v: Tensor) -> Tensor:
        apply = self._convolve if self.output_padding is None else self._spread
        return apply(weight, v)

    def _adjoint(self, weight: Tensor, u: Tensor) -> Tensor:
        apply = self._spread if self.output_padding is None else self._convolve
        return apply(weight, u)

    def _convolve(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """Apply the kernel map: pad and convolve large images, given and returned as rows."""
        convolution: Any = _CONVOLUTION[weight.ndim - 2]
        images: Tensor = convolution(
            self._padded(weight, vectors),
            weight,
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )
        return images.flatten(1)

    def _spread(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """Apply the adjoint of the kernel map: from small images to large ones, as rows."""
        small, (_, *sizes) = self._images(weight)
        paddings = self._paddings(weight)
        missing = [
            size + sum(padding) - used
            for size, padding, used in zip(sizes, paddings, self._used(weight), strict=True)
        ]
        transposed: Any = _TRANSPOSED[weight.ndim - 2]
        spread: Tensor = transposed(
            vectors.reshape(-1, *small),
            weight,
            stride=self.stride,
            output_padding=missing,
            groups=self.groups,
            dilation=self.dilation,
        )
        return self._unpad(spread, sizes, paddings).flatten(1)

    def _weight_gradient(self, weight: Tensor, small: Tensor, large: Tensor) -> Tensor:
        """Return the gradient of the sum of small^T K large over all rows, K the kernel map."""
        shape, _ = self._images(weight)
        return _WEIGHT_GRADIENT[weight.ndim - 2](
            self._padded(weight, large),
            weight.shape,
            small.reshape(-1, *shape),
            stride=self.stride,
            dilation=self.dilation,
            groups=self.groups,
        )

    def _images(self, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of small and large images of the kernel map, channels first."""
        channels = len(weight), weight.shape[1] * self.groups
        known = self.size.known
        if self.output_padding is None:
            paddings = self._paddings(weight)
            counts = [
                (size + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
                for size, padding, dilation, kernel, stride in zip(
                    known, paddings, self.dilation, weight.shape[2:], self.stride, strict=True
                )
            ]
            if min(counts) < 1:
                raise ValueError(
                    "expected an input of at least the size of the kernel "
                    f"{tuple(weight.shape[2:])}, found {known}"
                )
            return (channels[0], *counts), (channels[1], *known)
        sizes = [
            (count - 1) * stride - sum(padding) + dilation * (kernel - 1) + 1 + extra
            for count, stride, padding, dilation, kernel, extra in zip(
                known,
                self.stride,
                self._paddings(weight),
                self.dilation,
                weight.shape[2:],
                self.output_padding,
                strict=True,
            )
        ]
        return (channels[0], *known), (channels[1], *sizes)

    def _paddings(self, weight: Tensor) -> Sequence[tuple[int, int]]:
        if not isinstance(self.padding, str):
            return self.padding
        paddings = []
        for size, stride, dilation, kernel in zip(
            self.size.known, self.stride, self.dilation, weight.shape[2:], strict=True
        ):
            total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            paddings.append((total // 2, total - total // 2))
        return paddings

    def _used(self, weight: Tensor) -> list[int]:
        """Return how much of each axis of padded large images the kernel reaches."""
        small, _ = self._images(weight)
        return [
            (count - 1) * stride + dilation * (kernel - 1) + 1
            for count, stride, dilation, kernel in zip(
                small[1:], self.stride, self.dilation, weight.shape[2:], strict=True
            )
        ]

    def _padded(self, weight: Tensor, vectors: Tensor) -> Tensor:
        """Return large images, given as rows, padded, without what the kernel does not reach."""
        _, large = self._images(weight)
        images = self._pad(vectors.reshape(-1, *large), self._paddings(weight))
        for axis, used in enumerate(self._used(weight), start=2):
            images = images.narrow(axis, 0, used)
        return images

    def _pad(self, images: Tensor, paddings: Sequence[tuple[int, int]]) -> Tensor:
        if self.mode == "zeros":
            return functional.pad(images, [end for pair in paddings[::-1] for end in pair])
        for axis, padding in enumerate(paddings, start=2):
            images = images.index_select(axis, self._sources(images, axis, padding))
        return images

    def _unpad(
        self, images: Tensor, sizes: Sequence[int], paddings: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Apply the adjoint of padding: every copied entry is added to where it came from."""
        for axis, (size, padding) in enumerate(zip(sizes, paddings, strict=True), start=2):
            if self.mode == "zeros":
                images = images.narrow(axis, padding[0], size)
                continue
            shape = list(images.shape)
            shape[axis] = size
            target = images.new_zeros(shape)
            images = target.index_add_(axis, self._sources(target, axis, padding), images)
        return images

    def _sources(self, images: Tensor, axis: int, padding: tuple[int, int]) -> Tensor:
        """Return, for each place of a padded axis, the place that it is copied from."""
        places = torch.arange(images.shape[axis], dtype=torch.float64, device=images.device)
        return functional.pad(places[None, None], padding, mode=self.mode)[0, 0].long()


def convolution_view(module: Any, size: InputSize, *, same: bool = False) -> ConvolutionView:
    """Return the view of a convolution layer.

    Args:
        module: A Conv1d-3d or ConvTranspose1d-3d, or a subclass that computes the same map.
        size: Of its input.
        same: Whether it pads as TensorFlow's SAME does, whatever its ``padding`` says.

    Returns:
        The view.
    """
    padding = module.padding
    if same or padding == "same":
        paddings: tuple[tuple[int, int], ...] | str = "same"
    elif padding == "valid":
        paddings = ((0, 0),) * len(module.stride)
    else:
        paddings = tuple((width, width) for width in padding)
    return ConvolutionView(
        module.stride,
        paddings,
        module.dilation,
        module.groups,
        module.padding_mode,
        module.output_padding if module.transposed else None,
        size,
    )
