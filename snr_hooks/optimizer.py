"""SNROptimizer: any optimizer, with spectral norm regularization added to the gradients."""

import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from snr_hooks._names import is_a
from snr_hooks.checks import (
    STATE_KEY,
    STRENGTH,
    check_sharding,
    check_values,
    checked_bool,
    checked_int,
    checked_products,
    checked_tolerance,
    learning_rate,
    nothing_to_regularize,
    saved_state,
)
from snr_hooks.choices import Choices, Choose, Strength, checked_schedule, checked_strength
from snr_hooks.discovery import (
    Discovery,
    Selection,
    Skipped,
    Target,
    discover,
    linear_maps,
)
from snr_hooks.estimators import Estimator, ExactSVD, Held, SubspaceIteration
from snr_hooks.hooks import GradientHooks
from snr_hooks.modules import Slot, parameter_at, slot
from snr_hooks.sharding import reshard
from snr_hooks.term import SpectralTerm

# A fused optimizer with these unscales by itself; forwarded from one they would mislead.
_READ_BY_GRAD_SCALER = {"grad_scale", "found_inf"}

_HOOK_DICTIONARIES = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class SNROptimizer(Optimizer):
    r"""Wrap an optimizer so that each weight's gradient gains lambda * sigma_1 * u_1 v_1^T.

    That is the gradient of :math:`\frac{\lambda}{2} \sum_l \sigma_1(W^l)^2` (Yoshida and
    Miyato 2017, arXiv 1705.10941, section 3). Backward hooks add it once per optimizer step;
    the loss is untouched. Use the wrapper in place of the wrapped optimizer: schedulers,
    scalers and checkpoints see a ``torch.optim.Optimizer`` whose ``param_groups``,
    ``state`` and ``defaults`` are those of the wrapped one. Other public attributes are
    forwarded to it.

    Lambda is the entry ``snr_lambda`` of a weight's param group, read anew at every step;
    0 switches a group off at no cost; its vectors stay as they are, so that sigma is too low for
    some steps once it is switched on again.

    Args:
        optimizer: Any optimizer over parameters of ``model``.
        model: The model whose weights are regularized, as ``discover`` finds them.
        lambda_: Lambda of the groups that do not name one: a number, or a function of the number
            of steps taken, whose values are written into the groups. A group's own
            ``snr_lambda`` wins, also one that a loaded state dict has brought.
        include: Shell patterns on parameter names, or a predicate; see ``discover``.
        exclude: Likewise; it wins over ``include``.
        choose: How weights are regularized: the view, the penalty, lambda; see ``choices``.
        decoupled: Subtract lr * lambda * sigma_1 * u_1 v_1^T from the weight at the step, as
            AdamW decouples weight decay, in place of adding the term to the gradient.
        n_power_iterations: Power iterations per step. Half an iteration is one product with each
            weight; multiples of 0.5 take more. 0.5 / k takes one every k steps and uses sigma, u
            and v for all of them: cheaper, and up to k - 1 steps late.
        n_vectors: Vectors per weight, at most as many as it has rows and columns. More are more
            accurate and take more time and memory. 3, 5, ... also look for directions in which
            none of the vectors has a part; 1 and even numbers do not. For n singular values
            (``top`` in ``choose``) at least 2 n are taken.
        tolerance: If the product with a weight raises its sigma_1 by more than this, relative to
            what the best vector of the step before gives for the weight as it is, the weight gets
            two more products, and two more if these raise it again, up to 8: seldom with SGD at
            small learning rates, in every step with Adam, whose steps cost several times as much
            then. Where none rises by even a fifth of this, the next seven steps take one vector,
            which is faster. ``math.inf`` for the same work in every step. It takes two vectors or
            more, and has no effect on accelerators, where it would wait for the device, and on
            sharded weights.
        exact: Use ``torch.linalg.svd`` at every step instead. Exact, and slow.
        scaler: The ``torch.amp.GradScaler`` that scales the loss, if there is one. The
            term is scaled with the loss, so that unscaling restores lambda; not needed where it
            is ``decoupled``. A deep copy of the wrapper has a copy of the scaler: copy both in
            one call.
        seed: Seed of the starting vectors. The global random stream is not touched.

    Attributes:
        optimizer: The wrapped optimizer.
        targets: The regularized weights.
        skipped: All other parameters of two or more dimensions, with the reason.

    Raises:
        TypeError: An argument is of the wrong type.
        ValueError: An argument is out of range, a weight is not finite, there is nothing to
            regularize, or the model is sharded by FSDP1 in place of ``fully_shard``.
        RuntimeError: Another live wrapper regularizes one of the weights.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> [target.name for target in opt.targets]
        ['weight']
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        lambda_: Strength = 0.01,
        *,
        include: Selection = None,
        exclude: Selection = None,
        choose: Choose = None,
        decoupled: bool = False,
        n_power_iterations: float = 0.5,
        n_vectors: int = 3,
        tolerance: float = 5e-4,
        exact: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        seed: int = 0,
    ) -> None:
        # No super().__init__(): it would make param groups of its own, which silently
        # detach from those of the wrapped optimizer at the first load_state_dict().
        _check_optimizer(optimizer)
        check_sharding(model)
        strength = checked_schedule(lambda_, "lambda_")
        if checked_bool(decoupled, "decoupled"):
            for group in optimizer.param_groups:
                learning_rate(group)
        n_products, n_steps = checked_products(n_power_iterations)
        n_vectors = checked_int(n_vectors, "n_vectors", at_least=1)
        tolerance = checked_tolerance(tolerance)
        seed = checked_int(seed, "seed", at_least=0)
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                f"expected scaler to be a torch.amp.GradScaler, found {type(scaler).__name__}: "
                "if it wraps one, as timm's NativeScaler does, pass the inner one"
            )
        estimator: Estimator = SubspaceIteration(n_products, n_vectors, tolerance, seed)
        if checked_bool(exact, "exact"):
            estimator = ExactSVD()
        elif n_steps > 1:
            estimator = Held(estimator, n_steps)
        self.optimizer = optimizer
        self.skipped: tuple[Skipped, ...] = ()
        self._model = model
        self._selection = _reusable(include), _reusable(exclude), Choices(choose)
        self._decoupled = decoupled
        self._term = SpectralTerm(optimizer, estimator, strength, scaler)
        # Their first parameters: groups are replaced, reordered and removed.
        self._groups_given_lambda: list[Tensor] = []
        self._set_up()
        self._adopt_targets()
        if not self.targets:
            overlap = any(self._term.holds(parameter) for parameter in model.parameters())
            raise ValueError(nothing_to_regularize(self.skipped, overlap=overlap))
        self._complete_groups()

    def _set_up(self) -> None:
        """Make what is neither copied nor pickled: the hooks, and their way out."""
        for name in _HOOK_DICTIONARIES:
            setattr(self, name, OrderedDict())
        self._hooks = GradientHooks(_add_nothing if self._decoupled else self._term.add)
        self._hooks.attach(self.targets)
        # Also when this object is dropped: a stale lambda must not outlive it in the groups
        # of the wrapped optimizer and win over the lambda_ of the next wrapper.
        self._withdraw_lambda = weakref.finalize(
            self, _withdraw_lambda, self.optimizer, self._groups_given_lambda
        )
        self._withdraw_lambda.atexit = False
        self._frozen: list[nn.Parameter] = []
        self._slots: list[tuple[Target, Slot]] = []

    # --- the wrapped optimizer, live ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The param groups of the wrapped optimizer."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups
        self._term.index_groups()

    @property
    def state(self) -> Any:
        """The per-parameter state of the wrapped optimizer."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The default options of the wrapped optimizer."""
        return self.optimizer.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def __getattr__(self, name: str) -> Any:
        """Forward other public attributes to the wrapped optimizer."""
        if name.startswith("_") or name in _READ_BY_GRAD_SCALER or name == "optimizer":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.optimizer, name)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether ``step`` unscales by itself: no, even if the wrapped optimizer does.

        GradScaler asks this at the start of its own ``step``. That makes it the place to notice
        a scaler that would divide lambda by its scale. Others ask too: Lightning does before it
        clips, also without a scaler.
        """
        asked_by_scaler = sys._getframe(1).f_code is torch.amp.GradScaler.step.__code__
        in_gradient = not (self._decoupled or self._removed)
        if asked_by_scaler and self._term.scaler is None and in_gradient:
            raise RuntimeError(
                "expected the GradScaler that steps this optimizer to be known, found "
                "scaler=None: the term would be divided by the loss scale; nothing was "
                "changed: pass the scaler as SNROptimizer(..., scaler=scaler)"
            )
        return False

    @property
    def _removed(self) -> bool:
        """Kept where Lightning's optimizers, which forward reads but no assignments, find it."""
        return self._term.removed

    @property
    def targets(self) -> tuple[Target, ...]:
        """The regularized weights."""
        return self._term.targets

    # --- training ---

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Step the wrapped optimizer; the gradients have gained their term in backward.

        Args:
            closure: Re-evaluates the model and returns the loss, for optimizers that
                want one.

        Returns:
            What the wrapped optimizer returns.

        Warns:
            UserWarning: A weight has a gradient that did not come through its hook.

        Raises:
            RuntimeError: The model holds another parameter than the one that was wrapped.
            ValueError: The model has been sharded by FSDP1 since.
        """
        # By hand, and not as torch wraps the step of every optimizer: as it wraps that of the
        # wrapped one too, hooks for all optimizers would be called twice a step.
        args: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is not None:
                args, kwargs = result
        loss = SNROptimizer._step(*args, **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return loss

    def _step(self, closure: Callable[[], float] | None = None) -> float | None:
        self._check_parameters()
        if closure is None and not self._decoupled:
            self._warn_of_foreign_gradients()
        decay = self._term.decay() if self._decoupled else None
        loss = self.optimizer.step() if closure is None else self.optimizer.step(closure)
        if decay is not None:
            decay()
        self._term.n_steps += 1
        self._write_scheduled_lambda()
        self._prepare_next_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients as the wrapped optimizer does."""
        self.optimizer.zero_grad(set_to_none)
        self._prepare_next_step()

    def _prepare_next_step(self) -> None:
        self._hooks.rearm()
        self._term.outdate()
        self._adopt_newcomers()

    def _check_parameters(self) -> None:
        """Refuse to go on with a parameter that the model does not use any more, or not as it is.

        A weight that got its term in this step, and is where it was, is spared the search.
        """
        silent = self._hooks.silent()
        moved = [t for t, (held, key) in self._slots if held.get(key) is not t.parameter]
        if not (silent or moved):
            return
        check_sharding(self._model)
        reshard(self._model)
        for target in [*silent, *moved]:
            if parameter_at(self._model, target.parameter_name) is not target.parameter:
                raise _replaced(target.name)
        for target in self._hooks.lost():
            raise _replaced(target.name)

    def _warn_of_foreign_gradients(self) -> None:
        """Say that a term is missing; most of all when DDP brings the gradients of others."""
        for target in self._hooks.unexplained():
            if self._term.strength(target) > 0:
                warnings.warn(
                    f"{target.name!r} has a gradient that no backward pass of this process has "
                    "accumulated, so that its term is missing; if other processes of a "
                    "DistributedDataParallel have used the weight, their terms are averaged with "
                    "the missing one: let every process use it, or exclude it",
                    stacklevel=4,
                )

    # --- what is regularized ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer and regularize the weights it brings.

        Args:
            param_group: As for ``torch.optim.Optimizer``; may hold ``snr_lambda``.
        """
        checked_strength(param_group.get(STRENGTH, 0.0), STRENGTH)
        self._check_parameters()
        self.optimizer.add_param_group(param_group)
        self._term.index_groups()
        if not self._removed:
            self._complete_groups()
            self._adopt_targets()

    def spectral_norms(self) -> dict[str, float]:
        """Estimate sigma_1 of every target's matrix.

        These are the values that the next terms would be built with. They are lower bounds for the
        weights as they are, or exact values with ``exact=True``. With ``n_power_iterations`` below
        0.5 most terms are held from a step before, and so are their values, which by now may be too
        large. Reading them changes nothing.

        Returns:
            The estimates by parameter name.
        """
        terms = self._term.estimator.peek(self.targets)
        return {
            target.name: float(term.sigma_as_tensor().max())
            for target, term in zip(self.targets, terms, strict=True)
        }

    @property
    def n_products_taken(self) -> int:
        """How many products with a weight, W V or W^T U, the steps have taken.

        Over the number of steps and of targets it says what ``tolerance`` costs in a training. It
        counts from the construction, or from the last ``load_state_dict()``, without the warm-up.
        """
        return self._term.estimator.n_products_taken

    def remove(self) -> None:
        """Take the hooks off the model; from here on only the wrapped optimizer acts.

        ``targets`` is empty then. Groups that got ``snr_lambda`` from this wrapper lose it again.
        """
        self._hooks.remove()
        self._withdraw_lambda()
        self._term.removed, self._term.targets = True, ()
        self._frozen.clear()
        self._slots.clear()

    def _complete_groups(self) -> None:
        """Write the default lambda into groups without one, where users can see it."""
        for group in self.param_groups:
            if STRENGTH not in group:
                group[STRENGTH] = self._term.now(self._term.default, "lambda_")
                self._groups_given_lambda += group["params"][:1]

    def _write_scheduled_lambda(self) -> None:
        """Write what lambda is by now into the groups that have it from a function."""
        if callable(self._term.default):
            for group in _groups_with(self.optimizer, self._groups_given_lambda):
                group[STRENGTH] = self._term.now(self._term.default, "lambda_")

    def _adopt_newcomers(self) -> None:
        """Hook the weights that joined the optimizer, or are trained, since the last time."""
        self._term.index_groups()
        unfrozen = any(weight.requires_grad for weight in self._frozen)
        if (self._term.regrouped or unfrozen) and not self._removed:
            self._adopt_targets()

    def _adopt_targets(self) -> None:
        """Hook the weights that can be regularized by now and were not before."""
        found = self._discover()
        known = {target.name for target in self.targets}
        new = [target for target in found.targets if target.name not in known]
        for target in new:
            check_values(target)
        self._hooks.attach(new)
        self._term.targets += tuple(new)
        names = known | {target.name for target in new}
        self.skipped = tuple(skip for skip in found.skipped if skip.name not in names)
        self._note_frozen()
        self._note_slots()
        self._term.regrouped = False

    def _discover(self) -> Discovery:
        """Discover, less what the optimizer does not hold."""
        if isinstance(self._model, nn.Module):  # if not, discover says so
            reshard(self._model)
        found = discover(self._model, *self._selection)
        held = [target for target in found.targets if self._term.holds(target.parameter)]
        missing = [
            Skipped(target.name, "not held by the optimizer")
            for target in found.targets
            if not self._term.holds(target.parameter)
        ]
        return Discovery(tuple(held), found.skipped + tuple(missing))

    def _note_frozen(self) -> None:
        """Remember which weights may join the targets once they are trained."""
        self._frozen[:] = [
            found.parameter
            for found in linear_maps(self._model, self._selection[2])
            if self._term.holds(found.parameter) and not found.parameter.requires_grad
        ]

    def _note_slots(self) -> None:
        """Remember where modules hold the targets: reading that costs little in every step."""
        slots = ((target, slot(self._model, target.parameter_name)) for target in self.targets)
        self._slots[:] = [(target, place) for target, place in slots if place is not None]

    # --- checkpoints and copies ---

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and the singular vectors beside it.

        A plain optimizer loads it too: it ignores the additional entry.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self.optimizer.state_dict()
        state_dict[STATE_KEY] = {
            "vectors": self._term.estimator.state_dict(),
            "steps": self._term.n_steps,
        }
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this wrapper, or of a plain optimizer of the wrapped kind.

        Like the learning rate, lambda is restored from the state. From a plain state,
        groups keep their lambda and power iteration starts afresh.

        Args:
            state_dict: From ``state_dict()``. It is not changed.

        Raises:
            ValueError: The state does not fit; nothing was loaded then.
        """
        state_dict = state_dict.copy()
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        vectors, steps = saved_state(state_dict)
        self._adopt_newcomers()  # which may have vectors in the state
        strengths = [group.get(STRENGTH) for group in self.param_groups]
        estimator = self._term.estimator.restored(vectors, self.targets)
        self.optimizer.load_state_dict(
            {key: value for key, value in state_dict.items() if key != STATE_KEY}
        )
        self._term.replace(estimator)
        self._term.n_steps = self._term.n_steps if steps is None else steps
        self._term.outdate()
        for group, strength in zip(self.param_groups, strengths, strict=True):
            if strength is not None:
                group.setdefault(STRENGTH, strength)
        self._term.index_groups()
        self._write_scheduled_lambda()
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles hold: no hooks, and no patched ``step``.

        A scheduler stores a ``step`` bound to this object in the instance; a copy that
        kept it would step the original.
        """
        kept = (
            "optimizer",
            "skipped",
            "_model",
            "_selection",
            "_decoupled",
            "_term",
            "_groups_given_lambda",
        )
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a copied state and hook the copied weights."""
        self.__dict__.update(state)
        self._term.index_groups()
        self._set_up()
        if not self._removed:
            self._note_frozen()
            self._note_slots()

    def __repr__(self) -> str:
        """Show what is regularized, how, and the wrapped optimizer."""
        strengths = sorted({self._term.strength(target) for target in self.targets})
        status = "removed, 0" if self._removed else f"{len(self.targets)}"
        wrapped = repr(self.optimizer).replace("\n", "\n  ")
        return (
            f"{type(self).__name__}(\n"
            f"  {status} weights regularized, {len(self.skipped)} skipped\n"
            f"  {STRENGTH}: {', '.join(map(str, strengths))}{', decoupled' * self._decoupled}\n"
            f"  sigma, u, v by {self._term.estimator!r}\n"
            f"  {wrapped}\n)"
        )


def _add_nothing(target: Target, grad: Tensor) -> None:
    """Leave a gradient alone: decoupled, the term goes to the weight at the step."""


def _groups_with(optimizer: Optimizer, parameters: list[Tensor]) -> list[dict[str, Any]]:
    """Return the param groups that hold one of some parameters."""
    wanted = {id(parameter) for parameter in parameters}
    return [
        group for group in optimizer.param_groups if not wanted.isdisjoint(map(id, group["params"]))
    ]


def _withdraw_lambda(optimizer: Optimizer, first_parameters: list[Tensor]) -> None:
    for group in _groups_with(optimizer, first_parameters):
        group.pop(STRENGTH, None)
    first_parameters.clear()


def _replaced(name: str) -> RuntimeError:
    return RuntimeError(
        f"expected {name!r} to be the parameter that was wrapped, with its hooks, found "
        "another or none in its place (a replaced layer, load_state_dict(assign=True), a "
        "parametrization, pruning, sharding, materialization from meta and swap_tensors do that); "
        "nothing was changed: call remove(), then build the optimizer and the wrapper anew, "
        "after all that"
    )


def _check_optimizer(optimizer: object) -> None:
    if not isinstance(optimizer, Optimizer):
        hint = "pass the optimizer first and the model second"
        if not isinstance(optimizer, nn.Module):
            hint = "wrap the torch.optim.Optimizer that it holds, and give it the wrapper"
        raise TypeError(
            f"expected a torch.optim.Optimizer, found {type(optimizer).__name__}: {hint}"
        )
    if isinstance(optimizer, SNROptimizer):
        raise ValueError(
            "expected an optimizer without regularization, found an SNROptimizer: wrap once, "
            f"and use {STRENGTH!r} in param groups for several strengths"
        )
    if is_a(optimizer, "AcceleratedOptimizer"):
        raise ValueError(
            "expected an optimizer that accelerate has not prepared, found an "
            "AcceleratedOptimizer, which holds steps and zeroings back during accumulation, so "
            "that every micro-batch would get a term: wrap first, then pass the wrapper to prepare"
        )
    for index, group in enumerate(optimizer.param_groups):
        checked_strength(group.get(STRENGTH, 0.0), f"{STRENGTH} of group {index}")


def _reusable(selection: Selection) -> Selection:
    """Turn an iterator of patterns, good for one pass, into a tuple."""
    is_predicate = callable(selection) and not isinstance(selection, nn.Module)
    if is_predicate or isinstance(selection, str) or not isinstance(selection, Iterable):
        return selection
    return tuple(selection)
