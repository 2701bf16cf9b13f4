"""What is chosen by pattern, in training, in checkpoints and in error messages."""

import copy
import gc
import pickle

import pytest
import torch
from _models import Net, build
from _oracles import as_matrix, matrix_with, penalty_of
from test_operators import operator
from torch import nn

from snr_hooks import (
    HALF_SQUARE,
    SIGMA,
    Penalty,
    SNROptimizer,
    around,
    audit,
    discover,
    hinge,
    squared_hinge,
)
from snr_hooks.choices import FAMILIES, Choice
from snr_hooks.views import MatrixView


class Attention(nn.Module):
    num_heads = 2

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(6, 18)
        self.proj = nn.Linear(6, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), -1, 3, 2, 3).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))


class Many(Net):
    """One weight of each kind."""

    def __init__(self):
        body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2),
            nn.Tanh(),
            nn.ConvTranspose2d(4, 6, 2, groups=2),
            nn.Flatten(2),
        )
        super().__init__(body, 3, 2, 6, 6)
        self.attn = Attention()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.attn(self.body(x).mT).mean(1))


def many():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Many().double()


CHOOSE = {
    "body.0.weight": {"view": "operator", "penalty": {"hinge": 0.2}},
    "body.2.weight": {"view": "blocks", "penalty": "sigma", "lambda": 0.02},
    "body.4.weight": {"view": "blocks", "norm": "each", "top": 2},
    "attn.*.weight": "heads",
    "head.weight": {"top": 2, "penalty": {"squared_hinge": 0.3}},
}


def chosen_penalty(model, strength):
    """The same in the loss, each weight cut up and penalized as CHOOSE says, by hand."""
    first, grouped, transposed = model.body[0], model.body[2], model.body[4]
    halves = [as_matrix(c, transposed=True) for c in transposed.weight.chunk(2)]
    heads = [model.attn.qkv.weight.chunk(6), model.attn.proj.weight.chunk(2, dim=1)]
    as_operator = operator(first, first.weight, (6, 6)) - operator(first, first.weight * 0, (6, 6))
    total = strength * penalty_of([as_operator], psi=lambda s: (s - 0.2).clamp(min=0))
    groups = [as_matrix(c) for c in grouped.weight.chunk(2)]
    total += 0.02 * penalty_of(groups, pooled=True, psi=lambda s: s)
    total += strength * penalty_of(halves, top=2)
    total += strength * sum(penalty_of(blocks) for blocks in heads)
    square = lambda s: (s - 0.3).clamp(min=0).square() / 2  # noqa: E731
    return total + strength * penalty_of([model.head.weight], top=2, psi=square)


def steps(model, optimizer, n, *, strength=None, before_step=lambda: None):
    for step in range(n):
        optimizer.zero_grad()
        loss = (model(model.example) - 0.1 * step).square().mean()
        if strength is not None:
            loss = loss + chosen_penalty(model, strength)
        loss.backward()
        before_step()
        optimizer.step()


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.002),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_twenty_steps_equal_the_chosen_penalties_in_the_loss(name):
    make = OPTIMIZERS[name]
    wrapped = many()
    reference, plain = copy.deepcopy(wrapped), copy.deepcopy(wrapped)
    opt = SNROptimizer(make(wrapped.parameters()), wrapped, 0.05, choose=CHOOSE, exact=True)
    steps(wrapped, opt, 20)
    steps(reference, make(reference.parameters()), 20, strength=0.05)
    steps(plain, make(plain.parameters()), 20)
    assert distance(wrapped, reference) <= 1e-12
    assert distance(wrapped, plain) > 1e-3


def test_iteration_finds_what_exact_svd_finds_for_every_view():
    exact, iterated = many(), many()
    # But for the operator, whose largest singular values nearly coincide: its vectors mix. And
    # for three steps, before those of other weights come close to each other.
    choose = {**CHOOSE, "body.0.weight": "matrix"}
    for model, options in ((exact, {"exact": True}), (iterated, {"n_power_iterations": 100})):
        base = OPTIMIZERS["sgd"](model.parameters())
        steps(model, SNROptimizer(base, model, 0.05, choose=choose, **options), 3)
    assert distance(exact, iterated) <= 1e-6


def written_out_decoupled(model, strength, lr):
    """The gradient of the penalty now; a function that subtracts lr times it."""
    grads = torch.autograd.grad(
        chosen_penalty(model, strength), list(model.parameters()), allow_unused=True
    )

    @torch.no_grad()
    def subtract():
        for parameter, grad in zip(model.parameters(), grads, strict=True):
            if grad is not None:
                parameter -= lr * grad

    return subtract


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decoupled_equals_its_written_out_reference(name):
    wrapped, reference, coupled = many(), many(), many()
    base = OPTIMIZERS[name](wrapped.parameters())
    opt = SNROptimizer(base, wrapped, 0.05, choose=CHOOSE, exact=True, decoupled=True)
    plain = OPTIMIZERS[name](reference.parameters())
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 3, 0.5) for o in (opt, plain)]
    for _ in range(10):
        steps(wrapped, opt, 1)
        subtracts = []

        def prepare(subtracts=subtracts):
            lr = plain.param_groups[0]["lr"]
            subtracts.append(written_out_decoupled(reference, 0.05, lr))

        steps(reference, plain, 1, before_step=prepare)
        subtracts[0]()
        for scheduler in schedulers:
            scheduler.step()
    assert distance(wrapped, reference) <= 1e-12
    base = OPTIMIZERS[name](coupled.parameters())
    steps(coupled, SNROptimizer(base, coupled, 0.05, choose=CHOOSE, exact=True), 10)
    assert distance(wrapped, coupled) > 1e-4


# --- decoupled ---


def test_decoupled_leaves_gradients_and_unused_weights_alone():
    model, bare = build("with_unused"), build("with_unused")
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SNROptimizer(opt, model, 0.5, decoupled=True, exact=True)
    for m in (model, bare):
        m(m.example).square().mean().backward()
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)
    unused, used = model.unused.weight.clone(), model.body[0].weight.clone()
    opt.step()
    assert torch.equal(model.unused.weight, unused)
    assert not torch.allclose(model.body[0].weight, used - 0.1 * model.body[0].weight.grad)
    assert "decoupled" in repr(opt)


@pytest.mark.parametrize("known", [True, False])  # to no avail, for nothing is to be scaled
def test_decoupled_is_not_scaled_with_the_loss_and_not_applied_in_skipped_steps(known):
    scaled, bare = build("mlp", torch.float32), build("mlp", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    make = OPTIMIZERS["sgd"]
    options = {"decoupled": True, "scaler": scaler if known else None}
    opt = SNROptimizer(make(scaled.parameters()), scaled, 0.5, **options)
    for step in range(6):
        opt.zero_grad()
        factor = torch.inf if step == 2 else 1.0
        scaler.scale(scaled(scaled.example).square().mean() * factor).backward()
        scaler.step(opt)
        scaler.update()
    opt = SNROptimizer(make(bare.parameters()), bare, 0.5, decoupled=True)
    for _ in range(5):
        steps_of(bare, opt)
    for p, q in zip(scaled.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def one_step_decoupled(groups, model, step=None):
    """What a decoupled step without a loss does to each weight, over sigma_1."""
    base = torch.optim.SGD(groups, lr=0.1)
    opt = SNROptimizer(base, model, 0.5, decoupled=True, exact=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (step or (lambda opt: (no_loss(model), opt.step())))(opt)
    opt.remove()
    return {
        name: (before[name] - p.detach()).norm().item()
        / torch.linalg.matrix_norm(before[name], 2).item()
        for name, p in model.named_parameters()
        if p.ndim == 2
    }


def no_loss(model):
    loss = (0 * model(model.example)).sum()
    loss.backward()
    return loss


def test_decoupled_uses_the_learning_rate_of_each_group_and_shrinks_when_maximizing():
    model = build("mlp")
    groups = [
        {"params": model.body[0].parameters(), "lr": 0.2},
        {"params": model.body[2].parameters(), "maximize": True},
    ]
    change = one_step_decoupled(groups, model)
    assert change == {"body.0.weight": pytest.approx(0.1), "body.2.weight": pytest.approx(0.05)}
    norms = [torch.linalg.matrix_norm(model.body[i].weight, 2).item() for i in (0, 2)]
    fresh = build("mlp")
    old = [torch.linalg.matrix_norm(fresh.body[i].weight, 2).item() for i in (0, 2)]
    assert norms[0] < old[0]
    assert norms[1] < old[1]


def test_decoupled_with_a_closure_and_with_gradients_of_others():
    model = build("mlp")

    def with_closure(opt):
        opt.step(lambda: no_loss(model).item())

    assert one_step_decoupled(model.parameters(), model, with_closure)["body.0.weight"] == (
        pytest.approx(0.05)
    )

    def by_hand(opt):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        opt.step()  # nothing came through a hook, and nothing is missing

    one_step_decoupled(model.parameters(), model, by_hand)


def test_after_remove_decoupled_steps_are_plain():
    model, plain = build("mlp"), build("mlp")
    opt = SNROptimizer(OPTIMIZERS["sgd"](model.parameters()), model, 0.5, decoupled=True)
    opt.remove()
    steps_of(model, opt)
    steps_of(plain, OPTIMIZERS["sgd"](plain.parameters()))
    assert distance(model, plain) == 0


def test_decoupled_needs_a_learning_rate():
    model = build("mlp")
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    del base.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="expected param groups with a learning rate"):
        SNROptimizer(base, model, decoupled=True)


def test_decoupled_needs_a_learning_rate_in_every_group():
    model = build("mlp")
    base = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    del base.param_groups[-1]["lr"]
    with pytest.raises(ValueError, match="expected param groups with a learning rate"):
        SNROptimizer(base, model, decoupled=True)


# --- lambda ---


def test_a_step_that_fails_does_not_count_for_the_schedule():
    model = build("mlp")
    opt = SNROptimizer(OPTIMIZERS["sgd"](model.parameters()), model, ramp)
    model(model.example).sum().backward()

    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        opt.step(fails)
    opt.step()
    assert opt.param_groups[0]["snr_lambda"] == pytest.approx(0.1)


def steps_of(model, opt):
    opt.zero_grad()
    model(model.example).square().mean().backward()
    opt.step()


def ramp(step):
    return 0.1 * step


def test_lambda_as_a_function_of_the_step_is_seen_in_the_groups_and_resumes():
    model = build("mlp")
    opt = SNROptimizer(OPTIMIZERS["adamw"](model.parameters()), model, ramp)
    seen = []
    for _ in range(3):
        seen.append(opt.param_groups[0]["snr_lambda"])
        steps_of(model, opt)
    assert seen == [0.0, 0.1, 0.2]
    other = build("mlp")
    resumed = SNROptimizer(OPTIMIZERS["adamw"](other.parameters()), other, ramp)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert resumed.param_groups[0]["snr_lambda"] == pytest.approx(0.3)
    for m, o in ((model, opt), (other, resumed)):
        steps_of(m, o)
    assert distance(model, other) == 0


def test_the_schedule_goes_on_where_the_state_says_and_leaves_other_groups_alone():
    model = build("mlp")
    first, second = list(model.body[0].parameters()), list(model.body[2].parameters())
    groups = [{"params": first, "snr_lambda": 0.5}, {"params": second}]
    opt = SNROptimizer(torch.optim.SGD(groups, lr=0.01), model, ramp)
    for _ in range(3):
        steps_of(model, opt)
    assert [group["snr_lambda"] for group in opt.param_groups] == [0.5, pytest.approx(0.3)]
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][1]["snr_lambda"] = 9.0  # as saved by a run without a schedule
    state["snr_hooks"]["steps"] = 5
    opt.load_state_dict(state)
    assert opt.param_groups[1]["snr_lambda"] == pytest.approx(0.5)
    plain = {key: value for key, value in state.items() if key != "snr_hooks"}
    opt.load_state_dict(plain)
    assert opt.param_groups[1]["snr_lambda"] == pytest.approx(0.5)  # it says nothing of steps
    model.extra = nn.Linear(2, 2).double()
    opt.add_param_group({"params": model.extra.parameters()})
    assert opt.param_groups[2]["snr_lambda"] == pytest.approx(0.5)
    state["snr_hooks"]["steps"] = -1
    with pytest.raises(ValueError, match="'steps' of 'snr_hooks' in the state dict"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("bad", [-0.1, float("nan")])
def test_a_schedule_that_goes_wrong_later_is_refused_then(bad):
    model = build("mlp")
    schedule = {"*.weight": {"lambda": lambda step: bad if step else 0.1}}
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, choose=schedule)
    steps_of(model, opt)
    with pytest.raises(ValueError, match=r"lambda of 'body.\d.weight' to be finite and >= 0"):
        steps_of(model, opt)


def test_a_chosen_lambda_stands_in_for_that_of_the_group():
    model = build("mlp")
    choose = {"body.0.*": {"lambda": 0.0}, "body.2.weight": {"lambda": lambda step: 0.5 * step}}
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    opt = SNROptimizer(base, model, 7.0, choose=choose, exact=True)
    norms = []
    for _ in range(2):
        opt.zero_grad()
        sum((p * 0).sum() for p in model.parameters()).backward()
        norms.append([model.body[i].weight.grad.norm().item() for i in (0, 2)])
        opt.step()
    sigma = torch.linalg.matrix_norm(model.body[2].weight.detach(), 2).item()
    assert norms == [[0.0, 0.0], [0.0, pytest.approx(0.5 * sigma, rel=1e-12)]]


def test_choices_are_those_of_the_time_of_wrapping():
    model = build("mlp")
    model.body[2].weight.requires_grad_(False)
    choose = {"body.2.weight": {"lambda": 0.5}}
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, choose=choose)
    choose["body.2.weight"]["lambda"] = 0.1
    model.body[2].weight.requires_grad_(True)
    opt.zero_grad()
    assert [target.strength for target in opt.targets] == [None, 0.5]


# --- sizes ---


def conv():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()), 2, 2, 5, 5).double()


def test_the_input_size_is_observed_and_a_new_one_starts_afresh():
    model = conv()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SNROptimizer(base, model, choose="operator", n_power_iterations=50)
    for ask in (opt.spectral_norms, lambda: audit(opt)):
        with pytest.raises(ValueError, match=r"input size of 'body.0.weight' to be known"):
            ask()
    generator = torch.Generator().manual_seed(0)
    for size in ((5, 5), (8, 6), (5, 5)):
        x = torch.randn(2, 2, *size, generator=generator, dtype=torch.float64)
        opt.zero_grad()
        model(x).square().mean().backward()
        with torch.no_grad():
            model(torch.randn(1, 2, 11, 11, dtype=torch.float64))  # an evaluation: no gradients
        layer = nn.Conv2d(2, 3, 3, bias=False)
        expected = torch.linalg.svdvals(operator(layer, model.body[0].weight.detach(), size))[0]
        assert opt.spectral_norms()["body.0.weight"] == pytest.approx(expected.item(), rel=1e-6)
        assert opt.targets[0].view.shape(model.body[0].weight)[1] == 2 * size[0] * size[1]
        opt.step()
    opt.remove()
    assert not model.body[0]._forward_pre_hooks


def test_a_run_with_operators_resumes_bitwise_and_copies_watch_for_themselves():
    model, other = conv(), conv()
    options = {"choose": "operator", "lambda_": 0.1}
    opt = SNROptimizer(OPTIMIZERS["adamw"](model.parameters()), model, **options)
    for _ in range(3):
        steps_of(model, opt)
    resumed = SNROptimizer(OPTIMIZERS["adamw"](other.parameters()), other, **options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    copies = [copy.deepcopy((model, opt)), pickle.loads(pickle.dumps((model, opt)))]
    for m, o in ((model, opt), (other, resumed), *copies):
        for _ in range(3):
            steps_of(m, o)
        assert distance(model, m) == 0
    for m, o in copies:
        m(torch.randn(1, 2, 8, 6, dtype=torch.float64))
        assert o.targets[0].view.size.value == (8, 6)
        assert opt.targets[0].view.size.value == (5, 5)
    ema = copy.deepcopy(model)
    ema(torch.randn(1, 2, 9, 9, dtype=torch.float64).requires_grad_())
    assert opt.targets[0].view.size.value == (5, 5)


@pytest.mark.parametrize("decoupled", [False, True])
def test_a_layer_that_is_not_used_is_not_asked_for_its_input_size(decoupled):
    model = conv()
    model.unused = nn.Conv2d(2, 2, 3).double()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SNROptimizer(base, model, 0.1, choose="operator", decoupled=decoupled)
    before = [p.clone() for p in model.parameters()]
    steps_of(model, opt)
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert changed == [True, True, False, False]
    with pytest.raises(ValueError, match=r"input size of 'unused.weight' to be known"):
        opt.spectral_norms()


@pytest.mark.parametrize("products", [0.5, 0.125])
def test_a_size_of_the_same_length_starts_afresh_too(products):
    """Portrait after landscape: vectors of one length that mean other pixels."""
    layer = nn.Conv2d(2, 3, (3, 1), padding=(1, 0)).double()
    model = nn.Sequential(layer)
    opt = SNROptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        1.0,
        choose="operator",
        n_power_iterations=products,
        n_vectors=8,
    )
    for size in ((4, 16), (16, 4), (5, 5)):
        for _ in range(3):
            opt.zero_grad()
            (0 * model(torch.randn(1, 2, *size, dtype=torch.float64)).sum()).backward()
            opt.step()
        bare = nn.Conv2d(2, 3, (3, 1), padding=(1, 0), bias=False)
        exact = torch.linalg.svdvals(operator(bare, layer.weight.detach(), size))[0]
        assert opt.spectral_norms()["0.weight"] == pytest.approx(exact.item(), rel=1e-3)


def test_held_terms_of_operators_resume_in_a_new_optimizer():
    model, other = conv(), conv()
    options = {"choose": "operator", "lambda_": 0.1, "n_power_iterations": 0.125}
    opt = SNROptimizer(OPTIMIZERS["adamw"](model.parameters()), model, **options)
    for _ in range(2):
        steps_of(model, opt)
    resumed = SNROptimizer(OPTIMIZERS["adamw"](other.parameters()), other, **options)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for m, o in ((model, opt), (other, resumed)):
        for _ in range(4):
            steps_of(m, o)
    assert distance(model, other) == 0


def test_held_terms_that_were_loaded_are_renewed_for_another_size():
    model, other = conv(), conv()
    options = {"choose": "operator", "lambda_": 0.1, "n_power_iterations": 0.125}
    opt = SNROptimizer(OPTIMIZERS["adamw"](model.parameters()), model, **options)
    steps_of(model, opt)
    resumed = SNROptimizer(OPTIMIZERS["adamw"](other.parameters()), other, **options)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    [target] = resumed.targets
    other.body[0](torch.randn(1, 2, 9, 11, dtype=torch.float64)).sum().backward()
    age = resumed.state_dict()["snr_hooks"]["vectors"][target.name]["age"]
    assert age == 1
    assert target.view.size.value == (9, 11)


def test_inputs_by_keyword_and_without_a_batch_are_observed():
    layer = nn.Conv2d(2, 3, 3)
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, choose="operator")
    layer(input=torch.randn(1, 2, 5, 6))
    assert opt.targets[0].view.size.value == (5, 6)
    layer(torch.randn(2, 7, 8))
    assert opt.targets[0].view.size.value == (7, 8)


def test_a_kernel_larger_than_the_input_is_refused():
    choose = {"weight": {"view": "operator", "input_size": 2}}
    with pytest.raises(
        ValueError, match=r"at least the size of the kernel \(3, 3\), found \(2, 2\)"
    ):
        str(discover(nn.Conv2d(2, 3, 3), choose=choose))


def test_exact_svd_of_an_operator_is_exact_under_autocast():
    grads = []
    for enabled in (False, True):
        model = conv().float()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = SNROptimizer(base, model, 1.0, choose="operator", exact=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            (0 * model(model.example).sum()).backward()
        grads.append(model.body[0].weight.grad)
        opt.remove()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


def test_a_dropped_wrapper_leaves_no_hook_that_watches():
    model = conv()
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, choose="operator")
    assert model.body[0]._forward_pre_hooks
    del opt
    gc.collect()
    assert not model.body[0]._forward_pre_hooks


def test_a_size_that_is_given_is_not_observed():
    layer = nn.Conv2d(2, 3, 3)
    choose = {"weight": {"view": "operator", "input_size": 6}}
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, choose=choose)
    layer(torch.randn(1, 2, 9, 9))
    assert opt.targets[0].view.shape(layer.weight) == (3 * 16, 2 * 36)
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, (7,)), (nn.Conv3d, (4, 5, 3))])
def test_sizes_of_other_dimensions_are_observed(kind, size):
    layer = kind(2, 3, 2)
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, choose="operator")
    layer(torch.randn(1, 2, *size))
    assert opt.targets[0].view.size.value == size


def test_a_state_of_another_size_or_view_starts_afresh():
    model, other = conv(), conv()
    opt = SNROptimizer(OPTIMIZERS["sgd"](model.parameters()), model, choose="operator")
    steps_of(model, opt)
    state = opt.state_dict()
    matrix = SNROptimizer(OPTIMIZERS["sgd"](other.parameters()), other)
    steps_of(other, matrix)
    matrix.remove()
    resumed = SNROptimizer(OPTIMIZERS["sgd"](other.parameters()), other, choose="operator")
    resumed.load_state_dict(matrix.state_dict())  # before any forward pass
    other(torch.randn(1, 2, 9, 9, dtype=torch.float64))
    resumed.load_state_dict(state)
    norms = resumed.spectral_norms()
    exact = audit(resumed).rows[0].sigma
    assert norms["body.0.weight"] == pytest.approx(exact, rel=1e-2)


# --- several singular values, iterated ---


@pytest.mark.parametrize("n_vectors", [2, 6])
def test_iterated_singular_values_are_those_of_the_svd(n_vectors):
    model = nn.ModuleDict({"lstm": nn.LSTM(6, 6), "fc": nn.Linear(8, 7)}).double()
    with torch.no_grad():
        model.fc.weight.copy_(matrix_with([5, 3, 2, 1, 0.5, 0.2, 0.1], 7, 8, 0))
        for name in ("weight_ih_l0", "weight_hh_l0"):
            blocks = [matrix_with([4 - i / 2, 2, 1, 0.5, 0.2, 0.1], 6, 6, i) for i in range(4)]
            model.lstm.get_parameter(name).copy_(torch.cat(blocks))
    choose = {"*": {"view": "blocks", "top": 2}}
    grads = []
    for options in ({"exact": True}, {"n_power_iterations": 40, "n_vectors": n_vectors}):
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        opt = SNROptimizer(base, model, 1.0, choose=choose, **options)
        opt.zero_grad()
        sum((0 * parameter).sum() for parameter in model.parameters()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        norms, state = opt.spectral_norms(), opt.state_dict()["snr_hooks"]["vectors"]
        opt.remove()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-7, atol=1e-8)
    assert norms == {
        "lstm.weight_ih_l0": pytest.approx(4),
        "lstm.weight_hh_l0": pytest.approx(4),
        "fc.weight": pytest.approx(5),
    }
    assert state.keys() == norms.keys()


@pytest.mark.parametrize("choose", ["blocks", "operator"])
def test_weights_in_half_precision(choose):
    model = nn.Conv2d(4, 6, 3, groups=2, padding=1).bfloat16()
    opt = SNROptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        1.0,
        choose=choose,
        n_power_iterations=20,
    )
    (0 * model(torch.ones(1, 4, 5, 5).bfloat16()).sum()).backward()
    sigma = audit(opt).rows[0].sigma
    assert opt.spectral_norms()["weight"] == pytest.approx(sigma, rel=1e-3)
    assert model.weight.grad.float().norm() > 0.1


# --- saying it ---


def test_what_was_chosen_is_printed():
    text = " ".join(str(discover(many(), choose=CHOOSE)).split())
    assert "convolution as operator, on the input of the first forward pass hinge at 0.2" in text
    assert "2 groups of 2 x 18, the largest norm sigma, lambda 0.02" in text
    assert "2 groups of 3 x 8, each sigma^2 / 2 of the 2 largest" in text
    assert "6 heads of 3 x 6, each" in text
    assert "squared hinge at 0.3 of the 2 largest" in text


def test_a_choice_is_the_same_in_every_form():
    by_name = {"*": "heads"}
    forms = ["heads", by_name, {"*": {"view": "heads"}}, {"*": Choice(view="heads")}, [by_name]]
    assert len({str(discover(many(), choose=form)) for form in forms}) == 1


def test_later_layers_win_and_patterns_complete_each_other():
    choose = ["vit", {"attn.*": {"lambda": 0.5}, "attn.qkv.*": "blocks"}, {"head.*": "skip"}]
    found = discover(many(), choose=choose)
    by_name = {target.name: target for target in found.targets}
    assert by_name["attn.qkv.weight"].strength == by_name["attn.proj.weight"].strength == 0.5
    assert by_name["attn.qkv.weight"].view.shape(by_name["attn.qkv.weight"].parameter) == (3, 6, 6)
    assert "head.weight" in {skip.name for skip in found.skipped if "chosen" in skip.reason}


@pytest.mark.parametrize(
    ("choose", "error", "message"),
    [
        ("head", ValueError, "expected view or family to be one of matrix, blocks, .*'heads'"),
        ({"*": "oprator"}, ValueError, "expected view of .* nearest: 'operator'"),
        ({"*": {"veiw": "heads"}}, ValueError, "expected key of .* nearest: 'view'"),
        ({"*": {"penalty": "hinge"}}, ValueError, "penalty 'hinge' with the target"),
        ({"*": {"penalty": "sigm"}}, ValueError, "nearest: 'sigma'"),
        ({"*": {"penalty": {"hinge": -1}}}, ValueError, "target of hinge to be finite and >= 0"),
        ({"*": {"penalty": {"hinge": "1"}}}, TypeError, "target of hinge to be a number"),
        ({"*": {"penalty": 3}}, TypeError, "expected penalty to be a Penalty"),
        ({"*": {"top": 0}}, ValueError, "top of .* to be at least 1, found 0"),
        ({"*": {"top": 1.5}}, TypeError, "top of .* to be an integer"),
        ({"*": {"norm": "biggest"}}, ValueError, "expected norm of"),
        ({"*": {"lambda": -1}}, ValueError, "lambda of .* to be finite and >= 0"),
        ({"*": {"lambda": lambda step: "x"}}, TypeError, "at step 0 to be a number"),
        ({"*": {"input_size": "big"}}, TypeError, "input_size of .* to be a sequence of sizes"),
        ({"*": 7}, TypeError, "expected view of .* or a View, found 7"),
        (7, TypeError, "expected choose to be a view or family"),
        ({"nope.*": "heads"}, ValueError, "pattern 'nope.\\*' in choose matches no parameter"),
        (
            {"attn.*": "heads", "*.qkv.weight": "blocks"},
            ValueError,
            "view of 'attn.qkv.weight' to be 'heads' by 'attn.\\*' and 'blocks' by",
        ),
        (
            {"body.0.weight": {"view": "operator", "input_size": [6, 6, 6]}},
            ValueError,
            "input_size of 'body.0.weight' to have 2 dimensions",
        ),
        ({"*": {"norm": "each"}}, ValueError, "norm of '\\*' together with view 'blocks' or 'hea"),
        ({"*": Choice(norm="each")}, ValueError, "norm of '\\*' together with view"),
        ({"*": {"heads": 3}}, ValueError, "heads of '\\*' together with view 'heads', found no"),
        (["blocks", {"*": {"kv_heads": 3}}], ValueError, "kv_heads of '\\*' together with view 'h"),
        (
            ["heads", {"*": {"input_size": 6}}],
            ValueError,
            "input_size of .* view 'operator', found",
        ),
        (
            {"*": {"view": MatrixView(), "norm": "each"}},
            ValueError,
            "norm of '\\*' together with view",
        ),
    ],
)
def test_bad_choices_are_refused(choose, error, message):
    with pytest.raises(error, match=message):
        discover(many(), choose=choose)


def test_a_choice_says_everything_so_that_a_later_one_takes_back():
    choose = ["blocks", {"*": Choice(view="matrix")}]
    assert str(discover(many(), choose=choose)) == str(discover(many()))


def test_equal_penalties_do_not_contradict_each_other():
    choose = {"head.*": {"penalty": {"hinge": 1}}, "*.weight": {"penalty": {"hinge": 1.0}}}
    assert "hinge at 1" in str(discover(many(), choose=choose))
    choose["*.weight"] = {"penalty": "sigma"}
    with pytest.raises(ValueError, match=r"to be hinge at 1 by 'head.\*' and sigma by"):
        discover(many(), choose=choose)


def cubic(sigma):
    return sigma**3 / 3


def test_own_penalties():
    model = build("mlp")
    choose = {"*.weight": {"penalty": Penalty(cubic, torch.square, "cubic")}}
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = model.body[0].weight
    opt = SNROptimizer(base, model, 0.3, choose=choose, exact=True)
    (weight * 0).sum().backward()
    [expected] = torch.autograd.grad(0.3 * penalty_of([weight], psi=cubic), weight)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-12)
    assert "cubic" in str(discover(model, choose=choose))
    opt.remove()


def slope_of_cubic(sigma):
    sigma = sigma.detach().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(cubic(sigma).sum(), sigma)[0]


@pytest.mark.parametrize("choice", [{"top": 2}, {"view": "blocks"}])
def test_the_derivative_of_a_penalty_may_come_from_autograd(choice):
    grads = []
    for derivative in (slope_of_cubic, torch.square):
        model = many()
        base = torch.optim.SGD(model.parameters(), lr=0.1)
        choose = {"*": {"penalty": Penalty(cubic, derivative, "cubic"), **choice}}
        opt = SNROptimizer(base, model, 0.3, choose=choose)
        for target in opt.targets:
            (target.parameter * 0).sum().backward()
        grads.append([target.parameter.grad for target in opt.targets])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("derivative", "error"),
    [(lambda s: 1.0, TypeError), (lambda s: s.sum(), ValueError), (lambda s: s / 0, ValueError)],
)
def test_own_penalties_are_tried_before_they_are_used(derivative, error):
    with pytest.raises(error, match="expected the derivative of penalty 'custom'"):
        discover(build("mlp"), choose={"*": {"penalty": Penalty(cubic, derivative)}})


@pytest.mark.parametrize(
    "penalty", [hinge(0.5), squared_hinge(0.5), around(0.5), around(2.0), SIGMA, HALF_SQUARE]
)
def test_a_penalty_and_its_derivative_agree(penalty):
    sigma = torch.tensor([0.1, 0.4, 0.6, 3.0], dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(penalty.value(sigma).sum(), sigma)
    torch.testing.assert_close(penalty.derivative(sigma.detach()), slope)


def test_at_the_target_and_at_zero_nothing_is_pulled():
    assert hinge(0.5).derivative(torch.tensor([0.5])) == 0
    assert SIGMA.derivative(torch.tensor([0.0])) == 0


@pytest.mark.parametrize(
    ("family", "qkv", "convolution"),
    [
        ("residual", "3 maps (q k v) of 6 x 6", "2 groups of 2 x 18"),
        ("mixer", "3 maps (q k v) of 6 x 6", "2 groups of 2 x 18"),
        ("vit", "6 heads of 3 x 6", "2 groups of 2 x 18"),
        ("mobile", "3 maps (q k v) of 6 x 6", "folded with body.3"),
    ],
)
def test_families_are_choices_by_name(family, qkv, convolution):
    model = many()
    model.body[3] = nn.BatchNorm2d(4)
    found = {t.name: t.view.describe(t.parameter) for t in discover(model, choose=family).targets}
    assert qkv in found["attn.qkv.weight"]
    assert convolution in found["body.2.weight"]
    assert set(FAMILIES) == {"residual", "mixer", "vit", "mobile"}


def test_two_names_of_one_weight_may_say_view_and_norm():
    model = many()
    model.again = nn.Conv2d(3, 6, 3, groups=3)
    model.more = nn.Conv2d(3, 6, 3, groups=3)
    model.more.weight = model.again.weight
    found = discover(model, choose={"again.weight": "blocks", "more.weight": {"norm": "each"}})
    [target] = [target for target in found.targets if target.parameter is model.again.weight]
    assert not target.view.pooled


@pytest.mark.parametrize(
    "choose",
    [
        [{"*": {"norm": "each", "input_size": 6}}, "heads", {"body.*": "operator"}],
        ["heads", {"*": {"norm": "largest"}}, {"body.*": "matrix"}],
        {"*": {"norm": "each"}, "attn.*": "blocks"},
        {"body.0.weight": {"norm": "each"}, "body.0.*": "operator"},
    ],
    ids=str,
)
def test_what_a_choice_says_may_be_of_use_to_some_of_the_weights_only(choose):
    assert discover(many(), choose=choose).targets
