"""Bounds of Lipschitz constants, and comparisons of checkpoints."""

import copy
import math

import pytest
import torch
from _models import build
from test_choices import many
from test_operators import operator
from timm.layers import BatchNormAct2d, Conv2dSame
from torch import nn

from snr_hooks import audit, compare, lipschitz, spectra, stable_rank
from snr_hooks.lipschitz import _SLOPES


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.MaxPool2d(2)),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(36, 5),
        ).double()
        model(torch.randn(8, 2, 6, 6).double())  # running statistics
    return model


def inputs(n=6):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_the_bounds_hold_and_the_lower_one_is_the_largest_jacobian():
    model = network()
    found = lipschitz(model, inputs())
    assert model.training
    model.eval()
    jacobians = [
        torch.autograd.functional.jacobian(lambda x: model(x[None])[0], x).flatten(1)
        for x in inputs()
    ]
    expected = max(torch.linalg.matrix_norm(jacobian, 2).item() for jacobian in jacobians)
    assert found.lower == pytest.approx(expected, rel=1e-3)
    assert found.lower <= expected * (1 + 1e-9)
    assert found.lower < found.upper
    assert found.upper == pytest.approx(math.prod(found.layers.values()))
    assert list(found.layers) == ["0", "1.0", "1.1", "1.2", "2", "3", "4"]
    x, y = inputs(64).chunk(2)
    ratios = (model(x) - model(y)).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratios.max() <= found.upper
    norm = torch.linalg.svdvals(
        torch.stack(
            [model[0](image).flatten() for image in torch.eye(72).double().view(72, 2, 6, 6)]
        )
    )[0]
    assert found.layers["0"] == pytest.approx(norm.item(), rel=1e-9)


def test_a_linear_network_has_one_constant():
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity()).double()
    found = lipschitz(model, torch.randn(1, 4).double(), n_iterations=500)
    assert found.lower == pytest.approx(found.upper, rel=1e-6)


@pytest.mark.parametrize("kind", _SLOPES)
def test_slopes_of_activations(kind):
    x = torch.linspace(-12, 12, 200_001, dtype=torch.float64, requires_grad=True)
    x = x[:, None] if kind is nn.Flatten else x
    [slopes] = torch.autograd.grad(kind()(x).sum(), x)
    assert slopes.abs().max() <= _SLOPES[kind] <= slopes.abs().max() * 1.01 + 1e-12


def test_a_layer_counts_as_often_as_it_is_applied():
    layer = nn.Linear(4, 4, bias=False)
    with torch.no_grad():
        layer.weight.copy_(2 * torch.eye(4))
    found = lipschitz(nn.Sequential(layer, nn.Identity(), layer), torch.ones(1, 4))
    assert found.lower == pytest.approx(4)
    assert found.upper == pytest.approx(4)


def test_a_steep_elu_and_a_layer_that_works_in_place():
    x = torch.full((1, 3), -1e-3)
    found = lipschitz(nn.Sequential(nn.ELU(3.0, inplace=True)), x)
    assert 2.9 < found.lower <= found.upper == 3
    assert (x == -1e-3).all()


def test_parametrized_layers_are_refused():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="found '0' of type ParametrizedLinear"):
        lipschitz(nn.Sequential(layer), torch.ones(1, 2))


def test_unknown_layers_and_models_that_are_no_sequences_are_refused():
    with pytest.raises(TypeError, match=r"found '1' of type AvgPool2d: pass a part"):
        lipschitz(nn.Sequential(nn.Identity(), nn.AvgPool2d(2)), torch.randn(1, 2, 4, 4))
    with pytest.raises(TypeError, match="found '0' of type MaxPool2d"):
        lipschitz(nn.Sequential(nn.MaxPool2d(3, 2)), torch.randn(1, 2, 5, 5))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Sequential, found Linear"):
        lipschitz(nn.Linear(2, 2), torch.randn(1, 2))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Loud(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return 5 * super()._conv_forward(x, weight, bias)


class Called(nn.Linear):
    def __call__(self, x):
        return 5 * super().__call__(x)


def louder(kind):
    """A subclass that multiplies by 5."""
    name = f"Louder{kind.__name__}"
    return type(name, (kind,), {"forward": lambda layer, x: 5 * kind.forward(layer, x)})


@pytest.mark.parametrize(
    "layer",
    [
        Residual(nn.Linear(2, 2)),
        louder(nn.Linear)(2, 2),
        louder(nn.ELU)(),
        louder(nn.LeakyReLU)(),
        louder(nn.ReLU)(),
        louder(nn.MaxPool2d)(2),
        louder(nn.Dropout)(),
        louder(nn.BatchNorm2d)(3),
        BatchNormAct2d(3, act_layer=nn.Hardswish),  # a batch norm, and the activation after it
        Loud(3, 2, 3),
        Called(2, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_do_more_than_what_they_inherit_are_refused(layer):
    with pytest.raises(TypeError, match=f"found '1' of type {type(layer).__name__}: pass a part"):
        lipschitz(nn.Sequential(nn.Identity(), layer), torch.randn(1, 3, 4, 4))


def test_a_sequence_that_does_more_and_a_patched_layer_are_refused():
    with pytest.raises(TypeError, match=r"expected a torch.nn.Sequential, found Residual"):
        lipschitz(Residual(nn.Linear(2, 2)), torch.ones(1, 2))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Sequential, found list"):
        lipschitz([nn.Linear(2, 2)], torch.ones(1, 2))
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: 5 * x
    with pytest.raises(TypeError, match="found '0' of type Linear"):
        lipschitz(nn.Sequential(layer), torch.ones(1, 2))


def test_layers_that_inherit_all_they_do_are_known():
    class Named(nn.Linear):
        pass

    class NamedToo(nn.ReLU):
        pass

    x = torch.randn(3, 2, 5, 5)
    flat = [Named(2, 2), NamedToo(), nn.SyncBatchNorm(2), nn.AlphaDropout()]
    found = lipschitz(nn.Sequential(*flat), torch.randn(3, 2))
    assert 0 < found.lower <= found.upper * (1 + 1e-5)
    for kind, shape in {
        nn.Dropout: (3, 2),
        nn.Dropout1d: (3, 2, 5),
        nn.Dropout2d: (3, 2, 5, 5),
        nn.Dropout3d: (3, 2, 5, 5, 1),
        nn.FeatureAlphaDropout: (3, 2, 5),
    }.items():
        assert lipschitz(nn.Sequential(kind()), torch.randn(shape)).upper == 1
    with pytest.raises(TypeError, match="found '0' of type CELU"):
        lipschitz(nn.Sequential(nn.CELU()), x)


def test_a_convolution_that_pads_as_tensorflow_does_has_its_norm():
    found = lipschitz(nn.Sequential(Conv2dSame(3, 2, 3, stride=2)), torch.randn(2, 3, 7, 7), 500)
    assert found.lower == pytest.approx(found.upper, rel=1e-3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_bounds_are_found_where_gradients_are_off(mode):
    model, x = network(), inputs()
    expected = lipschitz(model, x)
    with mode():
        assert lipschitz(model, x.clone()) == expected


def test_nothing_to_look_at_is_refused():
    with pytest.raises(ValueError, match="expected n_iterations to be at least 1, found 0"):
        lipschitz(network(), inputs(), n_iterations=0)
    with pytest.raises(ValueError, match="expected a batch of at least one input, found shape"):
        lipschitz(network(), inputs(0))


# --- reading checkpoints ---


def test_two_checkpoints_side_by_side():
    before, after = build("convolutions"), build("convolutions")
    with torch.no_grad():
        after.body[0].weight.mul_(3)
    rows = {row.name: row for row in compare(before, after)}
    assert rows["body.0.weight"].after == pytest.approx(3 * rows["body.0.weight"].before)
    assert rows["body.2.weight"].after == rows["body.2.weight"].before
    values = spectra(before)["body.0.weight"]
    expected = (values.square().sum() / values[0].square()).item()
    assert rows["body.0.weight"].rank_before == pytest.approx(expected)
    text = str(compare(before, after, "blocks"))
    assert "3.000" in text
    assert "2 groups of 3 x 27, the largest norm" in text
    with pytest.raises(ValueError, match="expected two models with the same weights"):
        compare(before, build("mlp"))
    with pytest.raises(
        ValueError, match=r"found weight \(4 x 3\), weight \(5 x 3\) in one of them"
    ):
        compare(nn.Linear(3, 4), nn.Linear(3, 5))


def test_stable_rank():
    assert stable_rank(torch.tensor([2.0, 2.0, 0.0])) == 2
    assert stable_rank(torch.zeros(3)) == 0
    assert math.isnan(stable_rank(torch.tensor([math.nan, 1.0])))


def test_audit_and_spectra_cover_every_view():
    model = many()
    choose = ["heads", {"body.0.weight": {"view": "operator", "input_size": (6, 6)}}]
    values = spectra(model, choose)
    for row in audit(model, choose):
        assert row.sigma == pytest.approx(values[row.name][0].item(), rel=1e-12)
        assert row.stable_rank == pytest.approx(stable_rank(values[row.name]))
    assert len(values["attn.qkv.weight"]) == 6 * 3


def test_an_operator_too_large_for_an_svd_is_iterated_until_it_converges(monkeypatch):
    layer = nn.Conv2d(2, 3, 3, padding=1, bias=False).double()
    choose = {"weight": {"view": "operator", "input_size": (9, 8)}}
    [exact] = audit(layer, choose)
    monkeypatch.setattr("snr_hooks.diagnostics._LARGEST_MATRIX", 0)
    [iterated] = audit(layer, choose)
    assert iterated.sigma == pytest.approx(exact.sigma, rel=1e-4)
    assert iterated.sigma <= exact.sigma
    assert iterated.stable_rank is None
    four = spectra(layer, choose)["weight"]
    whole = torch.linalg.svdvals(operator(layer, layer.weight.detach(), (9, 8)))
    torch.testing.assert_close(four, whole[:4], rtol=1e-3, atol=0)
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        broken.weight[0, 0, 0, 0] = torch.nan
    assert math.isnan(audit(broken, choose).rows[0].sigma)


def test_batch_norms():
    norm = nn.BatchNorm1d(2).double()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-3.0, 1.0]))
        norm.running_var.copy_(torch.tensor([1.0, 1e-5]))
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = lipschitz(nn.Sequential(norm), x)
    assert found.upper == pytest.approx(1 / (2e-5) ** 0.5)
    assert found.lower == pytest.approx(found.upper)
    plain = nn.BatchNorm1d(2, affine=False).double()
    assert lipschitz(nn.Sequential(plain), x).upper == pytest.approx(1, rel=1e-4)
    with torch.no_grad():
        norm.running_var.fill_(1)
    assert lipschitz(nn.Sequential(norm), x).upper == pytest.approx(3, rel=1e-4)


class Steeper(nn.ReLU):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (Steeper(), (1, 2)),
        (nn.BatchNorm1d(2, track_running_stats=False), (2, 2)),
        (nn.MaxPool2d((3, 1), (2, 1)), (1, 1, 5, 4)),
        (nn.MaxPool1d(2, 2, dilation=2), (1, 1, 6)),
    ],
)
def test_other_layers_whose_constants_are_not_known(layer, shape):
    with pytest.raises(TypeError, match=f"found '0' of type {type(layer).__name__}"):
        lipschitz(nn.Sequential(layer), torch.randn(shape))


def test_the_largest_over_the_batch_and_over_both_slopes():
    model = nn.Sequential(nn.LeakyReLU(3.0))
    found = lipschitz(model, torch.tensor([[1.0], [-1.0]]))
    assert found.lower == pytest.approx(3)
    assert found.upper == 3


def test_modules_in_evaluation_stay_there():
    model = network()
    model[2].eval()
    lipschitz(model, inputs())
    assert model.training
    assert model[0].training
    assert not model[2].training


def test_comparisons_tell_before_from_after():
    before, after = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    with torch.no_grad():
        before.weight.copy_(torch.eye(3))
        after.weight.copy_(torch.diag(torch.tensor([2.0, 0.0, 0.0])))
    [row] = compare(before, after)
    assert (row.before, row.after) == (1, 2)
    assert (row.rank_before, row.rank_after) == (pytest.approx(3), pytest.approx(1))
    with torch.no_grad():
        before.weight.zero_()
    assert " -  " in str(compare(before, after))
    first = nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})
    second = nn.ModuleDict({"b": nn.Linear(1, 1), "a": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="found another order in one of them only"):
        compare(first, second)


def test_spectra_of_blocks_are_sorted_and_not_finite_ones_are_as_long():
    layer = nn.Conv2d(4, 4, 1, groups=2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 0, 0, 2, 3, 0, 0, 4]).view(4, 2, 1, 1))
    assert spectra(layer, "blocks")["weight"].tolist() == [4, 3, 2, 1]
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    assert spectra(layer, "blocks")["weight"].isnan().tolist() == [True] * 4


def test_stable_rank_of_large_half_precision_values():
    assert stable_rank(torch.tensor([300.0, 300.0]).half()) == 2


def test_the_bound_of_a_large_convolution_holds(monkeypatch):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=False)).double()
    exact = lipschitz(model, inputs())
    monkeypatch.setattr("snr_hooks.diagnostics._LARGEST_MATRIX", 0)
    bounded = lipschitz(model, inputs(), n_iterations=500)
    assert exact.upper < bounded.upper < 1.3 * exact.upper
    assert bounded.lower == pytest.approx(exact.upper, rel=1e-3)
