"""What a parameter is seen as: the view that is chosen, of what is stored or what forward uses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from snr_hooks._names import is_a
from snr_hooks.choices import Choice
from snr_hooks.effective import EffectiveView, Folded, Parametrized, Standardized, Stored
from snr_hooks.layouts import CONVOLUTIONS, LINEAR, TRANSPOSED, Heads, Place, maps_in
from snr_hooks.modules import Owned, joined
from snr_hooks.observation import InputSize
from snr_hooks.operators import convolution_view
from snr_hooks.sharding import is_sharded, part_of
from snr_hooks.views import MatrixView, ShardedView, View

# timm's weight-standardized convolutions, by name because timm is no dependency.
_STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}

# torch's parametrizations under which the penalty would be a constant.
_FIXED = {"_SpectralNorm", "_Orthogonal"}

# timm's convolutions that pad as TensorFlow's SAME does, by the size of the input.
SAME = {"Conv2dSame", "Conv2dSameExport", "StdConv2dSame", "ScaledStdConv2dSame"}


Function = Standardized | Parametrized | Folded


class Seen(NamedTuple):
    """A parameter, or a part of one, and its view.

    Attributes:
        name: Of the parameter.
        parameter: The leaf.
        view: How it is seen.
        part: What of it is seen, to end the name with; empty for all.
    """

    name: str
    parameter: nn.Parameter
    view: View
    part: str = ""


class _Used(NamedTuple):
    """A weight as forward uses it, by a function of what is stored if that is chosen.

    For a parametrized weight, name and place are those of the tensor that its module uses, and
    the parameter is a copy of that.
    """

    name: str
    place: Place
    parameter: nn.Parameter
    function: Function | None = None


def see(owners: Sequence[Owned], choice: Choice) -> tuple[list[Seen], str | None]:
    """Return what a parameter is seen as, under its main name, and why it is no linear map.

    Args:
        owners: All places that hold the parameter.
        choice: What is chosen for it.

    Returns:
        What is seen, of other parameters too where forward uses a function of several; and a
        reason for skipping the parameter, or None.

    Raises:
        ValueError: The choice does not fit the weight.
    """
    used = [_used(_Used(*owner), choice) for owner in owners]
    reasons = [_not_a_linear_map(weight, choice) for weight in used]
    main = reasons.index(None) if None in reasons else 0
    weight, reason = used[main], reasons[main]
    views: Mapping[str, View] = {"": _matrix(weight)}
    if choice.view == "skip":
        reason = "chosen to be skipped"
    if reason is None:
        views = _views(weight, choice) or views
    if reason is None and is_sharded(weight.parameter):
        views, reason = _sharded(weight, views)
    if reason is None and weight.function is not None:
        return _through(weight, views), None
    name, _, parameter = owners[main]
    return [Seen(name, parameter, view, part) for part, view in views.items()], reason


def _through(weight: _Used, views: Mapping[str, View]) -> list[Seen]:
    """Return each stored parameter of which forward uses a function."""
    function = weight.function
    assert function is not None
    with torch.no_grad():
        size = function().shape
    return [
        Seen(name, source, EffectiveView(view, function, source, size, function.name), part)
        for name, source in function.sources().items()
        for part, view in views.items()
    ]


def aliases(owner: Owned) -> list[str]:
    """Return the names that patterns may use: of what is stored, and of what it is used for."""
    if not isinstance(owner.place.module, ParametrizationList):
        return [owner.name]
    return [owner.name, effective_name(owner.name)]


def effective_name(name: str) -> str:
    """Return ``0.weight`` for ``0.parametrizations.weight.original``, other names as they are."""
    path, found, rest = f".{name}".rpartition(".parametrizations.")
    return joined(path[1:], rest.rpartition(".")[0]) if found else name


def _used(weight: _Used, choice: Choice) -> _Used:
    """Return what forward uses, if it is to be regularized in place of what is stored."""
    module, attribute, parents = weight.place
    if choice.weight == "stored":
        return weight
    if isinstance(module, ParametrizationList):
        (_, tensor), (holder, _) = parents[0], parents[1]
        first = next(iter(dict(module.named_parameters(recurse=False))))
        if attribute != first or any(type(p).__name__ in _FIXED for p in module):
            return weight
        name, place = effective_name(weight.name), Place(holder, tensor, parents[2:])
        function = Parametrized(holder, tensor, name.removesuffix(tensor))
        effective = nn.Parameter(function().detach())
        return _folded(_Used(name, place, effective, function), choice)
    if attribute == "weight" and is_a(module, *_STANDARDIZED):
        return _folded(
            weight._replace(function=Standardized(module, weight.name.removesuffix("weight"))),
            choice,
        )
    return _folded(weight, choice)


def _folded(weight: _Used, choice: Choice) -> _Used:
    """Fold the batch norm that follows a convolution, if that is chosen and there is one."""
    module, attribute, parents = weight.place
    if choice.weight != "folded" or attribute != "weight" or not parents:
        return weight
    if not isinstance(module, CONVOLUTIONS):
        return weight
    holder, name = parents[0]
    siblings = list(holder._modules.items())
    after = siblings[[sibling for sibling, _ in siblings].index(name) + 1 :]
    norm_name, norm = after[0] if after else ("", None)
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_var is None:
        return weight
    if norm.num_features != module.out_channels:
        return weight
    path = weight.name.removesuffix("weight")
    unfolded = weight.function or Stored(module, path)
    norm_name = path.removesuffix(f"{name}.") + norm_name
    return weight._replace(function=Folded(unfolded, module, norm, norm_name))


def _matrix(weight: _Used) -> MatrixView:
    return MatrixView(out_axis=1 if isinstance(weight.place.module, TRANSPOSED) else 0)


def _views(weight: _Used, choice: Choice) -> Mapping[str, View] | None:
    """Return the views that are chosen for a weight, by part; None for the matrix."""
    if not isinstance(choice.view, str):
        return {"": choice.view}
    if choice.view == "matrix":
        return None
    if choice.view == "operator" and isinstance(weight.place.module, CONVOLUTIONS):
        return {"": _operator(weight, choice)}
    try:
        maps = maps_in(
            weight.place,
            weight.parameter,
            per_head=choice.view == "heads",
            heads=Heads(choice.heads, choice.kv_heads),
        )
    except ValueError as error:
        raise ValueError(f"{weight.name!r}: {error}") from None
    if maps is None and choice.view == "heads" and (choice.heads or choice.kv_heads):
        raise ValueError(
            f"expected heads and kv_heads for projections of attention, found them for "
            f"{weight.name!r}, which is not known to be one: narrow the pattern, or pass a "
            "BlockView as view"
        )
    if maps is None or choice.norm is None:
        return maps
    pooled = choice.norm == "largest"
    return {part: replace(view, pooled=pooled) for part, view in maps.items()}


def _operator(weight: _Used, choice: Choice) -> View:
    module, size = weight.place.module, choice.input_size
    n_dimensions = weight.parameter.ndim - 2
    if size is not None and len(size) == 1:
        size *= n_dimensions
    if size is not None and len(size) != n_dimensions:
        raise ValueError(
            f"expected input_size of {weight.name!r} to have {n_dimensions} dimensions, found "
            f"{size}"
        )
    same = is_a(module, *SAME) and getattr(module, "same_pad", True)
    return convolution_view(module, InputSize(weight.name, module, size), same=same)


def _sharded(weight: _Used, views: Mapping[str, View]) -> tuple[Mapping[str, View], str | None]:
    """Return the view of the part of a sharded weight that is here, or why there is none."""
    view = views.get("")
    if not isinstance(view, MatrixView) or weight.function is not None:
        raise ValueError(
            f"expected view 'matrix' of the stored weight for {weight.name!r}, which is sharded, "
            "found another: parts of a weight have no other yet"
        )
    part = part_of(weight.parameter)
    if isinstance(part, str):
        return {"": view}, part
    return {"": ShardedView(view, part)}, None


def _not_a_linear_map(weight: _Used, choice: Choice) -> str | None:
    module, attribute, _ = weight.place
    kind, tensor = type(module).__name__, weight.parameter
    if isinstance(module, ParametrizationList):
        if any(type(part).__name__ in _FIXED for part in module):
            return "parametrized so that its singular values are fixed"
        return "parametrized: forward uses a function of this tensor"
    if choice.view == "matrix" or _views(weight, choice) is None:
        if not isinstance(module, LINEAR):
            return f"{kind}.{attribute} is not the weight of a Linear or convolution"
        if attribute != "weight":
            return f"{kind}.{attribute} is not 'weight', the matrix that {kind} applies"
    if weight.function is None and is_a(module, *_STANDARDIZED):
        return f"{kind} standardizes its weight: forward uses a function of this tensor"
    if tensor.is_complex() or not tensor.is_floating_point():
        return f"dtype {tensor.dtype} is not real floating point"
    if tensor.numel() == 0:
        return "empty"
    return None
