"""Where a model holds its parameters, under the names of the model inside its wrappers."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter

from snr_hooks.layouts import Place

# Where they hold the model that a parameter's name starts from.
WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


Slot = tuple[Mapping[str, nn.Parameter | None], str]
"""The parameters of a module, and the name of one there: what the module holds under it by now."""


class Owned(NamedTuple):
    """One place where a model holds a parameter.

    Attributes:
        name: As in ``model.named_parameters()``, without the prefixes of wrappers.
        place: The module, and where that is.
        parameter: The parameter.
    """

    name: str
    place: Place
    parameter: nn.Parameter


def parameter_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters, duplicates included."""
    return [
        joined(path, attribute)
        for path, module, _ in _named_modules(model)
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def holders(model: nn.Module) -> list[list[Owned]]:
    """Group the places that hold a parameter of two or more dimensions by parameter."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module as model, found {type(model).__name__}: "
            "pass the model itself, not its parameters"
        )
    held: dict[int, list[Owned]] = {}
    for path, module, parents in _named_modules(model):
        for attribute, parameter in module.named_parameters(recurse=False):
            name = joined(path, attribute)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"expected initialized parameters, found the lazy {name!r} without a "
                    "shape: run one forward pass of the model first"
                )
            if parameter.ndim >= 2:
                owned = Owned(name, Place(module, attribute, parents), parameter)
                held.setdefault(id(parameter), []).append(owned)
    return list(held.values())


def parameter_at(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a model holds under the name of a target, if any."""
    parameters, attribute = slot(model, name) or ({}, "")
    return parameters.get(attribute)


def slot(model: nn.Module, name: str) -> Slot | None:
    """Return where a model holds the parameter of a target, if it has such a module."""
    module, path = model, name.split(".")
    while len(path) > 1 or _wrapped_at(module):
        child = module._modules.get(_wrapped_at(module) or path.pop(0))
        if child is None:
            return None
        module = child
    return module._parameters, path[0]


def _wrapped_at(module: nn.Module) -> str | None:
    """Return the attribute at which a wrapper such as DDP holds a model, None if it is none.

    By the names of its classes, because importing torch.compile's takes seconds; of all of
    them, because ``fully_shard`` derives a class of its own from that of a module.
    """
    for base in type(module).__mro__:
        attribute = WRAPPERS.get(base.__name__)
        if attribute in module._modules:
            return attribute
    return None


_Parents = tuple[tuple[nn.Module, str], ...]


def _named_modules(
    module: nn.Module, path: str = "", parents: _Parents = ()
) -> Iterator[tuple[str, nn.Module, _Parents]]:
    """Yield all modules with their names and parents, duplicates included, but no wrappers."""
    attribute = _wrapped_at(module)
    if attribute is None:
        yield path, module, parents
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == attribute:
            yield from _named_modules(child, path, parents)
        else:
            yield from _named_modules(child, joined(path, name), ((module, name), *parents))


def joined(path: str, name: str) -> str:
    """Return the name of something inside a module."""
    return f"{path}.{name}" if path else name
