"""What is chosen for which weight: the view, the penalty, lambda.

A choice is short where it can be, and reads the same in Python and in YAML::

    "blocks"                                         a view, for all weights
    {"*.qkv.weight": "heads", "head.*": "skip"}      views by shell patterns on names
    {"*": {"view": "operator", "penalty": {"hinge": 1.0}, "lambda": 0.05}}
    ["vit", {"head.weight": {"lambda": 0.0}}]        layers: the later win

Within one mapping, patterns that match the same weight may complete each other and must not
contradict each other.
"""

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Real
from typing import Any

from snr_hooks._text import nearest
from snr_hooks.penalties import HALF_SQUARE, Penalty, as_penalty
from snr_hooks.views import View

Strength = float | Callable[[int], float]
"""lambda, or a function of the number of steps taken."""

VIEWS = {
    "matrix": "the paper's: flattened to (out, everything else)",
    "blocks": "as what the module applies: groups, q k v, gates, experts; else the matrix",
    "heads": "attention per head; else as blocks",
    "operator": "a convolution as operator on its input; else as blocks",
    "skip": "not regularized",
}
_USED_BY = {
    "norm": ("blocks", "heads", "operator"),
    "heads": ("heads",),
    "kv_heads": ("heads",),
    "input_size": ("operator",),
}
"""The views that use a key; the other keys are for all."""
NORMS = ("largest", "each")
WEIGHTS = ("stored", "effective", "folded")

FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "residual": {"*": {"view": "blocks", "weight": "effective"}},
    "mobile": {"*": {"view": "blocks", "weight": "folded"}},
    "vit": {"*": {"view": "heads", "weight": "effective"}},
    "mixer": {"*": {"view": "blocks", "weight": "effective"}},
}
"""Choices for families of models; each may be given for any model.

Weights are seen as what the modules apply: groups of convolutions and what forward makes of
the stored weights, in mixers and ConvNeXts as in residual networks; heads in vision
transformers. Mobile networks alternate depthwise convolutions and batch norms, so that the
scale of a kernel says little until the batch norm is folded into it.
"""


@dataclass(frozen=True)
class Choice:
    """How one weight is regularized: all of it, where a mapping may say a part.

    Attributes:
        view: A key of ``VIEWS``, or any view of your own.
        norm: For blocks: ``"largest"``, the norm of the block-diagonal map, or ``"each"``,
            every block on its own. None: the largest of groups, which are one map, and each
            of all others, which are several.
        weight: ``"stored"``: the parameter, and no other; those of which forward uses a
            function are skipped. ``"effective"``: what forward uses. ``"folded"``: also with
            the batch norm that follows.
        penalty: The function of the singular values.
        top: How many of the largest singular values.
        lambda_: In place of that of the param group; a number or a function of the number
            of steps taken.
        heads: How many, where the module does not say.
        kv_heads: How many of keys and values, with grouped queries.
        input_size: Height and width (or as many dimensions as there are) of the input of a
            convolution as operator. None: that of the last forward pass with gradients.
    """

    view: str | View = "matrix"
    norm: str | None = None
    weight: str = "stored"
    penalty: Penalty = HALF_SQUARE
    top: int = 1
    lambda_: Strength | None = None
    heads: int | None = None
    kv_heads: int | None = None
    input_size: tuple[int, ...] | None = None


Choose = str | Mapping[str, Any] | Sequence[Any] | None
"""A view or family by name, patterns with choices, or several of these in layers."""

_KEYS = {"lambda": "lambda_"} | {f.name: f.name for f in fields(Choice) if f.name != "lambda_"}


@dataclass(frozen=True)
class _Layer:
    """The entries of one mapping, checked."""

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)

    def of(self, names: Iterable[str]) -> dict[str, Any]:
        """Return what is said of a weight, under any of its names; refuse contradictions."""
        names = list(names)
        found: dict[str, Any] = {}
        by: dict[str, str] = {}
        for pattern, entry in self.entries.items():
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                continue
            for key, value in entry.items():
                if key in found and found[key] != value:
                    raise ValueError(
                        f"expected patterns that agree, found {key.rstrip('_')} of {names[0]!r} "
                        f"to be {_shown(found[key])} by {by[key]!r} and {_shown(value)} by "
                        f"{pattern!r}: narrow "
                        "one of them, or put the one that is to win into a later mapping, "
                        "choose=[{...}, {...}]"
                    )
                found[key], by[key] = value, pattern
        return found


class Choices:
    """The choices for the weights of a model.

    Args:
        choose: See the module's text.

    Raises:
        TypeError: It is of another form, or a value is of the wrong type.
        ValueError: There is no such view, family, key or penalty, or a value is out of range.
    """

    def __init__(self, choose: Choose = None) -> None:
        self._layers = [_Layer(_entries(layer)) for layer in _layers(choose)]
        self._check_uses()

    def of(self, names: Sequence[str]) -> Choice:
        """Return the choice for a weight, given all names that it has.

        Raises:
            ValueError: Two patterns of one mapping contradict each other.
        """
        choice = Choice()
        for layer in self._layers:
            choice = replace(choice, **layer.of(names))
        return choice

    def check_patterns(self, names: Sequence[str]) -> None:
        """Refuse patterns that match none of the names.

        Raises:
            ValueError: One does not.
        """
        for layer in self._layers:
            for pattern in layer.entries:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"the pattern {pattern!r} in choose matches no parameter of the model; "
                        f"{nearest(pattern, names)}"
                    )

    def _check_uses(self) -> None:
        """Refuse what no view uses that is chosen for any weight: the matrix would do without."""
        entries = [item for layer in self._layers for item in layer.entries.items()]
        views = [entry["view"] for _, entry in entries if "view" in entry]
        for pattern, entry in entries:
            for key, users in _USED_BY.items():
                if key in entry and not any(user in views for user in users):
                    raise ValueError(
                        f"expected {key} of {pattern!r} together with view "
                        f"{' or '.join(map(repr, users))}, found none of these in choose, so that "
                        "it would have no effect: add the view, or leave it out"
                    )


def _layers(choose: Choose) -> Sequence[Any]:
    if choose is None:
        return []
    if isinstance(choose, (str, Mapping)):
        return [choose]
    if isinstance(choose, Sequence):
        return choose
    raise TypeError(
        "expected choose to be a view or family by name, a mapping of patterns to choices, or a "
        f"sequence of these, found {choose!r}"
    )


def _entries(layer: Any) -> dict[str, dict[str, Any]]:
    """Return one layer as checked fields of ``Choice`` by pattern."""
    if isinstance(layer, str) and layer in FAMILIES:
        layer = FAMILIES[layer]
    elif isinstance(layer, str):
        layer = {"*": _known(layer, {**VIEWS, **FAMILIES}, "view or family")}
    if not isinstance(layer, Mapping) or not all(isinstance(key, str) for key in layer):
        raise TypeError(f"expected choose to map shell patterns to choices, found {layer!r}")
    return {pattern: _fields(entry, pattern) for pattern, entry in layer.items()}


def _fields(entry: Any, pattern: str) -> dict[str, Any]:
    """Return what an entry says, by field of ``Choice``."""
    if isinstance(entry, Choice):
        said = {f.name: getattr(entry, f.name) for f in fields(Choice)}
        optional = {f.name for f in fields(Choice) if f.default is None}
        entry = {
            "lambda" if name == "lambda_" else name: value
            for name, value in said.items()
            if value is not None or name not in optional
        }
    elif not isinstance(entry, Mapping):
        entry = {"view": entry}
    return {
        _KEYS[_known(key, _KEYS, f"key of {pattern!r}")]: _checked(key, value, pattern)
        for key, value in entry.items()
    }


def _checked(key: str, value: Any, pattern: str) -> Any:
    """Return the value of a field, or say what is wrong with it."""
    what = f"{key} of {pattern!r}"
    if key == "penalty":
        return as_penalty(value)
    if key == "lambda":
        return checked_schedule(value, what)
    if key in {"norm", "weight"}:
        return _known(value, NORMS if key == "norm" else WEIGHTS, what)
    if key == "input_size":
        sizes = (value,) if isinstance(value, int) else value
        if isinstance(sizes, Sequence) and not isinstance(sizes, str):
            return tuple(_positive(size, what) for size in sizes)
        raise TypeError(f"expected {what} to be a sequence of sizes, found {value!r}")
    if key != "view":
        return _positive(value, what)
    return _known(value, VIEWS, what) if isinstance(value, str) else _checked_view(value, what)


def _checked_view(value: Any, what: str) -> View:
    if all(hasattr(value, name) for name in ("matvec", "rmatvec", "adder", "shape", "matrix")):
        view: View = value
        return view
    raise TypeError(f"expected {what} to be one of {', '.join(VIEWS)}, or a View, found {value!r}")


def _known(value: Any, known: Iterable[str], what: str) -> str:
    """Return a name, or say which there are."""
    known = list(known)
    if isinstance(value, str) and value in known:
        return value
    hint = f"; {nearest(value, known)}" if isinstance(value, str) else ""
    raise ValueError(f"expected {what} to be one of {', '.join(known)}, found {value!r}{hint}")


def _positive(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {what} to be an integer, found {value!r}")
    if value < 1:
        raise ValueError(f"expected {what} to be at least 1, found {value}")
    return value


def _shown(value: Any) -> str:
    return value.name if isinstance(value, Penalty) else repr(value)


def checked_schedule(value: Any, what: str) -> Strength:
    """Return lambda, a number or a function of the step, or say what is wrong with it."""
    if isinstance(value, str):
        raise TypeError(
            f"expected {what} to be a number >= 0, found {value!r} (YAML reads 1e-3 as text: write "
            "1.0e-3), or a function of the step"
        )
    if callable(value):
        checked_strength(value(0), f"{what} at step 0")
        schedule: Strength = value
        return schedule
    return checked_strength(value, what)


def checked_strength(value: Any, what: str) -> float:
    """Return lambda as a float, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected {what} to be a number >= 0, found {value!r}")
    strength = float(value)
    if not 0 <= strength < math.inf:
        raise ValueError(f"expected {what} to be finite and >= 0, found {value!r}")
    return strength
