"""Audit and spectra against numpy, on plain models and on optimizers."""

import numpy as np
import pytest
import torch
from _models import build
from _oracles import as_matrix, is_transposed
from torch import nn

from snr_hooks import SNROptimizer, audit, spectra


def exact(model, name):
    weight = model.get_parameter(name).detach()
    matrix = as_matrix(weight, transposed=is_transposed(model, name))
    return np.linalg.svd(matrix.double().numpy(), compute_uv=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["convolutions", "one_and_three_dimensions", "channels_last"])
def test_spectra_are_all_singular_values(name, dtype):
    model = build(name, dtype)
    values = spectra(model)
    assert len(values) >= 4
    for parameter, singular_values in values.items():
        assert singular_values.dtype == torch.float64
        assert singular_values.numpy() == pytest.approx(exact(model, parameter), abs=1e-10)


def test_audit_of_a_plain_model_has_no_estimates_and_includes_frozen_weights():
    rows = audit(build("with_frozen"))
    assert [row.name for row in rows] == ["body.0.weight", "body.2.weight"]
    assert all(row.estimate is None and row.error is None for row in rows)
    assert "8 x 6 matrix" in rows.rows[0].view


def test_audit_of_an_optimizer_compares_with_its_estimates():
    model = build("convolutions")
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    rows = audit(opt)
    assert len(rows) == len(opt.targets) == 4
    for row in rows:
        sigma = exact(model, row.name)[0]
        estimate = opt.spectral_norms()[row.name]
        assert row.sigma == pytest.approx(sigma, rel=1e-12)
        assert row.estimate == estimate < sigma
        assert row.error == pytest.approx(1 - estimate / sigma, rel=1e-6)
        assert row.shape == tuple(model.get_parameter(row.name).shape)


def test_the_error_is_one_where_the_estimate_is_blind():
    model = nn.Linear(3, 3)
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    opt.spectral_norms = lambda: {"weight": 0.0}
    assert audit(opt).rows[0].error == 1.0


def test_zero_and_broken_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight[0, 0] = torch.nan
    zero, broken = audit(opt)
    assert (zero.sigma, zero.estimate, zero.error) == (0, 0, 0)
    assert np.isnan(broken.sigma)
    assert np.isnan(broken.error)
    assert spectra(model)["1.weight"].isnan().all()


def test_the_table_names_the_norm_it_prints():
    model = build("mlp")
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    text = str(audit(opt))
    assert "seen as" in text.splitlines()[0]
    for name, estimate in opt.spectral_norms().items():
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert f"{estimate:.5g}" in line
        assert "matrix" in line


def test_diagnostics_change_nothing():
    model = build("convolutions")
    before = {name: p.clone() for name, p in model.state_dict().items()}
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    state = torch.get_rng_state()
    audit(opt), audit(model), spectra(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert opt.state_dict()["snr_hooks"]["vectors"] == {}
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("read", [audit, spectra])
def test_an_optimizer_says_itself_how_its_weights_are_seen(read):
    model = build("mlp")
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="expected choose with a model only, found 'matrix'"):
        read(opt, "matrix")
    with pytest.raises(ValueError, match="expected choose with a model only"):
        read(opt, {})
