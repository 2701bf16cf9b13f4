"""The size of the images that a layer gets, seen as they pass."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class InputSize:
    """The size of a layer's input, without batch and channels: given, or that of the last pass.

    Only passes with gradients count: an evaluation at another resolution changes nothing.

    Args:
        name: Of the layer's weight, for messages.
        module: The layer.
        value: The size, if it is given.
    """

    def __init__(self, name: str, module: nn.Module, value: tuple[int, ...] | None = None) -> None:
        self._name = name
        self._module = module
        self.value = value
        self.is_given = value is not None

    @property
    def known(self) -> tuple[int, ...]:
        """The size.

        Raises:
            ValueError: It was not given, and no pass was seen.
        """
        if self.value is None:
            raise ValueError(
                f"expected the input size of {self._name!r} to be known, found that no forward "
                "pass with gradients has gone through its layer since the optimizer was wrapped: "
                "run one, or give input_size in choose"
            )
        return self.value

    def watch(self) -> RemovableHandle:
        """Note the size in every forward pass, until the handle is removed."""
        return self._module.register_forward_pre_hook(_Watcher(self), with_kwargs=True)

    def see(self, images: Tensor) -> None:
        """Note the size of a batch of images, or of one image."""
        weight: Any = self._module.weight
        self.value = tuple(images.shape[2 - weight.ndim :])


class _Watcher:
    """The hook. Copied or pickled with its module, as for an EMA, it watches no more."""

    def __init__(self, size: InputSize | None = None) -> None:
        self._size = None if size is None else weakref.ref(size)

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Note the size of the first input."""
        size = None if self._size is None else self._size()
        if size is not None and torch.is_grad_enabled():
            size.see(inputs[0] if inputs else next(iter(named.values())))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Watcher, ()
