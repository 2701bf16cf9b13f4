"""What an estimator is asked for, and when: one product a step, for all weights at once."""

import copy
import math
import pickle

import pytest
import torch
from _models import build
from torch import nn

from snr_hooks import SNROptimizer, audit, discover
from snr_hooks.estimators import (
    MOST_REFINEMENTS,
    REST,
    WARM_UP,
    ExactSVD,
    Held,
    SubspaceIteration,
    _Batch,
)
from snr_hooks.subspace import Subspaces, starting_vectors
from snr_hooks.views import MatrixView

LAMBDA = 0.05


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(model, opt, n_steps):
    for _ in range(n_steps):
        opt.zero_grad()
        model(model.example).square().mean().backward()
        opt.step()


@pytest.fixture
def sides(monkeypatch):
    """Which products are computed, in order: R for W V, L for W^T U."""
    computed = []

    def recording(prepare, side):
        def prepared(*arguments):
            product = prepare(*arguments)
            return lambda: (computed.append(side), product())

        return prepared

    for name, side in (("matvec", "R"), ("rmatvec", "L")):
        monkeypatch.setattr(MatrixView, name, recording(getattr(MatrixView, name), side))
    return computed


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["RR", "LL", "RR", "LL", "RR"]),
        ({"n_power_iterations": 1}, ["RRLL"] * 5),
        ({"n_power_iterations": 1.5}, ["RRLLRR", "LLRRLL", "RRLLRR", "LLRRLL", "RRLLRR"]),
        ({"n_power_iterations": 0.25}, ["RR", "", "LL", "", "RR"]),
        ({"n_power_iterations": 0.125}, ["RR", "", "", "", "LL"]),
    ],
)
def test_products_in_a_step(sides, options, expected):
    model = build("mlp")  # two weights
    opt = SNROptimizer(sgd(model), model, LAMBDA, tolerance=math.inf, **options)
    train(model, opt, 1)
    steps = ["".join(sides[60:])]  # after the warm-up: 30 products with each
    for _ in range(4):
        sides.clear()
        train(model, opt, 1)
        steps.append("".join(sides))
    assert steps == expected


def test_accumulation_computes_once_and_a_written_weight_anew(sides):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, tolerance=math.inf)
    train(model, opt, 1)
    sides.clear()
    for _ in range(3):
        model(model.example).sum().backward()
    assert len(sides) == 2
    model.zero_grad()
    model(model.example).sum().backward()  # the weights are the same
    assert len(sides) == 2
    model.zero_grad()
    with torch.no_grad():
        model.body[0].weight.mul_(2)
    model(model.example).sum().backward()
    assert len(sides) > 2


def test_a_weight_that_is_written_between_two_backwards_gets_the_term_of_what_it_is():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA)
    model(model.example).sum().backward()  # on the right; the next step is on the left
    model.zero_grad()
    weight = model.body[0].weight
    with torch.no_grad():
        weight.copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    (weight * 0).sum().backward()
    opt.remove()
    u = torch.linalg.svd(weight.grad).U[:, 0]
    torch.testing.assert_close(weight.grad, LAMBDA * torch.outer(u, u @ weight.detach()))


def test_a_weight_whose_memory_is_exchanged_gets_the_term_of_what_it_is():
    layer = nn.Linear(6, 5, bias=False, dtype=torch.float64)
    opt = SNROptimizer(sgd(layer), layer, LAMBDA)
    backward(layer)
    layer.zero_grad()
    version = layer.weight._version
    layer.weight.data = 3 * layer.weight.data
    assert layer.weight._version == version
    backward(layer)
    opt.remove()
    sigma = torch.linalg.matrix_norm(layer.weight, 2).item()
    assert layer.weight.grad.norm().item() == pytest.approx(LAMBDA * sigma, rel=1e-3)


def test_held_terms_are_those_of_the_step_in_which_they_were_computed():
    layer = nn.Linear(5, 4, bias=False, dtype=torch.float64)
    opt = SNROptimizer(
        torch.optim.SGD(layer.parameters(), lr=1.0), layer, LAMBDA, n_power_iterations=0.125
    )
    grads = []
    for step in range(9):
        opt.zero_grad()
        (layer.weight * 0).sum().backward()
        grads.append(layer.weight.grad.clone())
        with torch.no_grad():
            layer.weight.add_(torch.randn(4, 5, generator=torch.Generator().manual_seed(step)))
        opt.step()
    for start in (0, 4):
        for grad in grads[start + 1 : start + 4]:
            assert torch.equal(grad, grads[start])
    assert not torch.equal(grads[4], grads[0])
    assert not torch.equal(grads[8], grads[4])


@pytest.mark.parametrize("n_power_iterations", [0.5, 0.25])
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))]
)
def test_a_copy_goes_on_as_the_original(n_power_iterations, duplicate):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=n_power_iterations)
    train(model, opt, 3)
    twin, twin_opt = duplicate((model, opt))
    train(model, opt, 4)
    train(twin, twin_opt, 4)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_looking_changes_nothing():
    models = [build("convolutions"), build("convolutions")]
    opts = [SNROptimizer(sgd(model), model, LAMBDA) for model in models]
    for _ in range(5):
        opts[1].spectral_norms()
        audit(opts[1])
        opts[1].state_dict()
        for model, opt in zip(models, opts, strict=True):
            train(model, opt, 1)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "estimator",
    [
        SubspaceIteration(1, 2, math.inf, 0),
        ExactSVD(),
        Held(SubspaceIteration(1, 2, math.inf, 0), 3),
    ],
    ids=repr,
)
def test_what_is_peeked_at_is_what_comes(estimator):
    targets = discover(build("convolutions")).targets
    for _ in range(7):
        peeked = [(term.sigma, term.u.clone(), term.v.clone()) for term in estimator.peek(targets)]
        for (sigma, u, v), term in zip(peeked, estimator.advance(targets), strict=True):
            assert term.sigma == sigma
            assert torch.equal(term.u, u)
            assert torch.equal(term.v, v)


def test_weights_that_come_and_go_keep_their_vectors():
    targets = discover(build("convolutions")).targets
    estimator = SubspaceIteration(1, 2, math.inf, 0)
    for _ in range(4):
        estimator.advance(targets)
    before = estimator.state_dict()
    estimator.advance(targets[:1])
    after = estimator.state_dict()
    assert before.keys() == after.keys()
    for name, pair in before.items():
        same = all(
            part.shape == after[name][side].shape and torch.equal(part, after[name][side])
            for side, part in pair.items()
        )
        assert same == (name != targets[0].name)
    terms = estimator.advance(targets)  # on different sides by now
    for target, term in zip(targets, terms, strict=True):
        matrix = target.view.matrix(target.parameter.detach())
        assert term.sigma == pytest.approx(torch.linalg.matrix_norm(matrix, 2).item(), rel=1e-3)


def test_weights_that_join_later_join_the_side_of_the_others():
    targets = discover(build("convolutions")).targets
    estimator = SubspaceIteration(1, 2, math.inf, 0)
    estimator.advance(targets[:1])
    estimator.advance(targets)
    assert len(estimator._batches) == 1


def test_a_moved_weight_is_followed():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_vectors=6)
    train(model, opt, 2)
    for p in model.parameters():
        p.data = p.data.clone() * 3
    expected = {
        name: torch.linalg.matrix_norm(p.detach(), 2).item()
        for name, p in model.named_parameters()
        if p.ndim > 1
    }
    for _ in range(2):  # on both sides
        model.zero_grad()
        (sum(p.sum() for p in model.parameters()) * 0).backward()
        for name, sigma in expected.items():
            norm = model.get_parameter(name).grad.norm().item()
            assert norm == pytest.approx(LAMBDA * sigma, rel=1e-3)
        opt._prepare_next_step()


def test_channels_last_weights_take_the_same_path():
    models = [nn.Conv2d(3, 8, 3, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    grads = []
    for model in models:
        opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, LAMBDA)
        for _ in range(4):
            opt.zero_grad()
            (model.weight * 0).sum().backward()
            opt.step()
        grads.append(model.weight.grad.contiguous())
    torch.testing.assert_close(*grads)


def backward(model):
    (sum(p.sum() for p in model.parameters()) * 0).backward()


def test_loading_a_state_outdates_the_terms():
    layer = nn.Linear(6, 5, bias=False)
    opt = SNROptimizer(sgd(layer), layer, 1.0)
    backward(layer)
    state = copy.deepcopy(opt.state_dict())
    opt.step()
    backward(layer)
    entry = state["snr_hooks"]["vectors"]["weight"]
    entry.pop("rest", None)
    for part in entry.values():
        part.normal_(generator=torch.Generator().manual_seed(0))
    opt.load_state_dict(state)
    layer.zero_grad()
    expected = opt.spectral_norms()["weight"]
    backward(layer)
    assert layer.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_an_optimizer_that_writes_through_data_gets_new_terms():
    class Old(torch.optim.SGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.data.mul_(3)

    layer = nn.Linear(6, 5, bias=False)
    opt = SNROptimizer(Old(layer.parameters(), lr=0.1), layer, 1.0, n_vectors=4)
    for _ in range(4):
        opt.zero_grad()
        backward(layer)
        sigma = torch.linalg.svdvals(layer.weight.detach())[0].item()
        assert layer.weight.grad.norm().item() == pytest.approx(sigma, rel=1e-2)
        opt.step()


def two_groups(model, second, **options):
    groups = [
        {"params": list(model.body[0].parameters())},
        {"params": list(model.body[2].parameters()), "snr_lambda": second},
    ]
    return SNROptimizer(torch.optim.SGD(groups, lr=0.1), model, 1.0, **options)


def test_a_term_computed_early_is_held_as_long_as_any_other():
    model = build("mlp")
    opt = two_groups(model, 0.0, n_power_iterations=0.125)
    grads = []
    for step in range(6):
        if step == 2:
            opt.param_groups[1]["snr_lambda"] = 1.0  # computes all terms; four steps start here
        opt.zero_grad()
        backward(model)
        grads.append(model.body[0].weight.grad.clone())
        with torch.no_grad():
            model.body[0].weight.add_(torch.randn(8, 6, dtype=torch.float64))
        opt.step()
    assert not torch.equal(grads[1], grads[2])
    for later in grads[3:]:
        assert torch.equal(grads[2], later)


def test_in_between_held_terms_nothing_is_asked_for(monkeypatch):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=0.125)
    asked = []
    advance = opt._term.estimator.advance
    monkeypatch.setattr(opt._term.estimator, "advance", lambda t: (asked.append(t), advance(t))[1])
    counts = []
    for _ in range(9):
        asked.clear()
        train(model, opt, 1)
        counts.append(len(asked))
    assert counts == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_held_terms_have_the_lambda_of_the_group_that_holds_their_weight_by_now():
    model = build("mlp")
    opt = two_groups(model, 0.5, n_power_iterations=0.125)
    first, second = (target.parameter for target in opt.targets)
    opt.zero_grad()
    (first * 0).sum().backward()
    with_first = first.grad.clone()
    opt.param_groups[:] = opt.param_groups[::-1]
    opt.zero_grad()
    ((first * 0).sum() + (second * 0).sum()).backward()
    assert torch.equal(first.grad, with_first)
    opt.param_groups[1]["snr_lambda"] *= 2
    opt.zero_grad()
    (first * 0).sum().backward()
    assert torch.equal(first.grad, 2 * with_first)


def test_held_terms_that_could_not_be_renewed_are_renewed_at_the_next_try(monkeypatch):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=0.25)
    train(model, opt, 2)
    opt.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(_Batch, "multiply", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(model)
    weight = model.body[0].weight
    weight.grad = None
    with torch.no_grad():
        weight.mul_(2)
    (weight * 0).sum().backward()
    sigma = torch.linalg.matrix_norm(weight, 2).item()
    assert weight.grad.norm().item() == pytest.approx(LAMBDA * sigma, rel=1e-2)


@pytest.mark.parametrize("choose", ["matrix", "blocks", {"*": {"top": 2, "penalty": "sigma"}}])
@pytest.mark.parametrize("n_vectors", [1, 3])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_held_terms_of_weights_that_were_not_finite_add_nothing_to_sound_ones(
    choose, n_vectors, bad
):
    model = nn.Conv2d(4, 6, 3, groups=2)
    sound = model.weight.detach().clone()

    def wrapped():
        options = {"choose": choose, "n_vectors": n_vectors, "n_power_iterations": 0.25}
        return SNROptimizer(sgd(model), model, LAMBDA, **options)

    opt = wrapped()
    terms, states = [], []
    for step in range(6):
        with torch.no_grad():
            model.weight.copy_(torch.full_like(sound, bad) if step == 2 else sound)
        opt.zero_grad()
        (0 * model.weight).sum().backward()
        terms.append(model.weight.grad)
        opt.step()
        states.append(opt.state_dict())
    assert not terms[3].any()  # held since the step before
    for term in (terms[0], terms[1], terms[4], terms[5]):
        assert term.isfinite().all()
        assert term.any()
    opt.remove()
    for state in states[2:4]:  # which can be loaded
        opt = wrapped()
        opt.load_state_dict(state)
        opt.zero_grad()
        with torch.no_grad():
            model.weight.copy_(sound)
        (0 * model.weight).sum().backward()
        assert model.weight.grad.any()
        opt.remove()


def test_held_terms_of_the_sound_blocks_of_a_weight_are_added_and_can_be_loaded():
    model = nn.Conv2d(4, 6, 3, groups=2)
    options = {"choose": {"*": {"view": "blocks", "norm": "each"}}, "n_power_iterations": 0.25}
    opt = SNROptimizer(sgd(model), model, LAMBDA, **options)
    sound = model.weight.detach().clone()
    for bad in (True, False):
        with torch.no_grad():
            model.weight.copy_(sound)
            model.weight[:3] = math.nan if bad else sound[:3]
        opt.zero_grad()
        (0 * model.weight).sum().backward()
        opt.step()
    assert not model.weight.grad[:3].any()  # held since the step before
    assert model.weight.grad[3:].any()
    opt.load_state_dict(opt.state_dict())


def test_held_terms_with_an_infinite_sigma_add_nothing():
    model = nn.Linear(4, 3, bias=False)
    options = {"n_power_iterations": 0.25, "n_vectors": 1}
    opt = SNROptimizer(sgd(model), model, LAMBDA, **options)
    norms = []
    for value in (3e38, 1.0):
        nn.init.constant_(model.weight, value)
        opt.zero_grad()
        (0 * model.weight).sum().backward()
        norms.append(opt.spectral_norms()["weight"])
        opt.step()
    assert norms[0] == math.inf
    assert not model.weight.grad.any()


def test_held_terms_of_weights_that_were_moved_are_not_counted_twice():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=0.125)
    train(model, opt, 1)
    for target in opt.targets:
        target.parameter.data = target.parameter.data.clone()
    train(model, opt, 1)
    [age] = {int(entry["age"]) for entry in opt.state_dict()["snr_hooks"]["vectors"].values()}
    assert age == 2


def test_held_terms_are_those_of_the_state_that_was_loaded():
    layer = nn.Linear(6, 5, bias=False)
    opt = SNROptimizer(sgd(layer), layer, LAMBDA, n_power_iterations=0.125)
    grads = []
    for factor in (1, 3):
        with torch.no_grad():
            layer.weight.mul_(factor)
        for _ in range(4):
            opt.zero_grad()
            backward(layer)
            grads.append(layer.weight.grad.clone())
            if len(grads) == 2:
                state = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    opt.zero_grad()
    backward(layer)
    assert torch.equal(layer.weight.grad, grads[0])
    assert not torch.equal(layer.weight.grad, grads[-1])


def test_a_saved_state_with_held_terms_is_a_snapshot():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=0.25)
    train(model, opt, 2)
    vectors = opt.state_dict()["snr_hooks"]["vectors"]
    before = copy.deepcopy(vectors)
    train(model, opt, 6)
    for name, parts in before.items():
        for key, part in parts.items():
            assert torch.equal(vectors[name][key], part)


def test_a_group_that_is_off_and_a_frozen_weight_cost_nothing():
    model = build("mlp")
    opt = two_groups(model, 0.0)
    train(model, opt, 3)
    assert opt.state_dict()["snr_hooks"]["vectors"].keys() == {"body.0.weight"}
    opt.param_groups[1]["snr_lambda"] = 1.0
    train(model, opt, 1)
    model.body[2].weight.requires_grad_(False)
    before = opt.state_dict()["snr_hooks"]["vectors"]["body.2.weight"]
    train(model, opt, 3)
    after = opt.state_dict()["snr_hooks"]["vectors"]["body.2.weight"]
    for side, part in before.items():
        assert torch.equal(after[side], part)


@pytest.mark.parametrize("saved_with", [0.5, 0.125])
@pytest.mark.parametrize("loaded_with", [0.5, 0.125, 1])
def test_states_load_across_numbers_of_iterations(saved_with, loaded_with):
    model = build("mlp", torch.float32)
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=saved_with)
    train(model, opt, 3)
    state = copy.deepcopy(opt.state_dict())
    double = copy.deepcopy(model).double()
    opt = SNROptimizer(sgd(double), double, LAMBDA, n_power_iterations=loaded_with)
    opt.load_state_dict(state)
    train(double, opt, 5)
    for parts in opt.state_dict()["snr_hooks"]["vectors"].values():
        vectors = [part for key, part in parts.items() if key not in ("age", "rest")]
        assert {part.dtype for part in vectors} == {torch.float64}


@pytest.mark.parametrize("way", ["setter", "load", "copy"])
def test_a_weight_that_joins_the_optimizer_in_any_way_is_regularized(way):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    opt = SNROptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), model, 0.5)
    second = list(model[1].parameters())
    if way == "setter":
        opt.param_groups = [opt.param_groups[0], {**opt.param_groups[0], "params": second}]
    else:
        opt.optimizer.add_param_group({"params": second, "snr_lambda": 0.5})
    if way == "load":
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    elif way == "copy":
        model, opt = copy.deepcopy((model, opt))
    opt.zero_grad()
    backward(model)
    assert model[1].weight.grad.norm() > 0
    assert len(opt.targets) == 2


def test_assigned_groups_are_read_at_once():
    model = build("mlp")
    opt = two_groups(model, 2.0)
    opt.param_groups = [dict(group) for group in reversed(opt.param_groups)]
    backward(model)
    norm = torch.linalg.matrix_norm(model.body[2].weight.detach(), 2).item()
    assert model.body[2].weight.grad.norm().item() == pytest.approx(2 * norm, rel=1e-3)


def test_a_weight_transposed_in_place_is_followed():
    layer = nn.Linear(6, 6, bias=False)
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.0), layer, 1.0, n_vectors=4)
    for step in range(12):
        if step == 3:
            layer.weight.data = layer.weight.data.t()
        opt.zero_grad()
        backward(layer)
        opt.step()
    u, s, vh = torch.linalg.svd(layer.weight.detach())
    torch.testing.assert_close(
        layer.weight.grad, s[0] * torch.outer(u[:, 0], vh[0]), rtol=1e-2, atol=1e-3
    )


# --- further products for weights whose sigma rises ---


@pytest.fixture
def multiplied(monkeypatch):
    """The numbers of the weights that were multiplied, product after product."""
    found = []
    multiply = _Batch.multiply

    def recording(batch, weights=None):
        found.append(list(range(len(batch.indices))) if weights is None else list(weights))
        return multiply(batch, weights)

    monkeypatch.setattr(_Batch, "multiply", recording)
    return found


def moving(drifts, generator):
    """Weights that move by their drift, relative to themselves, at every call."""
    layers = nn.ModuleList(
        nn.Linear(n, m, bias=False, dtype=torch.float64)
        for m, n in ((30, 50), (40, 25), (24, 200), (25, 25))
    )

    @torch.no_grad()
    def move():
        for layer, drift in zip(layers, drifts, strict=True):
            noise = torch.randn(layer.weight.shape, generator=generator, dtype=torch.float64)
            layer.weight += drift * layer.weight.std() * noise

    return layers, move


class Alone:
    """The vectors of one weight, refined by the rule in plain words."""

    def __init__(self, name, weight, k):
        m, n = weight.shape
        kept = starting_vectors(k // 2, m, 0, f"left of {name}")
        left = torch.cat([kept.new_zeros(k - k // 2, m), kept])
        right = starting_vectors(k, n, 0, name)
        self.subspaces = Subspaces([right], [left], next_is_right=True)

    def step(self, weight):
        right = self.subspaces.next_is_right
        self.subspaces.reserve()
        [vectors], [out] = self.subspaces.multiplied(right=right)
        out.copy_(vectors @ (weight.T if right else weight))
        self.subspaces.step()
        return self.subspaces.sigma[0, 0].item()

    def refined(self, weight, tolerance):
        right = self.subspaces.next_is_right
        [vectors], _ = self.subspaces.multiplied(right=right)
        image = weight @ vectors[0] if right else vectors[0] @ weight
        before, n_steps = (image.norm() / vectors[0].norm()).item(), 1
        sigma = self.step(weight)
        while sigma > (1 + tolerance) * before and n_steps < 1 + 2 * MOST_REFINEMENTS:
            before, n_steps = sigma, n_steps + 2
            self.step(weight)
            sigma = self.step(weight)
        self.subspaces.lean()
        return sigma, n_steps


@pytest.mark.parametrize("k", [2, 4, 5])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 1e-2])
def test_each_weight_is_multiplied_until_that_raises_its_sigma_no_more(
    monkeypatch, multiplied, k, tolerance
):
    monkeypatch.setattr("snr_hooks.estimators.FEW", -1.0)  # none is at rest
    layers, move = moving((0.3, 0.0, 0.05, 1.0), torch.Generator().manual_seed(k))
    targets = discover(layers).targets
    iteration = SubspaceIteration(1, k, tolerance, 0)
    twins = [Alone(target.name, target.parameter.detach(), k) for target in targets]
    counts = []
    for step in range(6):
        multiplied.clear()
        terms = iteration.advance(targets)
        products = multiplied[2 * WARM_UP :] if step == 0 else multiplied
        for i, (target, term, twin) in enumerate(zip(targets, terms, twins, strict=True)):
            weight = target.parameter.detach()
            for _ in range(2 * WARM_UP if step == 0 else 0):
                twin.step(weight)
            sigma, n_steps = twin.refined(weight, tolerance)
            assert sum(i in weights for weights in products) == n_steps
            assert term.sigma == pytest.approx(sigma, rel=1e-7)
            counts.append(n_steps)
            # Refined or not, sigma is the bound of the u and v that come with it.
            bounds = (weight @ term.v).norm(), (weight.T @ term.u).norm()
            assert min(bounds).item() == pytest.approx(term.sigma, rel=1e-9)
        move()
    assert min(counts) == 1
    assert max(counts) > 1


def test_without_tolerance_or_with_one_vector_no_weight_gets_more(multiplied):
    for options in ({"tolerance": math.inf}, {"n_vectors": 1}):
        layers, move = moving((1.0,) * 4, torch.Generator().manual_seed(0))
        opt = SNROptimizer(sgd(layers), layers, LAMBDA, **options)
        backward(layers)
        multiplied.clear()
        for _ in range(4):
            move()
            opt.zero_grad()
            backward(layers)
        assert multiplied == [[0, 1, 2, 3]] * 4


def test_weights_at_rest_get_no_more(multiplied):
    layers, _ = moving((0.0,) * 4, torch.Generator().manual_seed(0))
    opt = SNROptimizer(sgd(layers), layers, LAMBDA)
    for step in range(10 + 5 * (REST + 1)):
        opt.zero_grad()
        backward(layers)
        if step == 9:
            multiplied.clear()
            before = opt.n_products_taken
    # One step in so many is with all vectors; every step takes one product.
    assert multiplied == [[0, 1, 2, 3]] * 5
    assert opt.n_products_taken - before == 5 * (REST + 1) * 4


def test_refinement_finds_a_direction_that_none_of_the_vectors_sees():
    """A weight that jumps: without, sigma is wrong by a factor until the iteration catches up."""
    sigmas = {}
    for tolerance in (1e-3, math.inf):
        torch.manual_seed(0)
        layer = nn.Linear(60, 40, bias=False)
        opt = SNROptimizer(sgd(layer), layer, LAMBDA, tolerance=tolerance)
        backward(layer)
        with torch.no_grad():
            layer.weight += 0.3 * torch.outer(torch.randn(40), torch.randn(60)) / 4
            exact = torch.linalg.matrix_norm(layer.weight, 2).item()
        sigmas[tolerance] = opt.spectral_norms()["weight"] / exact
    assert sigmas[1e-3] > 0.99 > 0.9 > sigmas[math.inf]


def test_the_number_of_products_is_counted_without_the_warm_up(multiplied):
    layers, move = moving((1.0, 0.5, 0.1, 0.0), torch.Generator().manual_seed(0))
    opt = SNROptimizer(sgd(layers), layers, LAMBDA)
    assert opt.n_products_taken == 0
    for _ in range(3):
        opt.zero_grad()
        backward(layers)
        opt.spectral_norms()  # looks only
        move()
    counted = opt.n_products_taken
    multiplied.clear()
    opt.zero_grad()
    backward(layers)
    assert opt.n_products_taken - counted == sum(map(len, multiplied)) > 4
    assert counted >= 12
    opt.load_state_dict(opt.state_dict())
    assert opt.n_products_taken == 0


def test_held_terms_take_no_products():
    layers, _ = moving((0.0,) * 4, torch.Generator().manual_seed(0))
    opt = SNROptimizer(sgd(layers), layers, LAMBDA, n_power_iterations=0.25, tolerance=math.inf)
    for _ in range(4):
        backward(layers)
        opt.step()
    assert opt.n_products_taken == 2 * 4


def jump(layers, seed=0):
    """Change weights beyond recognition."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layers.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            p += 2 * p.std() * noise


def plain(*dtypes):
    layers = nn.ModuleList(nn.Linear(30, 20, bias=False, dtype=dtype) for dtype in dtypes)
    return layers, discover(layers).targets


@pytest.mark.parametrize("n_products", [1, 2, 3])
def test_vectors_lean_once_at_the_end_of_a_step(monkeypatch, n_products):
    calls = []

    def spied(name, call):
        return lambda batch, *arguments: (calls.append(name), call(batch, *arguments))[1]

    for name in ("lean", "multiply"):
        monkeypatch.setattr(_Batch, name, spied(name, getattr(_Batch, name)))
    layers, targets = plain(torch.float64)
    iteration = SubspaceIteration(n_products, 3, 1e-4, 0)
    iteration.advance(targets)
    jump(layers)
    for take_step in (iteration.peek, iteration.advance):
        calls.clear()
        take_step(targets)
        assert calls[-1] == "lean"
        assert calls.count("lean") == 1
        assert len(calls) > 1 + n_products  # some are refinements


def test_a_step_that_fails_and_is_taken_again_is_the_same(monkeypatch):
    terms = []
    for fails in (True, False):
        torch.manual_seed(0)
        layers, targets = plain(torch.float64)
        iteration = SubspaceIteration(1, 3, 1e-4, 0)
        iteration.advance(targets)
        jump(layers)
        if fails:
            with monkeypatch.context() as patch:
                patch.setattr(_Batch, "multiply", lambda *_: 1 / 0)
                for _ in range(3):
                    with pytest.raises(ZeroDivisionError):
                        iteration.advance(targets)
        terms += iteration.advance(targets)
    assert terms[0].sigma == terms[1].sigma
    assert torch.equal(terms[0].v, terms[1].v)


def test_every_batch_is_refined():
    layers, targets = plain(torch.float32, torch.float64)
    iteration = SubspaceIteration(1, 3, 1e-4, 0)
    iteration.advance(targets)
    before = [batch.n_products for batch in iteration._batches]
    jump(layers)
    iteration.advance(targets)
    after = [batch.n_products for batch in iteration._batches]
    assert len(after) == 2
    assert all(new > old + 1 for old, new in zip(before, after, strict=True))


@pytest.mark.parametrize("where", ["accelerator", "shards"])
def test_none_is_refined_where_looking_would_wait_or_processes_might_differ(where):
    layers, targets = plain(torch.float64)
    iteration = SubspaceIteration(1, 3, 0.0, 0)
    iteration.advance(targets)
    [batch] = iteration._batches
    if where == "accelerator":
        batch.device = torch.device("cuda")
    else:
        batch._sharded = [(0, None)]
    jump(layers)
    batch.multiply()
    batch.step()
    before = batch.n_products
    batch.refine(0.0)
    assert batch.n_products == before


def test_what_is_only_looked_at_counts_no_products():
    layers, targets = plain(torch.float32)
    iteration = SubspaceIteration(1, 3, 1e-4, 0)
    iteration.advance(targets)
    before = iteration.n_products_taken
    jump(layers)
    iteration.peek(targets)
    assert iteration.n_products_taken == before


def test_refined_bounds_are_those_of_their_vectors_for_several_singular_values():
    layers, _ = plain(*[torch.float64] * 3)
    targets = discover(layers, choose={"*": {"top": 2}}).targets
    iteration = SubspaceIteration(1, 5, 1e-3, 0)
    iteration.advance(targets)
    for seed in range(3):
        jump(layers[:2], seed)
        before = iteration.n_products_taken
        terms = iteration.advance(targets)
        assert iteration.n_products_taken > before + 3
        for target, term in zip(targets, terms, strict=True):
            weight = target.parameter.detach()
            for sigma, u, v in zip(term.sigma, term.u, term.v, strict=True):
                bounds = (weight @ v).norm(), (weight.T @ u).norm()
                assert min(bounds).item() == pytest.approx(sigma.item(), rel=1e-9)


def test_a_weight_gets_up_to_eight_products_more():
    layers, targets = plain(torch.float64)
    iteration = SubspaceIteration(1, 2, 0.0, 0)  # sigma rises a little with every product
    iteration.advance(targets)
    for _ in range(2):  # the second time it does not come from rest
        jump(layers)
        before = iteration.n_products_taken
        iteration.advance(targets)
    assert iteration.n_products_taken - before == 9


def test_held_terms_of_a_weight_that_is_on_another_device_by_now_are_renewed():
    _, targets = plain(torch.float32)
    held = Held(SubspaceIteration(1, 2, math.inf, 0), 4)
    [term] = held.advance(targets)
    held._terms[targets[0].name] = term._replace(u=term.u.to("meta"), v=term.v.to("meta"))
    [renewed] = held.advance(targets)
    assert renewed.u.device.type == "cpu"


def test_held_terms_that_were_loaded_have_the_dtype_of_the_weight():
    model = build("mlp", torch.float32)
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=0.125)
    train(model, opt, 1)
    double = copy.deepcopy(model).double()
    other = SNROptimizer(sgd(double), double, LAMBDA, n_power_iterations=0.125)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for parts in other.state_dict()["snr_hooks"]["vectors"].values():
        assert parts["u"].dtype == parts["v"].dtype == torch.float64
