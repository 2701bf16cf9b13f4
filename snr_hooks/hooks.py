"""Backward hooks that fire exactly once per optimizer step and weight.

A gradient may be accumulated many times between two steps (micro-batches, ``retain_graph``,
tied weights under reentrant checkpointing), or never. The rule here is a flag per weight:

- *pending* after ``rearm()``, which the optimizer calls in ``step()`` and ``zero_grad()``;
- pending when, just before an accumulation, the gradient turns out to have been reset:
  it is None, or it was touched since the last accumulation and now is all zeros. That is
  how ``model.zero_grad()`` and ``p.grad = None`` are noticed;
- the first accumulation while pending adds the term and clears the flag.

Whether a gradient was touched is read off its version counter, so the comparison with zero
costs nothing in ordinary loops. The counter does not see ``p.grad.data.zero_()``.

``fully_shard`` (FSDP2) computes gradients of other tensors than the sharded parameters and
accumulates by itself: nothing can look before. There a gradient that is another tensor than the
last one counts as reset, and one that was zeroed in place without ``zero_grad()`` or
``step()`` of the optimizer does not.

The term is added by a post-accumulate hook, on ``p.grad`` itself: gradients that
``torch.autograd.grad`` returns are left alone, DDP averages the result, clipping sees it.
"""

import gc
import warnings
from collections.abc import Callable, Iterable
from weakref import WeakValueDictionary, finalize, ref

import torch
from torch import Tensor, is_grad_enabled, strided
from torch.compiler import is_dynamo_compiling
from torch.utils.hooks import RemovableHandle

from snr_hooks.discovery import Target

AddTerm = Callable[[Target, Tensor], None]
"""Adds the regularization term of a target to its gradient, in place."""


class GradientHooks:
    """Owns the hooks on a set of weights, and calls ``add_term`` once per step for each.

    Parameters hold their hooks strongly, so the hooks hold this object weakly: after
    ``remove()``, or when this object is dropped, the parameters carry no trace of it.

    Args:
        add_term: Called under no_grad.
    """

    def __init__(self, add_term: AddTerm) -> None:
        self._add_term = add_term
        self._weights: list[_HookedWeight] = []

    def attach(self, targets: Iterable[Target]) -> None:
        """Hook more weights, all of them or, on error, none.

        Args:
            targets: The weights.

        Raises:
            RuntimeError: A weight is hooked already, which would double its term.
        """
        targets = list(targets)
        if any(id(target.parameter) in _hooked for target in targets):
            gc.collect()  # a dropped wrapper may be in a cycle, as Lightning's trainers are
        by_parameter: dict[int, list[Target]] = {}
        for target in targets:
            by_parameter.setdefault(id(target.parameter), []).append(target)
            if id(target.parameter) in _hooked:
                raise RuntimeError(
                    "expected weights that no live SNROptimizer regularizes, found "
                    f"{target.name!r} already wrapped: its term would be added twice; call "
                    "remove() on the other wrapper first, or wrap only one"
                )
        self._weights += [_HookedWeight(group, self._add_term) for group in by_parameter.values()]

    def silent(self) -> list[Target]:
        """Return the targets of which no term was added since ``rearm()``."""
        return self._pending(lambda weight: True)

    def lost(self) -> list[Target]:
        """Return those of them whose hooks were moved away, as swap_tensors does."""
        return self._pending(lambda weight: not weight.is_hooked())

    def unexplained(self) -> list[Target]:
        """Return those that have a gradient nevertheless, which did not come from here."""
        return self._pending(_HookedWeight.has_foreign_grad)

    def _pending(self, condition: "Callable[[_HookedWeight], bool]") -> list[Target]:
        weights = [weight for weight in self._weights if weight.pending and condition(weight)]
        return [target for weight in weights for target in weight.targets]

    def rearm(self) -> None:
        """Make every weight pending: a step was taken, or all gradients were reset."""
        for weight in self._weights:
            weight.pending = True

    def remove(self) -> None:
        """Take all hooks off."""
        for weight in self._weights:
            weight.remove()
        self._weights.clear()


class _HookedWeight:
    """The hooks and the flag of one weight, all of whose targets share the parameter."""

    def __init__(self, targets: list[Target], add_term: AddTerm) -> None:
        self.pending = True
        self.targets = targets
        self.parameter = targets[0].parameter
        self._add_term = add_term
        self.looked = False
        self.traced_reset: Tensor | None = None
        self._last_grad: ref[Tensor] | None = None
        self._last_version = 0
        key = id(self.parameter)
        _hooked[key] = self
        self._tensor = self.parameter._cdata
        self.remove = finalize(self, _unhook, key, self._register())
        self.remove.atexit = False

    def _register(self) -> list[RemovableHandle]:
        reference = ref(self)
        parameter, key = self.parameter, id(self.parameter)

        def before(grad: Tensor) -> None:
            if (weight := reference()) is None:
                return
            if is_dynamo_compiling():
                old = weight.parameter.grad
                weight.traced_reset = None if old is None else ~old.any()
            elif not weight.pending:
                weight.before_accumulation()

        def after(parameter: Tensor) -> None:
            if (weight := reference()) is None:
                return
            if is_dynamo_compiling():
                torch.ops.snr_hooks.accumulated(parameter.grad, weight.traced_reset, key)
            else:
                weight.after_accumulation(parameter.grad)

        sizes = (target.view.observes for target in self.targets)
        return [
            parameter.register_hook(before),  # type: ignore[no-untyped-call]
            parameter.register_post_accumulate_grad_hook(after),  # type: ignore[no-untyped-call]
            *(size.watch() for size in sizes if size is not None),
        ]

    def is_hooked(self) -> bool:
        """Return whether the parameter is the tensor that was hooked.

        torch.utils.swap_tensors exchanges the tensors, with their hooks, below the Python
        objects, which keep their identity and even their dictionaries of hooks.
        """
        return bool(self.parameter._cdata == self._tensor)

    def has_foreign_grad(self) -> bool:
        """Return whether a gradient was put there by something else than autograd."""
        grad = self.parameter.grad
        return grad is not None and not self._untouched(grad) and bool(grad.any())

    def before_accumulation(self) -> None:
        """Notice a gradient that was reset; look only, for autograd.grad comes here too."""
        self.looked = True
        grad = self.parameter.grad
        if not self._untouched(grad):
            self.pending = grad is None or not bool(grad.any())

    def after_accumulation(self, grad: Tensor | None) -> None:
        """Add the term if it is due."""
        if grad is None:
            raise RuntimeError(
                f"expected a gradient of {self.targets[0].name!r} just accumulated, found None: "
                "another post-accumulate hook took it away (an optimizer in backward, say) before "
                "the term was added; register that hook after wrapping"
            )
        if not (self.pending or self.looked):  # nothing can look before, under fully_shard
            self.pending = self._last_grad is not None and self._last_grad() is not grad
        self.looked = False
        if self.pending:
            self._add(grad)
        self._last_grad, self._last_version = ref(grad), grad._version

    def _add(self, grad: Tensor) -> None:
        if is_grad_enabled():  # as create_graph=True leaves it
            with torch.no_grad():
                self._add(grad)
            return
        if grad.layout is not strided:
            warnings.warn(
                f"the gradient of {self.targets[0].name!r} is sparse ({grad.layout}); it is "
                "not regularized: exclude it, or make its gradient dense",
                stacklevel=2,
            )
            return
        if grad.is_cuda:
            check_not_captured()
        for target in self.targets:
            self._add_term(target, grad)
        self.pending = False

    def _untouched(self, grad: Tensor | None) -> bool:
        """Whether nothing but autograd can have changed the gradient since the last time."""
        if grad is None or self._last_grad is None:
            return False
        return self._last_grad() is grad and self._last_version == grad._version


# By id, not by parameter: a weak reference to a parameter would make
# torch.utils.swap_tensors refuse it. A hooked weight keeps its parameter, so ids stay valid.
_hooked: WeakValueDictionary[int, _HookedWeight] = WeakValueDictionary()


def _unhook(key: int, handles: list[RemovableHandle]) -> None:
    _hooked.pop(key, None)
    for handle in handles:
        handle.remove()


def check_not_captured() -> None:
    """Refuse to be recorded into a CUDA graph, whose replays would repeat one state forever.

    Raises:
        RuntimeError: A capture is under way.
    """
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "expected backward() outside of CUDA graph capture, found it inside: the term is due "
            "once a step and its products alternate between the sides, which a replay cannot do; "
            "capture the forward pass alone, or use torch.compile, which captures forward and "
            "backward of the model and leaves hooks on parameters outside"
        )


@torch.library.custom_op("snr_hooks::accumulated", mutates_args={"grad"})
def _accumulated(grad: Tensor, was_reset: Tensor | None, key: int) -> None:
    """Do what the hooks do, as one operator that compiled autograd does not look into.

    Traced, they would be guarded on flags that change from step to step, and on vectors that
    the compiler takes for constants.
    """
    weight = _hooked.get(key)
    if weight is not None:
        weight.looked = True
        weight.pending |= was_reset is None or bool(was_reset)
        weight.after_accumulation(grad)
