"""Which parameters of a model are linear maps, and why the others are not.

``discover`` is a pure function of the model. Layer types are known here and nowhere else.
A parameter becomes a target if it is the ``weight`` of a Linear, Conv1d-3d or
ConvTranspose1d-3d module (subclasses included) and a real, dense, trainable leaf. Never by
its shape: position embeddings, class tokens, LayerScale gammas, relative position tables
and temperatures have two or more dimensions and are no linear maps.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from snr_hooks._text import dimensions, nearest, table
from snr_hooks.sharding import is_sharded, part_of
from snr_hooks.views import MatrixView, ShardedView, View

Selection = str | Iterable[str] | Callable[[str], bool] | None
"""Shell patterns on parameter names (one or several), or a predicate on the name."""

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)

# timm's weight-standardized convolutions, by name because timm is no dependency.
_STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}

# Where they hold the model that a parameter's name starts from.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


class Target(NamedTuple):
    """A parameter seen as a linear map.

    Attributes:
        name: As in ``model.named_parameters()``, without the prefixes that DDP, torch.compile
            and checkpoint wrappers add: a state goes from a wrapped model to a bare one.
        parameter: The leaf itself.
        view: How it is seen as a linear map.
    """

    name: str
    parameter: nn.Parameter
    view: View


class Skipped(NamedTuple):
    """A parameter of two or more dimensions that is not regularized, and the reason."""

    name: str
    reason: str


class Discovery(NamedTuple):
    """Every parameter of two or more dimensions, under each of its names; printable.

    Attributes:
        targets: What is regularized, in the model's order.
        skipped: What is not, in the model's order.
    """

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]

    def __str__(self) -> str:
        """Return both lists as a table."""
        rows = [
            (name, dimensions(weight.shape), view.describe(weight))
            for name, weight, view in self.targets
        ]
        rows += [(s.name, "", f"skipped: {s.reason}") for s in self.skipped]
        total = f"{len(self.targets)} regularized, {len(self.skipped)} skipped"
        return f"{table(('parameter', 'shape', 'seen as'), rows)}\n{total}"

    def __repr__(self) -> str:
        return str(self)


class _Owned(NamedTuple):
    """One place where a model holds a parameter."""

    name: str
    module: nn.Module
    parameter: nn.Parameter


def discover(model: nn.Module, include: Selection = None, exclude: Selection = None) -> Discovery:
    """Find the weights of a model that can be regularized.

    Args:
        model: Any module; the meta device will do.
        include: If given, only parameters it matches: shell patterns on the names
            (``"layer4.*"``, or several), or a predicate ``name -> bool``.
        exclude: Parameters it matches are skipped; it wins over ``include``.

    Returns:
        The targets, and all else of two or more dimensions with the reason. A parameter
        held under several names is a target once and matches by any of its names.

    Raises:
        TypeError: ``model`` is no module, or a selection is of another type.
        ValueError: An include pattern matches no parameter, or a lazy parameter is
            uninitialized.
    """
    held = _holders(model)
    names = [
        _joined(path, attribute)
        for path, module in _named_modules(model)
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    ]
    included = _matcher(include, names, "include", default=True)
    excluded = _matcher(exclude, names, "exclude", default=False)
    targets, skipped = [], []
    for owners in held:
        target, reason = _as_linear_map(owners)
        if reason is None:
            reason = _not_trainable(owners)
        if reason is None and not any(included(owner.name) for owner in owners):
            reason = "not matched by include"
        if reason is None and any(excluded(owner.name) for owner in owners):
            reason = "matched by exclude"
        if reason is None:
            targets.append(target)
        else:
            skipped.append(Skipped(target.name, reason))
        skipped += [
            Skipped(owner.name, f"the same parameter as {target.name!r}")
            for owner in owners
            if owner.name != target.name
        ]
    position = {name: i for i, name in enumerate(names)}
    skipped.sort(key=lambda skip: position[skip.name])
    return Discovery(tuple(targets), tuple(skipped))


def linear_maps(model: nn.Module) -> list[Target]:
    """Find the linear maps of a model, trainable or not.

    Args:
        model: Any module.

    Returns:
        The maps in the model's order, one a parameter.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: A lazy parameter is uninitialized.
    """
    found = map(_as_linear_map, _holders(model))
    return [target for target, reason in found if reason is None]


def _holders(model: nn.Module) -> list[list[_Owned]]:
    """Group the places that hold a parameter of two or more dimensions by parameter."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module as model, found {type(model).__name__}: "
            "pass the model itself, not its parameters"
        )
    held: dict[int, list[_Owned]] = {}
    for path, module in _named_modules(model):
        for attribute, parameter in module.named_parameters(recurse=False):
            name = _joined(path, attribute)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"expected initialized parameters, found the lazy {name!r} without a "
                    "shape: run one forward pass of the model first"
                )
            if parameter.ndim >= 2:
                held.setdefault(id(parameter), []).append(_Owned(name, module, parameter))
    return list(held.values())


def parameter_at(model: nn.Module, name: str) -> nn.Parameter | None:
    """Return the parameter that a model holds under the name of a target, if any."""
    module, path = model, name.split(".")
    while len(path) > 1 or _wrapped_at(module):
        child = module._modules.get(_wrapped_at(module) or path.pop(0))
        if child is None:
            return None
        module = child
    return module._parameters.get(path[0])


def _wrapped_at(module: nn.Module) -> str | None:
    """Return the attribute at which a wrapper such as DDP holds a model, None if it is none.

    By the names of its classes, because importing torch.compile's takes seconds; of all of
    them, because ``fully_shard`` derives a class of its own from that of a module.
    """
    for base in type(module).__mro__:
        attribute = _WRAPPERS.get(base.__name__)
        if attribute in module._modules:
            return attribute
    return None


def _named_modules(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules with their names, duplicates included, passing over wrappers."""
    attribute = _wrapped_at(module)
    if attribute is None:
        yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _named_modules(child, path if name == attribute else _joined(path, name))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _as_linear_map(owners: list[_Owned]) -> tuple[Target, str | None]:
    """Return the parameter as target, under its main name, and why it is no linear map."""
    reasons = [_not_a_linear_map(owner) for owner in owners]
    main = reasons.index(None) if None in reasons else 0
    name, module, parameter = owners[main]
    view, reason = MatrixView(out_axis=1 if isinstance(module, _TRANSPOSED) else 0), reasons[main]
    if reason is None and is_sharded(parameter):
        part = part_of(parameter)
        if isinstance(part, str):
            reason = part
        else:
            return Target(name, parameter, ShardedView(view, part)), None
    return Target(name, parameter, view), reason


def _not_a_linear_map(owner: _Owned) -> str | None:
    kind, attribute = type(owner.module).__name__, owner.name.rpartition(".")[2]
    weight = owner.parameter
    if isinstance(owner.module, ParametrizationList):
        return "parametrized: forward uses a function of this tensor"
    if not isinstance(owner.module, _LINEAR):
        return f"{kind}.{attribute} is not the weight of a Linear or convolution"
    if attribute != "weight":
        return f"{kind}.{attribute} is not 'weight', the matrix that {kind} applies"
    if any(base.__name__ in _STANDARDIZED for base in type(owner.module).__mro__):
        return f"{kind} standardizes its weight: forward uses a function of this tensor"
    if weight.is_complex() or not weight.is_floating_point():
        return f"dtype {weight.dtype} is not real floating point"
    if weight.numel() == 0:
        return "empty"
    return None


def _not_trainable(owners: list[_Owned]) -> str | None:
    parameter = owners[0].parameter
    if not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if not parameter.is_leaf:
        return "not a leaf: its gradient is not accumulated"
    if any(getattr(owner.module, "sparse", False) is True for owner in owners):
        return "its gradient is sparse"
    return None


def _matcher(
    selection: Selection, names: list[str], which: str, *, default: bool
) -> Callable[[str], bool]:
    """Compile a selection into a predicate; None is ``default`` for every name."""
    if selection is None:
        return lambda name: default
    if callable(selection):
        return selection
    patterns = [selection] if isinstance(selection, str) else selection
    patterns = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"expected {which} to be None, a shell pattern, several of them, or a "
            f"predicate on parameter names, found {selection!r}"
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            within = any(name.startswith(f"{pattern}.") for name in names)
            hint = f"of that module: '{pattern}.*'" if within else nearest(pattern, names)
            if any(f"{prefix}." in pattern for prefix in _WRAPPERS.values()):
                hint = "names are those of the bare model, without what DDP and torch.compile add"
            message = f"the {which} pattern {pattern!r} matches no parameter of the model; {hint}"
            if which == "include":
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
