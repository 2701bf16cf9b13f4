"""A scaled loss leaves lambda as it is, and low precision drops no term in silence."""

import copy
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from _models import build
from _oracles import exact_terms

from snr_hooks import SNROptimizer
from snr_hooks.term import _add_or_warn
from snr_hooks.views import MatrixView

LAMBDA = 0.05
INFINITE = {3, 4, 17, 30, 31, 32}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9),
    "sgd_foreach": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.005),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.005, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.005, fused=True),
}


def loss_of(model, step):
    scale = torch.inf if step in INFINITE else 1.0
    return (model(model.example) - 0.01 * step).square().mean() * scale


def clip(model, max_norm):
    if max_norm is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def train_scaled(model, opt, scaler, max_norm, n_micro_batches):
    """50 steps; return the scale after each."""
    scales = []
    for step in range(50):
        opt.zero_grad()
        for _ in range(n_micro_batches):
            scaler.scale(loss_of(model, step) / n_micro_batches).backward()
        scaler.unscale_(opt)
        clip(model, max_norm)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def train_unscaled(model, opt, max_norm, n_micro_batches):
    for step in range(50):
        opt.zero_grad()
        for _ in range(n_micro_batches):
            (loss_of(model, step) / n_micro_batches).backward()
        clip(model, max_norm)
        if step not in INFINITE:
            opt.step()


@pytest.mark.parametrize("max_norm", [None, 0.3])
@pytest.mark.parametrize("n_micro_batches", [1, 2])
@pytest.mark.parametrize("base", BASES)
def test_fifty_scaled_steps_equal_unscaled_ones(base, n_micro_batches, max_norm):
    reference = build("convolutions", torch.float32)
    scaled, plain = copy.deepcopy(reference), copy.deepcopy(reference)
    loop = max_norm, n_micro_batches
    opt = SNROptimizer(BASES[base](reference.parameters()), reference, LAMBDA)
    train_unscaled(reference, opt, *loop)
    train_unscaled(plain, BASES[base](plain.parameters()), *loop)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    opt = SNROptimizer(BASES[base](scaled.parameters()), scaled, LAMBDA, scaler=scaler)
    scales = train_scaled(scaled, opt, scaler, *loop)
    changes = {b / a for a, b in itertools.pairwise(scales)}
    assert changes == {0.5, 1.0, 2.0}  # it backed off, stayed, and grew

    for p, q, r in zip(
        scaled.parameters(), reference.parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)
        assert not torch.allclose(q, r, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_term_of_a_low_precision_weight_is_rounded_once(dtype):
    model = build("mlp", dtype)
    bare = copy.deepcopy(model)
    opt = SNROptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, n_power_iterations=300
    )
    model(model.example).sum().backward()
    bare(bare.example).sum().backward()
    gradients = dict(bare.named_parameters())
    exact = exact_terms(bare, [target.name for target in opt.targets])
    for target in opt.targets:
        expected = gradients[target.name].grad.double() + 0.3 * exact[target.name][1]
        unit = torch.finfo(dtype).eps * expected.abs() + torch.finfo(dtype).smallest_normal * 2
        assert ((target.parameter.grad.double() - expected).abs() <= 0.51 * unit + 1e-6).all()
    vectors = opt.state_dict()["snr_hooks"]["vectors"]
    assert {part.dtype for pair in vectors.values() for part in pair.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_exact_term_of_a_low_precision_weight_is_rounded_once(dtype):
    model = build("mlp", dtype)
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, exact=True)
    (sum(p.sum() for p in model.parameters()) * 0).backward()
    terms = exact_terms(model, [target.name for target in opt.targets])
    for name, (_, term) in terms.items():
        assert torch.equal(model.get_parameter(name).grad, (0.3 * term).to(dtype))


def test_a_term_that_underflows_in_float16_is_reported_and_a_scaled_one_is_not():
    def backward(strength, dtype=torch.float16, **options):
        model = build("mlp", dtype)
        opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, strength, **options)
        loss = model(model.example).sum() * 0
        scaler = options.get("scaler")
        (scaler.scale(loss) if scaler else loss).backward()
        return [bool(target.parameter.grad.any()) for target in opt.targets]

    message = r"term of 'body\..*underflows: its largest entry is .*not regularized: scale the loss"
    with pytest.warns(UserWarning, match=message) as caught:
        assert backward(1e-8) == [False, False]
    assert len(caught) == 2
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    assert backward(1e-8, scaler=scaler) == [True, True]
    assert backward(1e-6) == [True, True]
    assert backward(1e-8, torch.bfloat16) == [True, True]
    assert backward(0.0) == [False, False]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize(("share", "lost"), [(0.9, True), (1.1, False)])
def test_underflow_begins_at_half_the_smallest_float16(sign, side, share, lost):
    grad, u, v = torch.zeros(2, 2).half(), side * torch.ones(2), torch.ones(2)
    add = MatrixView().adder(grad, u, v)
    with pytest.warns(UserWarning, match="underflows") if lost else nullcontext():
        _add_or_warn(SimpleNamespace(name="w"), add, grad, sign * share * 2**-25)
