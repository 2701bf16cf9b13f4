"""Two ways to get the term of a target: subspace iteration with a warm start, and SVD.

An estimator knows targets and their views, but no gradients, hooks or optimizers. It is asked
for all targets of a step at once.
"""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from snr_hooks.discovery import Target
from snr_hooks.products import Product
from snr_hooks.sharding import add_up, local
from snr_hooks.subspace import Subspaces, starting_vectors
from snr_hooks.views import Adder, View

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WARM_UP = 15
"""Power iterations the first time a weight is needed, when its vectors are still random."""

MOST_REFINEMENTS = 4
"""Pairs of products with a weight in a step beyond those that are taken anyway."""

REST = 7
"""For how many steps the best vector alone is multiplied, after one in which few sigmas rose, or
none."""

CALM = 0.2
"""By which part of the tolerance sigma may rise in the step before the first ones at rest."""

FEW = 0.25
"""Which part of the entries of all matrices of a batch those may have whose sigma rises while it
rests: two products with so many take half the time of one with all."""

Vectors = Mapping[str, Tensor]
"""What is kept of a weight: ``left``, shape ``(l, m)``, and ``right``, shape ``(r, n)``; and at
rest ``rest``, for how many steps more."""


class Term(NamedTuple):
    """The matrix sigma u v^T of a target, of rank one; or several, one a block and rank.

    A target that is one map, of which one singular value is penalized, has the shapes below.
    Otherwise all have leading dimensions: the blocks, if there are any, and the rank.

    Attributes:
        sigma: A number, or on an accelerator, where reading it would wait, a scalar tensor.
            With leading dimensions, a float64 tensor of these.
        u: Shape ``(m,)``. Like v, it may be a view that changes with the next terms.
        v: Shape ``(n,)``.
        add: Adds multiples of u v^T to a gradient: one factor each, of the shape of sigma.
    """

    sigma: float | Tensor
    u: Tensor
    v: Tensor
    add: Adder

    def sigma_as_tensor(self) -> Tensor:
        """Return sigma in float64, on the device of the vectors."""
        return torch.as_tensor(self.sigma, dtype=torch.float64, device=self.u.device)


class Estimator(Protocol):
    """What the optimizer needs of an estimator."""

    def advance(self, targets: Sequence[Target]) -> list[Term]:
        """Return the next terms, and keep what the ones after need."""

    def again(self) -> bool:
        """Use the last terms for one more step, in place of ``advance``, if that is to be done."""

    def peek(self, targets: Sequence[Target]) -> list[Term]:
        """Return the terms that ``advance`` would return, and change nothing."""

    @property
    def n_steps(self) -> int:
        """For how many steps a term is used."""

    @property
    def n_products_taken(self) -> int:
        """Products with a weight in all steps so far, for as long as this object exists."""

    def state_dict(self) -> dict[str, Vectors]:
        """Return, by parameter name, what a run needs to continue bitwise the same."""

    def restored(self, state: Mapping[str, object], targets: Iterable[Target]) -> Self:
        """Return an estimator in a saved state; raise ValueError if it does not fit."""


class SubspaceIteration:
    """Iteration that starts where it ended in the step before (paper, section 3).

    A weight moves little in a step, so little work a step keeps up; see ``subspace``. The
    first time a weight is needed, its random vectors get ``WARM_UP`` power iterations; not
    at construction, because weights are often loaded after the optimizer is built.

    Args:
        n_products: Products with each weight in a step, at least 1; two are a full power
            iteration.
        n_vectors: Vectors a weight, at least 1. A matrix with fewer rows or columns has as
            many as that.
        tolerance: Further pairs of products, ``MOST_REFINEMENTS`` at most, are taken with a weight
            as long as they raise its sigma by more than this, relative to it. A step that raises
            few or none by ``CALM`` times this is followed by ``REST`` of a single vector, and so
            on.
        seed: Seed of the starting vectors.
        vectors: Vectors to continue from, by parameter name.
    """

    n_steps = 1

    def __init__(
        self,
        n_products: int,
        n_vectors: int,
        tolerance: float,
        seed: int,
        vectors: Mapping[str, Vectors] | None = None,
    ) -> None:
        self.n_products = n_products
        self.n_vectors = n_vectors
        self.tolerance = tolerance
        self.seed = seed
        # Of the weights that are in no batch.
        self._vectors = dict(vectors or {})
        self._versions: dict[str, object] = {}
        """What the vectors were made for, of the views that have versions."""
        self.n_products_taken = 0
        """Products with a weight in all steps so far, for as long as this object exists."""
        self._batches: list[_Batch] = []
        self._arrangement: list[_Place] = []

    def advance(self, targets: Sequence[Target]) -> list[Term]:
        """Return the next terms, and keep the vectors for the ones after."""
        iterated = [target for target in targets if not self._is_thin(target)]
        arrangement = [_place(target) for target in iterated]
        # Other weights, or weights that were moved, or batches that came to be on the same side
        # while one was at rest: from their state they would be one.
        if arrangement != self._arrangement or not _are_distinct(self._batches):
            vectors = self._by_name(iterated)
            self._batches = _batches(iterated, vectors)
            self._arrangement = arrangement
            self._versions |= {target.name: target.view.version for target in iterated}
            batched = {target.name for target in iterated}
            self._vectors = {name: pair for name, pair in vectors.items() if name not in batched}
        before = sum(batch.n_products for batch in self._batches)
        terms = self._iterated(self._batches)
        self.n_products_taken += sum(batch.n_products for batch in self._batches) - before
        return self._with_exact(targets, terms)

    def again(self) -> bool:
        """Return that every step has new terms."""
        return False

    def peek(self, targets: Sequence[Target]) -> list[Term]:
        """Return the terms that ``advance`` would return, and change nothing."""
        iterated = [target for target in targets if not self._is_thin(target)]
        batches = _batches(iterated, self._by_name(iterated))
        return self._with_exact(targets, self._iterated(batches))

    def _iterated(self, batches: "Sequence[_Batch]") -> list[Term]:
        terms = _iterated(batches, self.n_products, self.tolerance, may_rest=self._may_rest)
        for batch in batches:
            batch.lean()
        return terms

    def _n_vectors(self, target: Target) -> int:
        """Return how many vectors each map of a weight has, half of them for singular values."""
        *_, m, n = target.view.shape(target.parameter)
        least = 2 * target.top if target.top > 1 else 1
        return min(max(self.n_vectors, least), m, n)

    def _is_thin(self, target: Target) -> bool:
        """Whether a weight has too few rows or columns to iterate for so many singular values."""
        return target.top > 1 and target.top > self._n_vectors(target) // 2

    def _with_exact(self, targets: Sequence[Target], terms: list[Term]) -> list[Term]:
        """Complete the terms of all targets but the thin ones, in order."""
        if len(terms) == len(targets):
            return terms
        remaining = iter(terms)
        return [_exact_term(t) if self._is_thin(t) else next(remaining) for t in targets]

    def __getstate__(self) -> dict[str, object]:
        """Return what copies and pickles hold: no batches, whose views would be torn apart."""
        return self.__dict__ | {
            "_vectors": self._by_name(()),
            "_batches": [],
            "_arrangement": [],
        }

    def __repr__(self) -> str:
        products = f"{self.n_products} product{'s'[: self.n_products > 1]}"
        vectors = f"{self.n_vectors} vector{'s'[: self.n_vectors > 1]}"
        text = f"subspace iteration, {products} with {vectors} a step"
        if self.n_vectors > 1 and self.tolerance < math.inf:
            text += f", on a CPU more while they raise sigma by over {self.tolerance:g}"
        return text

    def state_dict(self) -> dict[str, Vectors]:
        """Return the vectors of each weight needed so far, and the size of inputs if it matters."""
        state = self._by_name(())
        for name, size in self._versions.items():
            if isinstance(size, tuple) and name in state:
                state[name] = {**state[name], "input_size": torch.tensor(size, device="cpu")}
        return state

    @property
    def _may_rest(self) -> bool:
        """Whether steps may be at rest: who asks for other work in every step gets that."""
        return self.n_products == 1 and self.tolerance < math.inf

    def restored(self, state: Mapping[str, object], targets: Iterable[Target]) -> Self:
        """Return an estimator that continues from saved vectors.

        A target without vectors starts from the seed, as it would have in the saved run.

        Args:
            state: From ``state_dict()``.
            targets: The weights that will be asked for.

        Returns:
            A new estimator; this one is left alone.

        Raises:
            ValueError: Vectors are of another number or shape, zero, or not finite.
        """
        by_name = {target.name: target for target in targets}
        known = {
            name: _checked_vectors(target, state[name], self._n_vectors(target))
            for name, target in by_name.items()
            if name in state and _is_of_size(target, state[name]) and not self._is_thin(target)
        }
        if not self._may_rest:
            known = {name: _without_rest(vectors) for name, vectors in known.items()}
        unknown = sorted(state.keys() - by_name.keys())
        if unknown:
            warnings.warn(
                f"the state dict has vectors of {len(unknown)} weights that are not "
                f"regularized here, the first {unknown[0]!r}; they are ignored and power "
                "iteration starts afresh for weights without vectors",
                stacklevel=3,
            )
        restored = type(self)(self.n_products, self.n_vectors, self.tolerance, self.seed, known)
        restored._versions = {name: by_name[name].view.version for name in known}
        return restored

    def _by_name(self, targets: Sequence[Target]) -> dict[str, Vectors]:
        """Return copies of all vectors; of new weights among ``targets``, warmed-up ones."""
        vectors = self._vectors | {
            name: pair for batch in self._batches for name, pair in batch.vectors().items()
        }
        fresh = [target for target in targets if not self._continues(target, vectors)]
        if fresh:
            # All weights should be on the same side at a time: fewer, larger batches.
            names = {target.name for target in fresh}
            others = [pair for name, pair in vectors.items() if name not in names]
            others_on_left = any(not _next_is_right(pair) for pair in others)
            batches = _batches(fresh, {target.name: self._start(target) for target in fresh})
            _iterated(batches, 2 * WARM_UP + others_on_left)
            vectors |= {name: pair for batch in batches for name, pair in batch.vectors().items()}
        return {
            name: {side: part.clone() for side, part in pair.items()}
            for name, pair in vectors.items()
        }

    def _continues(self, target: Target, vectors: Mapping[str, Vectors]) -> bool:
        """Whether there are vectors of a target, and for the input that it has by now."""
        version = target.view.version
        return target.name in vectors and self._versions.get(target.name, version) == version

    def _start(self, target: Target) -> Vectors:
        *batch, m, n = target.view.shape(target.parameter)
        k = self._n_vectors(target)
        return {
            "left": starting_vectors(k // 2, m, self.seed, f"left of {target.name}", *batch),
            "right": starting_vectors(k, n, self.seed, target.name, *batch),
        }


class Held:
    """The terms of another estimator, each used for several steps.

    In between nothing is computed. A term is then the gradient for the weights of a few steps
    ago, where that of the estimator itself is the gradient for the weights as they are. One of
    weights that were not finite adds nothing: it would undo that sound ones are loaded since.

    Args:
        estimator: Where terms come from.
        n_steps: For how many steps they are used.
        age: For how many the held ones have been used.
        terms: The held ones, by parameter name.
    """

    def __init__(
        self,
        estimator: Estimator,
        n_steps: int,
        age: int = 0,
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        self.estimator = estimator
        self.n_steps = n_steps
        self._age = age
        self._terms = dict(terms or {})
        self._versions: list[tuple[View, object]] = []
        """What the held ones were made for, of the views that have versions."""

    def again(self) -> bool:
        """Use the held terms for one more step, unless their time is over."""
        if self._is_over():
            return False
        self._age += 1
        return True

    def _is_over(self) -> bool:
        return self._age % self.n_steps == 0 or any(
            view.version != version for view, version in self._versions
        )

    def advance(self, targets: Sequence[Target]) -> list[Term]:
        """Return the held terms, or at the end of their time those of the estimator."""
        if self._is_due(targets):
            terms = self.estimator.advance(targets)
            names = [target.name for target in targets]
            self._terms = dict(zip(names, map(_if_finite, terms), strict=True))
            self._versions = _versions(targets)
            self._age = 0
        self._age += 1
        return [self._terms[target.name] for target in targets]

    def peek(self, targets: Sequence[Target]) -> list[Term]:
        """Return the terms that ``advance`` would return, and change nothing."""
        if self._is_due(targets):
            return self.estimator.peek(targets)
        return [self._terms[target.name] for target in targets]

    @property
    def n_products_taken(self) -> int:
        """Products with a weight in all steps so far, for as long as the estimator exists."""
        return self.estimator.n_products_taken

    def _is_due(self, targets: Sequence[Target]) -> bool:
        held = (self._terms.get(target.name) for target in targets)
        return self._is_over() or any(
            term is None or term.u.device != target.parameter.device
            for term, target in zip(held, targets, strict=True)
        )

    def __repr__(self) -> str:
        return f"{self.estimator!r}, used for {self.n_steps} steps"

    def state_dict(self) -> dict[str, Vectors]:
        """Return the estimator's state, and beside it the held terms and their age."""
        state = self.estimator.state_dict()
        for name, term in self._terms.items():
            sigma = term.sigma_as_tensor()
            if not sigma.isfinite().all():
                continue  # could not be loaded
            age = torch.tensor(self._age, device="cpu")
            held = {"sigma": sigma, "u": term.u, "v": term.v, "age": age}
            state[name] = {
                **state.get(name, {}),
                **{key: part.clone() for key, part in held.items()},
            }
        return state

    def restored(self, state: Mapping[str, object], targets: Iterable[Target]) -> Self:
        """Return an estimator in a saved state.

        Args:
            state: From ``state_dict()``.
            targets: The weights that will be asked for.

        Returns:
            A new estimator; this one is left alone.

        Raises:
            ValueError: A vector or a held term does not fit.
        """
        targets = list(targets)
        estimator = self.estimator.restored(state, targets)  # which learns the sizes of inputs
        terms, age = {}, 0
        for target in targets:
            entry = state.get(target.name)
            if isinstance(entry, Mapping) and "u" in entry and _is_of_size(target, entry):
                terms[target.name], age = _checked_held(target, entry)
        restored = type(self)(estimator, self.n_steps, age, terms)
        restored._versions = _versions(target for target in targets if target.name in terms)
        return restored


def _if_finite(term: Term) -> Term:
    """Return a term that adds nothing where sigma is not finite. Does not wait for the device."""
    if not isinstance(term.sigma, Tensor):
        return term if math.isfinite(term.sigma) else term._replace(add=_add_nothing)
    return term._replace(add=partial(_add_where, term.sigma.isfinite(), term.add))


def _add_nothing(grad: Tensor, factor: float | Tensor) -> None:
    """Leave a gradient alone."""


def _add_where(condition: Tensor, add: Adder, grad: Tensor, factor: float | Tensor) -> None:
    add(grad, torch.where(condition, factor, 0.0))


def _versions(targets: Iterable[Target]) -> list[tuple[View, object]]:
    views = [target.view for target in targets]
    return [(view, view.version) for view in views if view.version is not None]


class ExactSVD:
    """The top triplet of ``torch.linalg.svd`` in float64: slow, exact, without state."""

    n_products_taken = 0
    n_steps = 1

    def again(self) -> bool:
        """Return that every step has new terms."""
        return False

    def advance(self, targets: Sequence[Target]) -> list[Term]:
        """Return the exact terms."""
        return self.peek(targets)

    def peek(self, targets: Sequence[Target]) -> list[Term]:
        """Return the exact terms."""
        return [_exact_term(target) for target in targets]

    def __repr__(self) -> str:
        return "torch.linalg.svd at every step"

    def state_dict(self) -> dict[str, Vectors]:
        """Return nothing: there is nothing to continue from."""
        return {}

    def restored(self, state: Mapping[str, object], targets: Iterable[Target]) -> Self:
        """Return this estimator: saved vectors of power iteration do not matter to it."""
        return self


_Place = tuple[str, int, tuple[int, ...], object]


def _place(target: Target) -> _Place:
    """Return what must stay the same for prepared products to be right."""
    weight = local(target.parameter)
    return target.name, weight.data_ptr(), weight.stride(), target.view.version


class _Batch:
    """Weights that are iterated together: on one device, in one dtype, on the same side.

    All views that a step needs are made here, once.

    Args:
        targets: All targets.
        indices: Which of them are in the batch.
        vectors: Their vectors, by name. They are copied.
    """

    def __init__(
        self, targets: Sequence[Target], indices: list[int], vectors: Mapping[str, Vectors]
    ) -> None:
        self.indices = indices
        self.device = targets[indices[0]].parameter.device
        members = [targets[index] for index in indices]
        self._members = members
        self._names = [target.name for target in members]
        groups = enumerate(target.view.group for target in members)
        self._sharded = [(index, group) for index, group in groups if group is not None]
        pairs = [vectors[name] for name in self._names]
        right = _next_is_right(pairs[0])
        dtype = _at_least_float32(members[0].parameter)
        k = pairs[0]["right" if right else "left"].shape[-2]

        def rows(side: str) -> list[Tensor]:
            """The vectors, after empty rows that images will take."""
            vectors = [pair[side].to(self.device, dtype) for pair in pairs]
            return [functional.pad(v, (0, 0, k - v.shape[-2], 0)) for v in vectors]

        self._subspaces = Subspaces(rows("right"), rows("left"), next_is_right=right)
        self._n_kept = k // 2
        self.n_products = 0
        """How many products with one of these weights were taken."""
        self._products = {
            side: self._prepared(side, *self._subspaces.multiplied(right=side))
            for side in (True, False)
        }
        self._plain = [_is_plain(target) for target in members]
        self._found = {
            side: self._u_v_adder(members, pair) for side, pair in self._subspaces.pairs.items()
        }
        self._latest = self._found[not right]
        self._found_at_rest = self._u_v_adder(members, self._subspaces.pair_at_rest)
        self._sizes = [math.prod(target.view.shape(target.parameter)) for target in members]
        self._can_rest = k > 1 and self._can_look() and all(t.top == 1 for t in members)
        self._n_rest: int | None = None
        """At rest, for how many steps more; at 0 it is time to look whether it goes on."""
        if self._can_rest:
            if all("rest" in pair for pair in pairs):
                self._n_rest = min(int(pair["rest"]) for pair in pairs)
            u, v = self._subspaces.pair_at_rest
            self._products_at_rest = {
                True: self._prepared(True, v, u),
                False: self._prepared(False, u, v),
            }

    def _can_look(self) -> bool:
        """Return whether sigma may be looked at in the middle of a step.

        Not where that would wait for an accelerator, nor for shards, whose processes might decide
        differently and then wait for each other.

        Returns:
            Whether there is neither here.
        """
        return self.device.type == "cpu" and not self._sharded

    @staticmethod
    def _u_v_adder(
        members: list[Target], pair: tuple[list[Tensor], list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor], list[Adder]]:
        """Return u, v and adder of each weight as a term has them, of a pair of vectors."""

        def of_rank(target: Target, vectors: Tensor) -> Tensor:
            return vectors[0] if _is_plain(target) else vectors[..., : target.top, :]

        left, right = (list(map(of_rank, members, vectors)) for vectors in pair)
        adders = [
            target.view.adder(target.parameter, u, v)
            for target, u, v in zip(members, left, right, strict=True)
        ]
        return left, right, adders

    def _prepared(
        self, right: bool, vectors: Sequence[Tensor], outs: Sequence[Tensor]
    ) -> list[Product]:
        """Prepare the products on one side with some vectors of each weight."""
        return [
            (target.view.matvec if right else target.view.rmatvec)(
                target.parameter.detach(), vectors_, out
            )
            for target, vectors_, out in zip(self._members, vectors, outs, strict=True)
        ]

    @property
    def key(self) -> object:
        """What all of these weights have in common, and no other batch has, as in ``_batches``."""
        vectors = self._subspaces.right.tensor
        return vectors.device, vectors.dtype, len(vectors), self._subspaces.next_is_right

    def lean(self) -> None:
        """Let vectors look for directions that they do not see, after a step that moved them."""
        if self._latest is not self._found_at_rest:
            self._subspaces.lean()

    def settle(self, tolerance: float) -> None:
        """Refine, and rest in the next steps, if this one raised few sigmas by much of a tolerance.

        Few, or none: these are refined as long as they rise by so much, a few times. After a rest,
        in which vectors fall behind, it may be all of the tolerance.
        """
        limit = CALM * tolerance if self._n_rest is None else tolerance
        rests = (
            self._can_rest
            and self._are_few(self._subspaces.rising(limit))
            and self._subspaces.is_sound()
        )
        self._n_rest = REST if rests else None
        self.refine(limit if rests else tolerance)

    def rest(self, tolerance: float) -> bool:
        """Multiply the best vector of each weight alone, if that will do.

        A few weights for which it does not do get steps of their own.

        Returns:
            Whether the terms are found. A step of all weights is due otherwise.
        """
        if not self._n_rest:
            return False
        products = self._products_at_rest[self._subspaces.next_is_right]
        for product in products:
            product()
        self.n_products += len(products)
        due = self._subspaces.stay(tolerance)
        if due is None or not self._are_few(due):
            self._n_rest = None
            return False
        self._n_rest -= 1
        self._latest = self._found_at_rest
        if due:
            self._refine(due, tolerance)
            some = self._subspaces.some(due)
            self._subspaces.sit(some)
            self._subspaces.lean(some)
            if not self._subspaces.is_sound():
                self._n_rest = None
        return True

    def _are_few(self, weights: Sequence[int]) -> bool:
        """Whether steps of some weights alone take clearly less than one of all."""
        return sum(self._sizes[index] for index in weights) <= FEW * sum(self._sizes)

    def multiply(
        self, weights: Sequence[int] | None = None
    ) -> "Iterator[tuple[ProcessGroup, Tensor]]":
        """Take one product with each weight, or with some.

        Returns:
            What is to be added up over processes.
        """
        right = self._subspaces.next_is_right
        self._subspaces.reserve()
        products = self._products[right]
        if weights is not None:
            products = [products[index] for index in weights]
        for product in products:
            product()
        self.n_products += len(products)
        _, outs = self._subspaces.multiplied(right=right)
        return ((group, outs[index]) for index, group in self._sharded)

    def step(self) -> None:
        """Find the best vectors, once the products have been computed."""
        self._latest = self._found[self._subspaces.next_is_right]
        self._subspaces.step()

    def refine(self, tolerance: float) -> None:
        """Take two products more with the weights whose sigma the last ones raised, and so on.

        Sigma of a single vector is all that a product finds, and never rises.
        """
        if self._can_look():
            self._refine(self._subspaces.rising(tolerance), tolerance)

    def _refine(self, weights: Sequence[int], tolerance: float) -> None:
        for _ in range(MOST_REFINEMENTS):
            if not weights:
                return
            some = self._subspaces.some(weights)
            for _ in range(2):
                self.multiply(weights)
                self._subspaces.step(some)
            weights = self._subspaces.rising(tolerance)

    def terms(self) -> Iterator[Term]:
        """Return the terms that the last step found."""
        return map(Term, self._sigmas(), *self._latest)

    def _sigmas(self) -> Iterator[float | Tensor]:
        """Give each weight its singular values: numbers, or tensors that autograd can use."""
        sigma = self._subspaces.sigma
        all_plain = all(self._plain)
        if all_plain and sigma.is_cpu:
            return iter(sigma[:, 0].tolist())
        sigma = sigma.clone()
        if all_plain:
            return iter(sigma[:, 0].unbind())
        parts = torch.split(sigma, self._subspaces.left.counts)
        return map(self._sigma, self._members, parts)

    @staticmethod
    def _sigma(target: Target, sigma: Tensor) -> float | Tensor:
        if _is_plain(target):
            return float(sigma[0, 0]) if sigma.is_cpu else sigma[0, 0]
        sigma = sigma[:, : target.top]
        return sigma if _has_blocks(target) else sigma[0]

    def vectors(self) -> dict[str, Vectors]:
        """Return the vectors by name, as views."""
        right, left = self._subspaces.right.each, self._subspaces.left.each
        # Without places for images.
        waiting = slice(right[0].shape[-2] - self._n_kept, None)
        if self._subspaces.next_is_right:
            left = [rows[..., waiting, :] for rows in left]
        else:
            right = [rows[..., waiting, :] for rows in right]
        rest = {}
        if self._n_rest is not None:
            rest = {"rest": torch.tensor(self._n_rest, device="cpu")}
        return {
            name: {"left": u, "right": v, **rest}
            for name, u, v in zip(self._names, left, right, strict=True)
        }


def _iterated(
    batches: "Sequence[_Batch]",
    n_products: int,
    tolerance: float = math.inf,
    *,
    may_rest: bool = False,
) -> list[Term]:
    """Take some products with each weight and return the last terms, by target."""
    terms: dict[int, Term] = {}
    # What autograd does for kernels that it does not record took 3 % of the term on MobileNetV3.
    with torch.inference_mode(), _without_autocast({batch.device.type for batch in batches}):
        moving = [batch for batch in batches if not (may_rest and batch.rest(tolerance))]
        for _ in range(n_products):
            add_up([part for batch in moving for part in batch.multiply()])
            for batch in moving:
                batch.step()
        for batch in moving:
            if may_rest:
                batch.settle(tolerance)
            else:
                batch.refine(tolerance)
    for batch in batches:
        terms.update(zip(batch.indices, batch.terms(), strict=True))
    return [terms[index] for index in range(len(terms))]


def _batches(targets: Sequence[Target], vectors: Mapping[str, Vectors]) -> list[_Batch]:
    """Arrange weights in batches."""
    members: dict[object, list[int]] = {}
    for index, target in enumerate(targets):
        pair, parameter = vectors[target.name], target.parameter
        k = max(pair["left"].shape[-2], pair["right"].shape[-2])
        key = parameter.device, _at_least_float32(parameter), k, _next_is_right(pair)
        members.setdefault(key, []).append(index)
    return [_Batch(targets, indices, vectors) for indices in members.values()]


def _are_distinct(batches: Sequence[_Batch]) -> bool:
    """Return whether ``_batches`` would keep their weights apart, as they are by now."""
    # Most often there is one, in a place where the caches are full of other things.
    return len(batches) < 2 or len({batch.key for batch in batches}) == len(batches)


def _without_rest(vectors: Vectors) -> Vectors:
    return {key: part for key, part in vectors.items() if key != "rest"}


def _next_is_right(pair: Vectors) -> bool:
    """Whether the next product is with the right vectors: the side that has more of them."""
    return pair["right"].shape[-2] > pair["left"].shape[-2]


@torch.no_grad()
def _exact_term(target: Target) -> Term:
    with _without_autocast({target.parameter.device.type}):
        matrix = target.view.matrix(target.parameter.detach()).double()
    if not matrix.isfinite().all():
        raise ValueError(
            f"expected finite weights, found NaN or infinity in {target.name!r}, which has no SVD: "
            "load a sound checkpoint, and lower the learning rate or clip gradients if training "
            "came to this"
        )
    u, sigma, vh = torch.linalg.svd(matrix, full_matrices=False)
    if _is_plain(target):
        return _term(target, float(sigma[0]), u[:, 0].contiguous(), vh[0])
    top = slice(0, target.top)
    return _term(target, sigma[..., top], u.mT[..., top, :].contiguous(), vh[..., top, :])


def _term(target: Target, sigma: float | Tensor, u: Tensor, v: Tensor) -> Term:
    return Term(sigma, u, v, target.view.adder(target.parameter, u, v))


def _at_least_float32(weight: Tensor) -> torch.dtype:
    """Half precision is too coarse for an iteration that feeds on its own result."""
    return torch.promote_types(weight.dtype, torch.float32)


def _without_autocast(device_types: Iterable[str]) -> AbstractContextManager[object]:
    """Autocast is still active in a hook when backward() runs inside its block."""
    available = filter(torch.amp.is_autocast_available, device_types)
    enabled = [device_type for device_type in available if torch.is_autocast_enabled(device_type)]
    if not enabled:
        return nullcontext()  # to switch off what is off takes time
    stack = ExitStack()
    for device_type in enabled:
        stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack


def _is_of_size(target: Target, entry: object) -> bool:
    """Whether saved vectors are of the target's input size, which they say if it is unknown."""
    size = target.view.observes
    saved = entry.get("input_size") if isinstance(entry, Mapping) else None
    if size is None or not isinstance(saved, Tensor):
        return size is None
    if size.value is None:
        size.value = tuple(saved.tolist())
    return size.value == tuple(saved.tolist())


def _checked_vectors(target: Target, vectors: object, k: int) -> Vectors:
    """Return a copy of saved vectors, or say what is wrong with them."""
    name, (*batch, m, n) = target.name, target.view.shape(target.parameter)
    counts = (k // 2, k), (k, k // 2)
    allowed = [((*batch, left, m), (*batch, right, n)) for left, right in counts]
    expected = (
        f"expected for {name!r} finite non-zero vectors 'left' and 'right' of shape "
        f"{allowed[0][0]} and {allowed[0][1]}, or {allowed[1][0]} and {allowed[1][1]}, found"
    )
    remedy = (
        "load a state dict of this model, n_vectors and choose, or delete its 'snr_hooks' entry"
    )
    if not isinstance(vectors, Mapping) or not vectors.keys() >= {"left", "right"}:
        raise ValueError(f"{expected} a {type(vectors).__name__}; {remedy}")
    parts = [vectors["left"], vectors["right"]]
    if not all(isinstance(part, Tensor) for part in parts):
        raise ValueError(f"{expected} no tensors; {remedy}")
    shapes = tuple(tuple(part.shape) for part in parts)
    if shapes not in allowed:
        saved = max(shape[-2] if len(shape) > 1 else 0 for shape in shapes)
        other = f", as with n_vectors={saved}" if saved != k else ""
        raise ValueError(f"{expected} {shapes[0]} and {shapes[1]}{other}; {remedy}")
    if not all(part.isfinite().all() and part.any(dim=-1).all() for part in parts):
        raise ValueError(f"{expected} some that are zero or not finite; {remedy}")
    lengths = torch.cat([part.double().norm(dim=-1).flatten() for part in parts])
    # A single vector counts as a unit vector; of several the lengths are known, but may not be
    # so large that rounding would make sigma no lower bound.
    shortest, longest = (1 - 1e-3, 1 + 1e-3) if k == 1 else (0.0, 100.0)
    if lengths.min() < shortest or lengths.max() > longest:
        raise ValueError(
            f"{expected} lengths of {lengths.min()} to {lengths.max()}, which are no vectors of an "
            f"iteration with {k}; {remedy}"
        )
    copies = {side: vectors[side].detach().clone() for side in ("left", "right")}
    return {**copies, **_checked_rest(name, vectors, remedy)}


def _checked_rest(name: str, vectors: Vectors, remedy: str) -> Vectors:
    """Return for how many steps a weight will be at rest, if the entry says so."""
    rest = vectors.get("rest")
    if rest is None:
        return {}
    if not isinstance(rest, Tensor) or rest.shape != () or rest not in range(REST + 1):
        raise ValueError(
            f"expected 'rest' of {name!r} to be a tensor of a number of steps, 0 to {REST}, found "
            f"{rest!r}; {remedy}"
        )
    # Sigma is the length of a product with the first vector, in the first such step.
    first = vectors["right" if _next_is_right(vectors) else "left"][..., 0, :]
    if not ((first.double().norm(dim=-1) - 1).abs() < 1e-3).all():
        raise ValueError(
            f"expected the first vectors of {name!r}, which is at rest, to be unit vectors, found "
            f"norms of {first.norm(dim=-1)}; {remedy}"
        )
    return {"rest": rest.detach().clone()}


def _checked_held(target: Target, entry: Mapping[str, object]) -> tuple[Term, int]:
    """Return a saved term with its age, or say what is wrong with it."""
    sigma_shape, u_shape, v_shape = _term_shapes(target)
    remedy = "load a state dict of this model, or delete its 'snr_hooks' entry"
    parts: dict[str, Tensor] = {}
    for key, shape in {"sigma": sigma_shape, "u": u_shape, "v": v_shape, "age": ()}.items():
        part = entry.get(key)
        if not isinstance(part, Tensor) or part.shape != shape or not part.isfinite().all():
            raise ValueError(
                f"expected the held {key!r} of {target.name!r} to be a finite tensor of shape "
                f"{shape}, found {part!r}; {remedy}"
            )
        parts[key] = part.detach().clone()
    sigma, age = parts["sigma"], int(parts["age"])
    norms = torch.cat([parts[key].double().norm(dim=-1).view(-1) for key in ("u", "v")])
    if (sigma < 0).any() or age < 0 or not ((norms - 1).abs() < 1e-3).all():
        raise ValueError(
            f"expected the held term of {target.name!r} to have sigma >= 0, age >= 0 and unit "
            f"vectors, found {sigma.min()}, {age} and vectors of norm {norms.min()} to "
            f"{norms.max()}; {remedy}"
        )
    device, dtype = target.parameter.device, _at_least_float32(target.parameter)
    u, v = parts["u"].to(device, dtype), parts["v"].to(device, dtype)
    return _term(target, sigma.to(device) if sigma.ndim else float(sigma), u, v), age


def _is_plain(target: Target) -> bool:
    """Whether a target is one map of which one singular value is penalized."""
    return target.top == 1 and not _has_blocks(target)


def _has_blocks(target: Target) -> bool:
    """Whether a target has a dimension of blocks, before rows and columns."""
    return len(target.view.shape(target.parameter)) > 2


def _term_shapes(target: Target) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the shapes of sigma, u and v in a term."""
    *batch, m, n = target.view.shape(target.parameter)
    leading = () if _is_plain(target) else (*batch, min(target.top, m, n))
    return leading, (*leading, m), (*leading, n)
