"""What an estimator is asked for, and when: one product a step, for all weights at once."""

import copy
import pickle

import pytest
import torch
from _models import build
from torch import nn

from snr_hooks import SNROptimizer, audit, discover
from snr_hooks.estimators import ExactSVD, Held, SubspaceIteration
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
    opt = SNROptimizer(sgd(model), model, LAMBDA, **options)
    train(model, opt, 1)
    steps = ["".join(sides[60:])]  # after the warm-up: 30 products with each
    for _ in range(4):
        sides.clear()
        train(model, opt, 1)
        steps.append("".join(sides))
    assert steps == expected


def test_accumulation_computes_once_and_a_written_weight_anew(sides):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, LAMBDA)
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
    [SubspaceIteration(1, 2, 0), ExactSVD(), Held(SubspaceIteration(1, 2, 0), 3)],
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
    estimator = SubspaceIteration(1, 2, 0)
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
    estimator = SubspaceIteration(1, 2, 0)
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
