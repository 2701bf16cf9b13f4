"""What the wrapper accepts. Every error says what was expected, what was found, what to do."""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

from torch import Tensor, nn

from snr_hooks.choices import checked_strength
from snr_hooks.discovery import Skipped, Target
from snr_hooks.sharding import is_fsdp1, whole

STRENGTH = "snr_lambda"
"""Key of lambda in a param group."""

STATE_KEY = "snr_hooks"
"""Entry of the state dict that holds the singular vectors, by parameter name."""


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """Return the learning rate of a param group, or say what a decoupled term needs it for.

    Raises:
        ValueError: The group has none.
    """
    lr: float | Tensor | None = group.get("lr")
    if lr is None:
        raise ValueError(
            "expected param groups with a learning rate 'lr', by which decoupled=True multiplies "
            f"lambda, found the keys {', '.join(key for key in group if key != 'params')}: use an "
            "optimizer that has one, or decoupled=False"
        )
    return lr


def checked_int(value: object, what: str, *, at_least: int) -> int:
    """Return an integer, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"expected {what} to be an integer, found {value!r}")
    if value < at_least:
        raise ValueError(f"expected {what} to be at least {at_least}, found {value}")
    return value


def checked_bool(value: object, what: str) -> bool:
    """Return True or False, or refuse what only counts as one of them, such as 'false'."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {what} to be True or False, found {value!r}")
    return value


def checked_products(n_power_iterations: object) -> tuple[int, int]:
    """Return how many products with each weight to take, and every how many steps."""
    what = "n_power_iterations to be a positive multiple of 0.5 or 0.5 / k for a whole k"
    if isinstance(n_power_iterations, bool) or not isinstance(n_power_iterations, Real):
        raise TypeError(f"expected {what}, found {n_power_iterations!r}")
    products = 2 * float(n_power_iterations)
    steps = round(1 / products) if 0 < products < 1 else 1
    is_whole = 0 < products < math.inf and math.isclose(products * steps, round(products * steps))
    if not is_whole:  # but for the rounding of 0.5 / k
        raise ValueError(
            f"expected {what} (0.5 is one product with each weight a step, 0.125 one every "
            f"fourth step), found {n_power_iterations!r}"
        )
    return round(products * steps), steps


def check_sharding(model: nn.Module) -> None:
    """Refuse FSDP1, under which backward hooks on parameters do not fire."""
    if isinstance(model, nn.Module) and is_fsdp1(model):
        raise ValueError(
            "expected a model sharded by fully_shard (FSDP2), or not at all, found "
            "FullyShardedDataParallel (FSDP1), which hides the gradients of single weights from "
            "hooks; nothing was changed: use torch.distributed.fsdp.fully_shard, then build the "
            "optimizer and the wrapper"
        )


def check_values(target: Target) -> None:
    """Refuse a weight without values, or with values that are not finite."""
    weight = target.parameter
    if weight.is_meta:
        raise ValueError(
            f"expected weights with values, found {target.name!r} on the meta device: "
            "materialize the model and build the optimizer before wrapping"
        )
    finite = weight.detach().isfinite()
    if not finite.all():
        bad = weight.numel() - int(whole(finite).sum())
        raise ValueError(
            f"expected finite weights, found {bad} of {weight.numel()} entries of "
            f"{target.name!r} NaN or infinite: initialize the model, or load a sound checkpoint"
        )


def checked_tolerance(value: object) -> float:
    """Return a relative tolerance, or say what is wrong with it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"expected tolerance to be a number, found {value!r}")
    if not float(value) >= 0:
        raise ValueError(
            "expected tolerance to be at least 0, or math.inf for no further products, found "
            f"{value!r}"
        )
    return float(value)


def saved_state(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], int | None]:
    """Return vectors and number of steps of a state dict: none and None for a plain optimizer's."""
    for index, group in enumerate(state_dict["param_groups"]):
        checked_strength(group.get(STRENGTH, 0.0), f"{STRENGTH} of group {index} in the state dict")
    entry = state_dict.get(STATE_KEY, {"vectors": {}})
    vectors = entry.get("vectors") if isinstance(entry, Mapping) else None
    if not isinstance(vectors, Mapping):
        raise ValueError(
            f"expected {STATE_KEY!r} in the state dict to hold 'vectors' by parameter name, "
            f"found {type(entry).__name__}: load a state dict of an SNROptimizer or of a "
            "plain optimizer"
        )
    steps = entry.get("steps")
    if steps is not None:
        checked_int(steps, f"'steps' of {STATE_KEY!r} in the state dict", at_least=0)
    return vectors, steps


def nothing_to_regularize(skipped: Iterable[Skipped], *, overlap: bool) -> str:
    """Return the message for a wrapper without a target.

    Args:
        skipped: What the model has instead.
        overlap: Whether the optimizer holds any parameter of the model.

    Returns:
        The text of the error.
    """
    if not overlap:
        return (
            "expected an optimizer over parameters of the model, found one that holds none of "
            "them: build the optimizer from this model's parameters()"
        )
    reasons = [f"{skip.name}: {skip.reason}" for skip in skipped]
    shown = "; ".join(reasons[:5]) + ("; ..." if len(reasons) > 5 else "")
    return (
        "expected at least one weight to regularize, found none: the model needs a trainable "
        "Linear or convolution weight that include and exclude admit and the optimizer "
        f"holds. Skipped: {shown or 'nothing, the model has no such parameter'}"
    )
