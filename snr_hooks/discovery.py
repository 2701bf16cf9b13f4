"""Which parameters of a model are linear maps, and why the others are not.

``discover`` is a pure function of the model. Layer types are known to ``viewing`` and
``layouts``, and nowhere else.
A parameter becomes a target if it is the ``weight`` of a Linear, Conv1d-3d or
ConvTranspose1d-3d module (subclasses included) and a real, dense, trainable leaf. Never by
its shape: position embeddings, class tokens, LayerScale gammas, relative position tables
and temperatures have two or more dimensions and are no linear maps. What else can be chosen
is in ``choices``; which maps a module stacks in one weight is in ``layouts``.
"""

import fnmatch
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from snr_hooks._text import dimensions, nearest, table
from snr_hooks.choices import Choices, Choose, Strength
from snr_hooks.modules import WRAPPERS, Owned, holders, parameter_names
from snr_hooks.penalties import HALF_SQUARE, Penalty
from snr_hooks.viewing import aliases, effective_name, see
from snr_hooks.views import View

Selection = str | Iterable[str] | Callable[[str], bool] | None
"""Shell patterns on parameter names (one or several), or a predicate on the name."""


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


def discover(
    model: nn.Module,
    include: Selection = None,
    exclude: Selection = None,
    choose: Choose | Choices = None,
) -> Discovery:
    """Find the weights of a model that can be regularized.

    Args:
        model: Any module; the meta device will do.
        include: If given, only parameters it matches: shell patterns on the names
            (``"layer4.*"``, or several), or a predicate ``name -> bool``.
        exclude: Parameters it matches are skipped; it wins over ``include``.
        choose: How weights are regularized, as described in ``choices``, or that already
            read. None: each as the paper's matrix.

    Returns:
        The targets, and all else of two or more dimensions with the reason. A parameter
        held under several names is a target once and matches by any of its names.

    Raises:
        TypeError: ``model`` is no module, or a selection or choice is of another type.
        ValueError: An include pattern matches no parameter, a lazy parameter is uninitialized,
            or a choice is unknown, contradicts another or does not fit a weight.
    """
    held = holders(model)
    names = parameter_names(model)
    choices = _choices(choose, names)
    known = [*names, *map(effective_name, names)]
    included = _matcher(include, known, "include", default=True)
    excluded = _matcher(exclude, known, "exclude", default=False)
    targets, skipped = [], []
    for owners in held:
        found, reason = _targets(owners, choices)
        name = found[0].parameter_name
        called = [alias for owner in owners for alias in aliases(owner)]
        unselected = None if any(map(included, called)) else "not matched by include"
        if any(map(excluded, called)):
            unselected = "matched by exclude"
        if reason is None and unselected is None:
            # Other parameters, too, that forward makes the weight from.
            others = [target for target in found if target.parameter_name != name]
            targets += [t for t in others if _is_trained(t) and not excluded(t.parameter_name)]
        reason = reason or _not_trainable(owners) or unselected
        if reason is None:
            targets += [target for target in found if target.parameter_name == name]
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
    targets.sort(key=lambda target: position[target.parameter_name])
    skipped.sort(key=lambda skip: position[skip.name])
    return Discovery(tuple(targets), tuple(skipped))


def linear_maps(model: nn.Module, choose: Choose | Choices = None) -> list[Target]:
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
    held = holders(model)
    choices = _choices(choose, parameter_names(model))
    found = (_targets(owners, choices) for owners in held)
    return [target for targets, reason in found if reason is None for target in targets]


def _choices(choose: Choose | Choices, names: list[str]) -> Choices:
    choices = choose if isinstance(choose, Choices) else Choices(choose)
    choices.check_patterns([*names, *map(effective_name, names)])
    return choices


def _targets(owners: list[Owned], choices: Choices) -> tuple[list[Target], str | None]:
    """Return what a parameter is, and why it is no linear map."""
    choice = choices.of([name for owner in owners for name in aliases(owner)])
    found, reason = see(owners, choice)
    targets = []
    for name, parameter, view, part in found:
        own = choice if parameter is owners[0].parameter else choices.of([name])
        if own is not choice and own.view == "skip":
            continue
        strength = choice.lambda_ if own.lambda_ is None else own.lambda_
        chosen = choice.penalty, choice.top, strength
        targets.append(Target(name + part, parameter, view, *chosen, part))
    return targets, reason


def _is_trained(target: Target) -> bool:
    return target.parameter.requires_grad and target.parameter.is_leaf


def _not_trainable(owners: list[Owned]) -> str | None:
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
    if callable(selection) and not isinstance(selection, nn.Module):
        return selection
    patterns: list[Any] = [selection]
    if isinstance(selection, Iterable) and not isinstance(selection, str):
        patterns = list(selection)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"expected {which} to be None, a shell pattern, several of them, or a "
            f"predicate on parameter names, found {selection!r}"
        )
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            within = any(name.startswith(f"{pattern}.") for name in names)
            hint = f"of that module: '{pattern}.*'" if within else nearest(pattern, names)
            if any(f"{prefix}." in pattern for prefix in WRAPPERS.values()):
                hint = "names are those of the bare model, without what DDP and torch.compile add"
            message = f"the {which} pattern {pattern!r} matches no parameter of the model; {hint}"
            if which == "include":
                raise ValueError(message)
            warnings.warn(message, stacklevel=3)
    return lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
