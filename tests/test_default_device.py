"""Whatever torch's default device is, what belongs to a weight is where the weight is.

The meta device stands for an accelerator: nothing on it can be read or copied.
"""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from snr_hooks import Penalty, SNROptimizer, audit, compare, lipschitz, spectra

OPERATOR = {"view": "operator", "input_size": (6, 6)}
OPTIONS = {
    "default": {},
    "decoupled": {"decoupled": True},
    "exact": {"exact": True},
    "held": {"n_power_iterations": 0.25},
    "one_vector": {"n_vectors": 1},
    "penalty": {"choose": {"*": {"penalty": Penalty(lambda s: s**3 / 3, torch.square)}}},
    "decoupled_sigma": {"decoupled": True, "choose": {"*": {"penalty": "sigma"}}},
    "hinge": {"choose": {"*": {"penalty": {"hinge": 0.1}}}},
    "blocks": {"choose": {"*": {"view": "blocks", "norm": "each"}}},
    "pooled": {"choose": {"*": {"view": "blocks", "norm": "largest", "top": 2}}},
    "top": {"choose": {"*": {"top": 2}}},
    "operator": {"choose": {"0.weight": OPERATOR}},
    "folded": {"choose": {"*": {"weight": "folded"}}},
}


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", groups=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(36, 3),
        )


def trained(options, x, where):
    """Train, save, and train on with a new wrapper from what was saved; return what is found."""
    model = network()
    state = None
    with where:
        for _ in range(2):
            opt = SNROptimizer(torch.optim.SGD(model.parameters(), 0.1), model, 0.1, **options)
            first = opt.spectral_norms()
            if state is not None:
                opt.load_state_dict(state)
            for _ in range(3):
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()
            state = copy.deepcopy(opt.state_dict())
            norms = opt.spectral_norms()
            rows = [row[3:] for row in audit(opt)]
            opt.remove()
    return model.state_dict(), first, norms, rows, state["snr_hooks"]["vectors"]


@pytest.mark.parametrize("case", OPTIONS)
def test_training_is_the_same(case, monkeypatch):
    # Tried on the default device, where users' derivatives have their constants.
    monkeypatch.setattr("snr_hooks.penalties._check_derivative", lambda penalty: None)
    x = torch.randn(8, 4, 6, 6)
    plain, *expected = trained(OPTIONS[case], x, nullcontext())
    weights, *found = trained(OPTIONS[case], x, torch.device("meta"))
    assert all(torch.equal(plain[name], weights[name]) for name in plain)
    *numbers, vectors = found
    assert numbers == expected[:-1]
    for parts in vectors.values():
        assert {part.device.type for part in parts.values()} == {"cpu"}


def test_matrices_of_zeros_and_those_that_are_not_finite():
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    nn.init.zeros_(model[0].weight)
    with torch.device("meta"):
        opt = SNROptimizer(torch.optim.SGD(model.parameters(), 0.1), model)
        assert opt.spectral_norms()["0.weight"] == 0
        nn.init.constant_(model[0].weight, math.nan)
        assert spectra(model)["0.weight"].isnan().all()


def test_diagnostics_are_the_same(monkeypatch):
    monkeypatch.setattr("snr_hooks.diagnostics._LARGEST_MATRIX", 0)  # operators are iterated
    model, x = network().eval(), torch.randn(2, 4, 6, 6)
    choose = {"0.weight": OPERATOR}

    def found():
        values = spectra(model, choose)
        assert all(value.device.type == "cpu" for value in values.values())
        sums = [value.sum().item() for value in values.values()]
        return lipschitz(model, x), sums, compare(model, model, choose)

    expected = found()
    with torch.device("meta"):
        assert found() == expected
