"""Which parameters of a model are linear maps, and why the others are not.

``discover`` is a pure function of the model. Layer types are known here and nowhere else.
A parameter becomes a target if it is the ``weight`` of a Linear, Conv1d-3d or
ConvTranspose1d-3d module (subclasses included) and a real, dense, trainable leaf. Never by
its shape: position embeddings, class tokens, LayerScale gammas, relative position tables
and temperatures have two or more dimensions and are no linear maps. What else can be chosen
is in ``choices``; which maps a module stacks in one weight is in ``layouts``.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.parametrize import ParametrizationList

from snr_hooks._text import dimensions, nearest, table
from snr_hooks.choices import Choice, Choices, Choose, Strength
from snr_hooks.effective import EffectiveView, Folded, Parametrized, Standardized, Stored
from snr_hooks.layouts import CONVOLUTIONS, TRANSPOSED, Heads, Place, maps_in
from snr_hooks.observation import InputSize
from snr_hooks.operators import convolution_view
from snr_hooks.penalties import HALF_SQUARE, Penalty
from snr_hooks.sharding import is_sharded, part_of
from snr_hooks.views import MatrixView, ShardedView, View

Selection = str | Iterable[str] | Callable[[str], bool] | None
"""Shell patterns on parameter names (one or several), or a predicate on the name."""

_LINEAR = (nn.Linear, *CONVOLUTIONS)

# timm's weight-standardized convolutions, by name because timm is no dependency.
_STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}

# torch's parametrizations under which the penalty would be a constant.
_FIXED = {"_SpectralNorm", "_Orthogonal"}

# timm's convolutions that pad as TensorFlow's SAME does, by the size of the input.
_SAME = {"Conv2dSame", "Conv2dSameExport", "StdConv2dSame", "ScaledStdConv2dSame"}

# Where they hold the model that a parameter's name starts from.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


Function = Standardized | Parametrized | Folded | Stored


class Target(NamedTuple):
    """A parameter, or a part of one, seen as a linear map or several.

    Attributes:
        name: As in ``model.named_parameters()``, without the prefixes that DDP, torch.compile
            and checkpoint wrappers add: a state goes from a wrapped model to a bare one. Where
            a parameter is several targets, ``part`` is at its end.
        parameter: The leaf itself.
        view: How it is seen as a linear map, or several.
        penalty: The function of its singular values that is kept small.
        top: How many of the largest singular values of each map.
        strength: lambda, in place of that of the param group, if it was chosen.
        part: What of the parameter the target is, as in ``qkv.weight[q]``; empty for all.
    """

    name: str
    parameter: nn.Parameter
    view: View
    penalty: Penalty = HALF_SQUARE
    top: int = 1
    strength: Strength | None = None
    part: str = ""

    @property
    def parameter_name(self) -> str:
        """The name of the parameter."""
        return self.name.removesuffix(self.part)


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
            (t.name, dimensions(t.parameter.shape), t.view.describe(t.parameter), _rule(t))
            for t in self.targets
        ]
        rows += [(s.name, "", f"skipped: {s.reason}", "") for s in self.skipped]
        total = f"{len(self.targets)} regularized, {len(self.skipped)} skipped"
        return f"{table(('parameter', 'shape', 'seen as', 'penalty'), rows)}\n{total}"

    def __repr__(self) -> str:
        return str(self)


def _rule(target: Target) -> str:
    """Return what is kept small, as a table says it."""
    of = "" if target.top == 1 else f" of the {target.top} largest"
    strength = target.strength
    scheduled = "scheduled" if callable(strength) else f"{strength}"
    return f"{target.penalty.name}{of}" + (f", lambda {scheduled}" if strength is not None else "")


class _Owned(NamedTuple):
    """One place where a model holds a parameter, and what forward uses in place of it, if that."""

    name: str
    place: Place
    parameter: nn.Parameter
    function: Function | None = None


def discover(
    model: nn.Module,
    include: Selection = None,
    exclude: Selection = None,
    choose: Choose = None,
) -> Discovery:
    """Find the weights of a model that can be regularized.

    Args:
        model: Any module; the meta device will do.
        include: If given, only parameters it matches: shell patterns on the names
            (``"layer4.*"``, or several), or a predicate ``name -> bool``.
        exclude: Parameters it matches are skipped; it wins over ``include``.
        choose: How weights are regularized, as described in ``choices``. None: each as the
            paper's matrix.

    Returns:
        The targets, and all else of two or more dimensions with the reason. A parameter
        held under several names is a target once and matches by any of its names.

    Raises:
        TypeError: ``model`` is no module, or a selection or choice is of another type.
        ValueError: An include pattern matches no parameter, a lazy parameter is uninitialized,
            or a choice is unknown, contradicts another or does not fit a weight.
    """
    held = _holders(model)
    names = _parameter_names(model)
    choices = _choices(choose, names)
    included = _matcher(include, names, "include", default=True)
    excluded = _matcher(exclude, names, "exclude", default=False)
    targets, skipped = [], []
    for owners in held:
        found, reason = _as_linear_maps(owners, choices)
        name = found[0].parameter_name
        if reason is None:
            reason = _not_trainable(owners)
        if reason is None and not any(included(owner.name) for owner in owners):
            reason = "not matched by include"
        if reason is None and any(excluded(owner.name) for owner in owners):
            reason = "matched by exclude"
        if reason is None:
            targets += found
        else:
            skipped.append(Skipped(name, reason))
        skipped += [
            Skipped(owner.name, f"the same parameter as {name!r}")
            for owner in owners
            if owner.name != name
        ]
    found_names = {target.parameter_name for target in targets}
    skipped = [skip for skip in skipped if skip.name not in found_names]
    position = {name: i for i, name in enumerate(names)}
    skipped.sort(key=lambda skip: position[skip.name])
    return Discovery(tuple(targets), tuple(skipped))


def linear_maps(model: nn.Module, choose: Choose = None) -> list[Target]:
    """Find the linear maps of a model, trainable or not.

    Args:
        model: Any module.
        choose: How they are seen; see ``discover``.

    Returns:
        The maps in the model's order.

    Raises:
        TypeError: ``model`` is no module, or a choice is of another type.
        ValueError: A lazy parameter is uninitialized, or a choice does not fit.
    """
    choices = _choices(choose, _parameter_names(model) if choose else [])
    found = (_as_linear_maps(owners, choices) for owners in _holders(model))
    return [target for targets, reason in found if reason is None for target in targets]


def _choices(choose: Choose, names: list[str]) -> Choices:
    choices = Choices(choose)
    choices.check_patterns([*names, *map(_effective_name, names)])
    return choices


def _parameter_names(model: nn.Module) -> list[str]:
    """Return the names of all parameters, duplicates included."""
    return [
        _joined(path, attribute)
        for path, module, _ in _named_modules(model)
        for attribute, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    ]


def _holders(model: nn.Module) -> list[list[_Owned]]:
    """Group the places that hold a parameter of two or more dimensions by parameter."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected a torch.nn.Module as model, found {type(model).__name__}: "
            "pass the model itself, not its parameters"
        )
    held: dict[int, list[_Owned]] = {}
    for path, module, parents in _named_modules(model):
        for attribute, parameter in module.named_parameters(recurse=False):
            name = _joined(path, attribute)
            if isinstance(parameter, UninitializedParameter):
                raise ValueError(
                    f"expected initialized parameters, found the lazy {name!r} without a "
                    "shape: run one forward pass of the model first"
                )
            if parameter.ndim >= 2:
                owned = _Owned(name, Place(module, attribute, parents), parameter)
                held.setdefault(id(parameter), []).append(owned)
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
            yield from _named_modules(child, _joined(path, name), ((module, name), *parents))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _as_linear_maps(owners: list[_Owned], choices: Choices) -> tuple[list[Target], str | None]:
    """Return what a parameter is, under its main name, and why it is no linear map."""
    choice = choices.of([name for owner in owners for name in _aliases(owner)])
    used = [_used(owner, choice) for owner in owners]
    reasons = [_not_a_linear_map(owner, choice) for owner in used]
    main = reasons.index(None) if None in reasons else 0
    owner, reason = used[main], reasons[main]
    views: Mapping[str, View] = {"": _matrix(owner)}
    if choice.view == "skip":
        reason = "chosen to be skipped"
    if reason is None:
        views = _views(owner, choice) or views
    if reason is None and is_sharded(owner.parameter):
        views, reason = _sharded(owner, views)
    chosen = choice.penalty, choice.top, choice.lambda_
    if reason is None and owner.function is not None:
        return _through(owner, views, chosen), None
    name, _, parameter, _ = owners[main]
    return [Target(name + part, parameter, v, *chosen, part) for part, v in views.items()], reason


_Chosen = tuple[Penalty, int, Strength | None]


def _through(owner: _Owned, views: Mapping[str, View], chosen: _Chosen) -> list[Target]:
    """Return targets for each stored parameter of which forward uses a function."""
    function = owner.function
    assert function is not None
    path = owner.name.removesuffix("weight")
    sources = {path + name: source for name, source in function.sources().items()}
    if isinstance(function, Folded) and function.gamma is not None:
        sources[function.norm_name] = function.gamma
    with torch.no_grad():
        size = function().shape
    return [
        Target(
            name + part,
            source,
            EffectiveView(view, function, source, size, _done_to(function)),
            *chosen,
            part,
        )
        for name, source in sources.items()
        if source.requires_grad or name == next(iter(sources))
        for part, view in views.items()
    ]


def _done_to(function: Function) -> str:
    if isinstance(function, Folded):
        return f"folded with {function.norm_name.removesuffix('.weight')}"
    return type(function).__name__.lower()


def _aliases(owner: _Owned) -> list[str]:
    """Return the names that patterns may use: of what is stored, and of what it is used for."""
    if not isinstance(owner.place.module, ParametrizationList):
        return [owner.name]
    return [owner.name, _effective_name(owner.name)]


def _effective_name(name: str) -> str:
    """Return ``0.weight`` for ``0.parametrizations.weight.original``, other names as they are."""
    path, found, rest = f".{name}".rpartition(".parametrizations.")
    return _joined(path[1:], rest.rpartition(".")[0]) if found else name


def _used(owner: _Owned, choice: Choice) -> _Owned:
    """Return what forward uses, if it is to be regularized in place of what is stored."""
    module, attribute, parents = owner.place
    if choice.weight == "stored":
        return owner
    if isinstance(module, ParametrizationList):
        (_, tensor), (holder, _) = parents[0], parents[1]
        first = next(iter(dict(module.named_parameters(recurse=False))))
        if attribute != first or any(type(p).__name__ in _FIXED for p in module):
            return owner
        function, place = Parametrized(holder, tensor), Place(holder, tensor, parents[2:])
        effective = nn.Parameter(function().detach())
        return _folded(_Owned(_effective_name(owner.name), place, effective, function), choice)
    if attribute == "weight" and _is_named(module, _STANDARDIZED):
        return _folded(owner._replace(function=Standardized(module)), choice)
    return _folded(owner, choice)


def _folded(owner: _Owned, choice: Choice) -> _Owned:
    """Fold the batch norm that follows a convolution, if that is chosen and there is one."""
    module, attribute, parents = owner.place
    if choice.weight != "folded" or attribute != "weight" or not parents:
        return owner
    if not isinstance(module, CONVOLUTIONS):
        return owner
    holder, name = parents[0]
    siblings = list(holder._modules.items())
    after = siblings[[sibling for sibling, _ in siblings].index(name) + 1 :]
    norm_name, norm = after[0] if after else ("", None)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        return owner
    if norm.num_features != module.out_channels:
        return owner
    path = owner.name.removesuffix("weight").removesuffix(f"{name}.")
    gamma = f"{path}{norm_name}.weight"
    weight = owner.function or Stored(module)
    return owner._replace(function=Folded(weight, module, norm, gamma))


def _matrix(owner: _Owned) -> MatrixView:
    return MatrixView(out_axis=1 if isinstance(owner.place.module, TRANSPOSED) else 0)


def _views(owner: _Owned, choice: Choice) -> Mapping[str, View] | None:
    """Return the views that are chosen for a weight, by part; None for the matrix."""
    if not isinstance(choice.view, str):
        return {"": choice.view}
    if choice.view == "matrix":
        return None
    if choice.view == "operator" and isinstance(owner.place.module, CONVOLUTIONS):
        return {"": _operator(owner, choice)}
    try:
        maps = maps_in(
            owner.place,
            owner.parameter,
            per_head=choice.view == "heads",
            heads=Heads(choice.heads, choice.kv_heads),
        )
    except ValueError as error:
        raise ValueError(f"{owner.name!r}: {error}") from None
    if maps is None or choice.norm is None:
        return maps
    pooled = choice.norm == "largest"
    return {part: replace(view, pooled=pooled) for part, view in maps.items()}


def _operator(owner: _Owned, choice: Choice) -> View:
    module, size = owner.place.module, choice.input_size
    n_dimensions = owner.parameter.ndim - 2
    if size is not None and len(size) != n_dimensions:
        raise ValueError(
            f"expected input_size of {owner.name!r} to have {n_dimensions} dimensions, found {size}"
        )
    same = _is_named(module, _SAME)
    return convolution_view(module, InputSize(owner.name, module, size), same=same)


def _is_named(module: nn.Module, names: set[str]) -> bool:
    """Return whether a class of a module has one of some names."""
    return any(base.__name__ in names for base in type(module).__mro__)


def _sharded(owner: _Owned, views: Mapping[str, View]) -> tuple[Mapping[str, View], str | None]:
    """Return the view of the part of a sharded weight that is here, or why there is none."""
    view = views.get("")
    if not isinstance(view, MatrixView):
        raise ValueError(
            f"expected view 'matrix' for {owner.name!r}, which is sharded, found "
            f"{type(view).__name__}: parts of a weight have no other yet"
        )
    part = part_of(owner.parameter)
    if isinstance(part, str):
        return {"": view}, part
    return {"": ShardedView(view, part)}, None


def _not_a_linear_map(owner: _Owned, choice: Choice) -> str | None:
    module, attribute, _ = owner.place
    kind, weight = type(module).__name__, owner.parameter
    if isinstance(module, ParametrizationList):
        if any(type(part).__name__ in _FIXED for part in module):
            return "parametrized so that its singular values are fixed"
        return "parametrized: forward uses a function of this tensor"
    if choice.view == "matrix" or _views(owner, choice) is None:
        if not isinstance(module, _LINEAR):
            return f"{kind}.{attribute} is not the weight of a Linear or convolution"
        if attribute != "weight":
            return f"{kind}.{attribute} is not 'weight', the matrix that {kind} applies"
    if owner.function is None and _is_named(module, _STANDARDIZED):
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
    if any(getattr(owner.place.module, "sparse", False) is True for owner in owners):
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
