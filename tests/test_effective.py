"""Weights of which forward uses a function, against the same penalty in the loss."""

import copy

import pytest
import torch
from _models import Net, build
from _oracles import as_matrix, penalty_of, products_of
from timm.layers import ScaledStdConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from snr_hooks import SNROptimizer, audit, discover


class Symmetric(nn.Module):
    def forward(self, weight):
        return weight + 0.5 * weight.tanh()


def standardized():
    return Net(
        nn.Sequential(StdConv2d(2, 4, 3, padding=0), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)),
        3,
        2,
        5,
        5,
    )


def scaled():
    body = nn.Sequential(
        ScaledStdConv2d(2, 4, 3, groups=2, padding=0), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2)
    )
    return Net(body, 3, 2, 5, 5)


def weight_norm():
    body = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 2))
    return Net(body, 4, 6)


def own():
    layer = nn.Conv2d(2, 3, 2)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return Net(nn.Sequential(layer, nn.Flatten(), nn.Linear(48, 2)), 3, 2, 5, 5)


def normed():
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6),
        nn.Flatten(),
        nn.Linear(96, 2),
    )
    return Net(body, 3, 2, 5, 5)


def standard(layer):
    rows = layer.weight.flatten(1)
    variance = rows.var(1, correction=0, keepdim=True)
    normal = (rows - rows.mean(1, keepdim=True)) / (variance + layer.eps).sqrt()
    if hasattr(layer, "gain"):
        normal = normal * layer.gain.flatten(1) * layer.scale
    return normal


def first(model):
    return model.body[0]


def folded(layer, norm):
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    if not layer.transposed:
        return [as_matrix(layer.weight * scale.view(-1, 1, 1, 1))]
    chunks = zip(layer.weight.chunk(2), scale.chunk(2), strict=True)
    return [as_matrix(w * s.view(1, -1, 1, 1), transposed=True) for w, s in chunks]


# The model, its choice, and the matrices of its first layers as forward uses them.
CASES = {
    "standardized": (standardized, "effective", lambda m: [[standard(first(m))]]),
    "scaled, in groups": (scaled, "effective", lambda m: [standard(first(m)).chunk(2)]),
    "weight norm": (weight_norm, "effective", lambda m: [[first(m).weight]]),
    "of one's own": (own, "effective", lambda m: [[as_matrix(first(m).weight)]]),
    "batch norm": (
        normed,
        "folded",
        lambda m: [folded(m.body[0], m.body[1]), folded(m.body[2], m.body[3])],
    ),
}


def made(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CASES[name][0]().double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(torch.rand(len(module.weight), generator=generator) + 0.5)
                module.running_var.copy_(torch.rand(len(module.weight), generator=generator) + 0.5)
    return model


def train(model, optimizer, n, penalty=None):
    for step in range(n):
        optimizer.zero_grad()
        loss = (model(model.example) - 0.1 * step).square().mean()
        if penalty is not None:
            loss = loss + penalty(model)
        loss.backward()
        optimizer.step()


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_steps_equal_the_penalty_of_the_effective_weight_in_the_loss(name, decoupled):
    _, weight, matrices = CASES[name]
    wrapped = made(name)
    if isinstance(wrapped.body[1], nn.BatchNorm2d):
        wrapped.eval()  # so that the running variances are the same in both penalties
    reference, plain = copy.deepcopy(wrapped), copy.deepcopy(wrapped)
    choose = {"*": {"view": "blocks", "weight": weight}}
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.03)  # noqa: E731
    opt = SNROptimizer(sgd(wrapped), wrapped, 0.05, choose=choose, exact=True, decoupled=decoupled)
    last = [module for module in reference.modules() if isinstance(module, nn.Linear)][-1]

    def penalty(model):
        pooled = [penalty_of(blocks, pooled=True) for blocks in matrices(model)]
        return 0.05 * (sum(pooled) + penalty_of([last.weight]))

    train(wrapped, opt, 10)
    train(reference, sgd(reference), 10, penalty)
    train(plain, sgd(plain), 10)
    assert distance(wrapped, reference) <= 1e-12  # for SGD without momentum decoupled is the same
    assert distance(wrapped, plain) > 1e-4


@pytest.mark.parametrize("name", CASES)
def test_products_equal_those_of_the_effective_matrices(name):
    _, weight, matrices = CASES[name]
    model = made(name)
    found = discover(model, choose={"*": {"view": "blocks", "weight": weight}}).targets
    expected = [[block.detach() for block in blocks] for blocks in matrices(model)]
    views = {id(t.view.view): t for t in found if not t.view.is_linear}  # one of each weight
    assert len(views) == len(expected)
    for target, blocks in zip(views.values(), expected, strict=True):
        for product, exact in zip(*products_of(target, blocks, 0), strict=True):
            torch.testing.assert_close(product, exact, rtol=1e-10, atol=1e-12)


def test_every_stored_parameter_is_a_target_and_none_is_also_skipped():
    found = discover(
        made("scaled, in groups"), choose={"*": {"view": "blocks", "weight": "effective"}}
    )
    assert [t.name for t in found.targets] == ["body.0.weight", "body.0.gain", "body.3.weight"]
    assert not found.skipped
    text = " ".join(str(found).split())
    assert "2 groups of 2 x 9, the largest norm, standardized" in text
    found = discover(made("batch norm"), choose={"*": {"weight": "folded"}})
    names = ["body.0.weight", "body.1.weight", "body.2.weight", "body.3.weight", "body.5.weight"]
    assert [t.name for t in found.targets] == names
    assert "folded with body.1" in str(found)
    found = discover(made("weight norm"), choose={"body.0.weight": {"weight": "effective"}})
    path = "body.0.parametrizations.weight"
    assert [t.name for t in found.targets] == [
        f"{path}.original0",
        f"{path}.original1",
        "body.2.weight",
    ]


def test_stored_weights_stay_skipped_by_default_and_fixed_ones_always():
    assert "standardizes" in discover(made("standardized")).skipped[0].reason
    model = build("with_parametrizations")
    reasons = dict(discover(model, choose={"*": {"weight": "effective"}}).skipped)
    assert reasons == {
        "body.2.parametrizations.weight.original": (
            "parametrized so that its singular values are fixed"
        )
    }


def test_iteration_audit_and_copies_of_an_effective_weight():
    model = made("standardized")
    choose = {"*": {"weight": "effective"}}
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = SNROptimizer(base, model, 0.1, choose=choose, n_power_iterations=40)
    train(model, opt, 3)
    exact = torch.linalg.matrix_norm(standard(first(model)).detach(), 2).item()
    assert audit(opt).rows[0].sigma == pytest.approx(exact, rel=1e-12)
    assert audit(opt).rows[0].estimate == pytest.approx(exact, rel=1e-6)
    copied, copied_opt = copy.deepcopy((model, opt))
    for m, o in ((model, opt), (copied, copied_opt)):
        train(m, o, 3)
    assert distance(model, copied) == 0
    assert distance(model, made("standardized")) > 0


def test_a_parametrization_is_left_in_the_state_it_was_in():
    model = made("of one's own")
    model.train()
    discover(model, choose={"*": {"weight": "effective"}})
    assert all(module.training for module in model.modules())


def test_other_parameters_can_be_excluded_skipped_and_given_a_lambda():
    model = made("batch norm")
    folded = {"*": {"weight": "folded"}}

    def names(**options):
        return [t.name for t in discover(model, **options).targets]

    kept = ["body.0.weight", "body.2.weight", "body.3.weight", "body.5.weight"]
    assert names(choose=folded, exclude="body.1.weight") == kept
    assert names(choose=[folded, {"body.1.weight": "skip"}]) == kept
    found = discover(model, choose=[folded, {"body.1.weight": {"lambda": 0.5}}])
    assert [t.strength for t in found.targets] == [None, 0.5, None, None, None]


def test_a_gamma_that_is_unfrozen_later_joins():
    model = made("batch norm")
    gamma = model.body[1].weight.requires_grad_(False)
    opt = SNROptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, choose={"*": {"weight": "folded"}}
    )
    assert "body.1.weight" not in [t.name for t in opt.targets]
    gamma.requires_grad_(True)
    opt.zero_grad()
    assert "body.1.weight" in [t.name for t in opt.targets]


def test_the_cache_of_parametrizations_is_left_alone():
    model = made("weight norm")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SNROptimizer(base, model, choose={"*": {"weight": "effective"}})
    with parametrize.cached():
        opt.spectral_norms()
        model(model.example).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(5, 1)), nn.Parameter(torch.ones(1, 6))

    def forward(self, weight):
        return weight + self.a @ self.b


def test_parameters_of_a_parametrization_get_the_term_also_if_the_weight_is_frozen():
    layer = nn.Linear(6, 5).double()
    parametrize.register_parametrization(layer, "weight", LowRank().double())
    layer.parametrizations.weight.original.requires_grad_(False)
    base = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    opt = SNROptimizer(base, layer, 0.3, choose={"*": {"weight": "effective"}}, exact=True)
    low = layer.parametrizations.weight[0]
    assert [t.parameter for t in opt.targets] == [low.a, low.b]
    expected = torch.autograd.grad(0.3 * penalty_of([layer.weight]), [low.a, low.b])
    (0 * layer(torch.ones(1, 6).double()).sum()).backward()
    torch.testing.assert_close(low.a.grad, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(low.b.grad, expected[1], rtol=1e-10, atol=1e-12)


def test_include_knows_the_name_of_what_forward_uses():
    model = made("weight norm")
    choose = {"*": {"weight": "effective"}}
    assert len(discover(model, include="body.0.weight", choose=choose).targets) == 2


def trajectory(model, choose, penalty, n=5):
    """How far five wrapped steps are from five with a penalty in the loss."""
    reference = copy.deepcopy(model)
    sgd = lambda m: torch.optim.SGD(m.parameters(), lr=0.03)  # noqa: E731
    train(model, SNROptimizer(sgd(model), model, 0.05, choose=choose, exact=True), n)
    train(reference, sgd(reference), n, lambda m: 0.05 * penalty(m))
    return distance(model, reference)


@pytest.mark.parametrize("kind", ["standardized", "parametrized"])
def test_folding_what_is_standardized_or_parametrized(kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = StdConv2d(2, 4, 3, padding=0)
        if kind == "parametrized":
            layer = parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
        model = Net(nn.Sequential(layer, nn.BatchNorm2d(4), nn.Flatten()), 3, 2, 5, 5).double()
    model.eval()

    def penalty(m):
        conv, norm = m.body[0], m.body[1]
        rows = standard(conv) if kind == "standardized" else conv.weight.flatten(1)
        return penalty_of([rows * (norm.weight / (norm.running_var + norm.eps).sqrt())[:, None]])

    assert trajectory(model, {"*": {"weight": "folded"}}, penalty) <= 1e-12


def test_folding_into_an_operator_observes_its_input():
    model = made("batch norm").eval()
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = SNROptimizer(base, model, choose={"*": {"view": "operator", "weight": "folded"}})
    for size in ((5, 5), (5, 5)):
        model(torch.randn(1, 2, *size, dtype=torch.float64))
    [conv, *_] = opt.targets
    assert conv.view.shape(conv.parameter) == (4 * 9, 2 * 25)
    model.body[0](torch.randn(1, 2, 7, 6, dtype=torch.float64))
    assert conv.view.version == (7, 6)


@pytest.mark.parametrize(
    ("norm", "n_targets", "is_folded"),
    [
        (nn.BatchNorm2d(4), 2, True),
        (nn.BatchNorm2d(4, affine=False), 1, True),
        (nn.BatchNorm2d(4, track_running_stats=False), 1, False),
        (nn.BatchNorm2d(8), 1, False),
        (nn.ReLU(), 1, False),
    ],
)
def test_which_norms_are_folded(norm, n_targets, is_folded):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm)
    found = discover(model, choose={"*": {"weight": "folded"}})
    assert len(found.targets) == n_targets
    assert ("folded with 1" in str(found)) == is_folded
    view = found.targets[0].view
    expected = model[0].weight.detach().flatten(1) / (1 + 1e-5) ** (0.5 if is_folded else 0)
    torch.testing.assert_close(view.matrix(model[0].weight.detach()), expected)


class Counting(nn.Module):
    """A parametrization with a state that moves in training, as batch norms have."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.frozen_part = nn.Identity()

    def forward(self, weight):
        if self.training:
            self.calls += 1
        return self.frozen_part(2 * weight)


def test_the_state_of_a_parametrization_does_not_move():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Counting())
    counting = layer.parametrizations.weight[0]
    counting.frozen_part.eval()
    before = counting.calls.item()
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    opt = SNROptimizer(base, layer, choose={"*": {"weight": "effective"}})
    opt.spectral_norms()
    assert counting.calls.item() == before
    assert counting.training
    assert not counting.frozen_part.training


class Keeping(nn.Module):
    """A parametrization that keeps what it computed."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def forward(self, weight):
        self.kept.append(2 * weight)
        return self.kept[-1]


def test_what_a_parametrization_keeps_can_be_trained_with():
    layer = nn.Linear(3, 2)
    parametrize.register_parametrization(layer, "weight", Keeping())
    base = torch.optim.SGD(layer.parameters(), lr=0.1)
    opt = SNROptimizer(base, layer, choose={"*": {"weight": "effective"}})
    layer(torch.ones(1, 3)).square().sum().backward()
    opt.spectral_norms()
    kept = layer.parametrizations.weight[0].kept
    assert len(kept) > 3
    assert not any(tensor.is_inference() for tensor in kept)


def test_an_effective_weight_in_half_precision():
    model = parametrizations.weight_norm(nn.Linear(8, 6)).bfloat16()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SNROptimizer(base, model, 1.0, choose={"*": {"weight": "effective"}})
    (0 * model(torch.ones(1, 8).bfloat16()).sum()).backward()
    assert all(t.parameter.grad.abs().sum() > 0 for t in opt.targets)


def test_frozen_sources_are_no_targets():
    model = made("weight norm")
    path = "body.0.parametrizations.weight"
    model.get_parameter(f"{path}.original0").requires_grad_(False)
    found = discover(model, choose={"*": {"weight": "effective"}})
    assert [t.name for t in found.targets] == [f"{path}.original1", "body.2.weight"]


def test_parametrized_tensors_of_other_names():
    module = nn.MultiheadAttention(4, 2).double()
    parametrize.register_parametrization(module, "in_proj_weight", Symmetric())
    found = discover(module, choose={"*": {"view": "heads", "weight": "effective"}}).targets
    names = {t.name: t.view.describe(t.parameter) for t in found}
    assert names["parametrizations.in_proj_weight.original"] == (
        "6 heads of 2 x 4, each, parametrized"
    )
    for target in found:
        assert module.get_parameter(target.parameter_name) is target.parameter
