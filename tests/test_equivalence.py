"""Training with the wrapper equals training with the penalty in the loss."""

import copy

import pytest
import torch
from _models import build
from _oracles import exact_terms
from _reference import train

from snr_hooks import SNROptimizer, discover

LAMBDA = 0.05
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.005),
}


def separated(name):
    """A model of the zoo with every sigma_1 doubled, well above sigma_2.

    Where the two meet, the gradient of the penalty is not unique and rounding decides
    which way a trajectory goes; no implementation could agree with another to 1e-12.
    """
    model = build(name)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = [target.name for target in discover(model).targets]
    with torch.no_grad():
        for name, (_, term) in exact_terms(model, names).items():
            parameters[name] += term
    return model


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("n_micro_batches", [1, 3])
@pytest.mark.parametrize("max_norm", [None, 0.05])
@pytest.mark.parametrize("name", ["convolutions", "tied"])
def test_twenty_steps_equal_the_penalty_in_the_loss(name, optimizer, n_micro_batches, max_norm):
    make = OPTIMIZERS[optimizer]
    wrapped = separated(name)
    reference, plain = copy.deepcopy(wrapped), copy.deepcopy(wrapped)
    options = {"n_micro_batches": n_micro_batches, "max_norm": max_norm}
    strengths = {target.name: LAMBDA for target in discover(wrapped).targets}

    train(reference, make(reference.parameters()), 20, strengths=strengths, **options)
    opt = SNROptimizer(make(wrapped.parameters()), wrapped, LAMBDA, exact=True)
    train(wrapped, opt, 20, **options)
    train(plain, make(plain.parameters()), 20, **options)

    assert distance(wrapped, reference) <= 1e-12
    assert distance(wrapped, plain) > 1e-3  # the penalty did something


def test_a_strength_per_param_group():
    def groups(model):
        first, second = list(model.body[0].parameters()), list(model.body[2].parameters())
        return [{"params": first, "snr_lambda": 0.1}, {"params": second, "snr_lambda": 0.0}]

    wrapped = separated("mlp")
    reference = copy.deepcopy(wrapped)
    train(
        reference,
        torch.optim.SGD(reference.parameters(), lr=0.1),
        20,
        strengths={"body.0.weight": 0.1},
    )
    opt = SNROptimizer(torch.optim.SGD(groups(wrapped), lr=0.1), wrapped, exact=True)
    train(wrapped, opt, 20)
    assert distance(wrapped, reference) <= 1e-12


def test_power_iteration_stays_close_to_the_exact_term():
    exact, iterated = separated("convolutions"), separated("convolutions")
    for model, options in ((exact, {"exact": True}), (iterated, {"n_power_iterations": 20})):
        opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.05, **options)
        train(model, opt, 20)
    assert distance(exact, iterated) <= 1e-6
