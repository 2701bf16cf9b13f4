"""SNROptimizer as an optimizer: the wrapped one stays live, and copies and resumes are exact."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import timm.optim
import timm.scheduler
import timm.utils
import torch
from _models import build
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.optim.swa_utils import SWALR, AveragedModel

from snr_hooks import SNROptimizer

LAMBDA = 0.05


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, **options)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def wrap(model, make=sgd, **options):
    return SNROptimizer(make(model), model, LAMBDA, **options)


def train(model, opt, n_steps, scheduler=None):
    for _ in range(n_steps):
        opt.zero_grad()
        model(model.example).square().mean().backward()
        opt.step()
        if scheduler is not None:
            scheduler.step()


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def assert_differ(a, b):
    assert any(not torch.equal(p, weights(b)[name]) for name, p in weights(a).items())


def hooks_on(model):
    """Count the hooks that the parameters carry."""
    return sum(
        len(p._backward_hooks or ()) + len(getattr(p, "_post_accumulate_grad_hooks", None) or ())
        for p in model.parameters()
    )


# --- the wrapped optimizer stays live ---


def test_is_an_optimizer_with_live_views_of_the_wrapped_one():
    model = build("mlp")
    base = sgd(model)
    opt = SNROptimizer(base, model)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults is base.defaults
    opt.load_state_dict(opt.state_dict())  # torch replaces the groups here
    assert opt.param_groups is base.param_groups
    opt.param_groups[0]["lr"] = 7.0
    assert base.param_groups[0]["lr"] == 7.0


def test_assigning_param_groups_state_and_defaults_reaches_the_wrapped_one():
    model = build("mlp")
    opt = wrap(model)
    groups = [{**opt.param_groups[0], "snr_lambda": 0.0}]
    opt.param_groups, opt.state, opt.defaults = groups, {"a": 1}, {"lr": 3}
    assert opt.optimizer.param_groups is groups
    assert opt.optimizer.state == {"a": 1}
    assert opt.optimizer.defaults == {"lr": 3}


def test_other_public_attributes_are_forwarded_but_not_those_that_mislead_grad_scaler():
    model = build("mlp")
    base = torch.optim.AdamW(model.parameters(), fused=True)
    opt = SNROptimizer(base, model)
    base.set_mode, base.grad_scale, base.found_inf = "called", 1, 2
    assert opt.set_mode == "called"
    assert base._step_supports_amp_scaling
    for name in ("grad_scale", "found_inf", "no_such_thing", "_no_such_thing"):
        assert not hasattr(opt, name)


def test_fused_base_under_grad_scaler_steps_with_unscaled_gradients():
    scaled, plain = build("mlp", torch.float32), build("mlp", torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def fused(model):
        return torch.optim.SGD(model.parameters(), lr=0.1, fused=True)

    opt, reference = wrap(scaled, fused, scaler=scaler), wrap(plain, fused)
    for _ in range(5):
        opt.zero_grad()
        scaler.scale(scaled(scaled.example).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
    train(plain, reference, 5)
    for p, q in zip(scaled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_step_returns_the_loss_of_the_closure():
    model = build("mlp")
    opt = wrap(model)

    def closure():
        opt.zero_grad()
        loss = model(model.example).square().mean()
        loss.backward()
        return loss

    assert opt.step(closure) > 0
    assert opt.step() is None


def test_step_hooks_of_the_wrapper_run():
    model = build("mlp")
    opt = wrap(model)
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.register_state_dict_pre_hook(lambda _: calls.append("state"))
    opt.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state: calls.append("load"))
    opt.register_load_state_dict_post_hook(lambda _: calls.append("loaded"))
    opt.step()
    state = opt.state_dict()
    assert state["extra"] == 1
    opt.load_state_dict(state)
    assert calls == ["pre", "post", "state", "load", "loaded"]


def test_a_step_hook_may_give_the_step_another_closure():
    model = build("mlp")
    opt = wrap(model)
    seen = []
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {"closure": lambda: 7.0}))
    opt.register_step_post_hook(lambda opt, args, kwargs: seen.append((args, [*kwargs])))
    assert opt.step() == 7.0
    assert seen == [((opt,), ["closure"])]


def test_a_step_hook_that_returns_something_else_is_refused():
    model = build("mlp")
    opt = wrap(model)
    opt.register_step_pre_hook(lambda *_: False)
    with pytest.raises(TypeError):
        opt.step()


def test_hooks_for_all_optimizers_run_once_a_step():
    model = build("mlp")
    opt = wrap(model)
    stepped = []
    handles = [
        register_optimizer_step_pre_hook(lambda opt, *_: stepped.append(opt)),
        register_optimizer_step_post_hook(lambda opt, *_: stepped.append(opt)),
    ]
    try:
        opt.step()
        opt.step(lambda: 1.0)
    finally:
        for handle in handles:
            handle.remove()
    assert stepped == [opt.optimizer] * 4


def test_the_global_random_stream_is_not_touched():
    model = build("mlp")
    before = torch.get_rng_state()
    train(model, wrap(model), 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_seed_decides_the_starting_vectors():
    runs = []
    for seed in (0, 0, 1):
        model = build("convolutions")
        train(model, wrap(model, seed=seed), 2)
        runs.append(model)
    assert_same(runs[0], runs[1])
    assert_differ(runs[0], runs[2])


def test_repr_tells_what_is_regularized_and_how():
    model = build("with_frozen")
    text = repr(wrap(model, n_power_iterations=2, n_vectors=3))
    for part in (
        "1 weights regularized, 1 skipped",
        "snr_lambda: 0.05",
        "subspace iteration, 4 products with 3 vectors a step",
    ):
        assert part in text
    assert "momentum: 0.9" in text
    assert "on a CPU more while they raise sigma by over 0.0005" in text
    for options in ({"n_vectors": 1}, {"tolerance": math.inf}):
        assert "more" not in repr(wrap(build("mlp"), **options))
    assert "svd" in repr(wrap(build("mlp"), exact=True))


# --- lambda ---


def test_lambda_is_written_into_groups_and_can_be_scheduled():
    scheduled, constant = build("mlp"), build("mlp")
    opt = wrap(scheduled)
    assert opt.param_groups[0]["snr_lambda"] == LAMBDA
    train(scheduled, opt, 2)
    reference = wrap(constant)
    train(constant, reference, 2)
    for o in (opt, reference):
        o.param_groups[0]["snr_lambda"] = 0.3
    train(scheduled, opt, 2)
    train(constant, reference, 2)
    assert_same(scheduled, constant)
    reference.param_groups[0]["snr_lambda"] = 0.4
    train(scheduled, opt, 1)
    train(constant, reference, 1)
    assert_differ(scheduled, constant)


def test_lambda_is_read_for_every_term():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    model = torch.nn.ModuleList([first, second])
    opt = wrap(model)
    norms = [torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (first, second)]
    for strengths in ((0.5, 0.1), (0.3, 0.0), (0.0, 0.2)):
        model.zero_grad()  # not the wrapper's: it does not know of a new step
        for layer, strength in zip((first, second), strengths, strict=True):
            opt.param_groups[0]["snr_lambda"] = strength
            (layer.weight * 0).sum().backward()
        for layer, strength, norm in zip((first, second), strengths, norms, strict=True):
            assert layer.weight.grad.norm().item() == pytest.approx(strength * norm, rel=1e-3)


def test_lambda_is_read_from_the_groups_that_the_optimizer_has_by_then():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    opt = wrap(torch.nn.ModuleList([first, second]))
    (first.weight * 0).sum().backward()
    opt.optimizer.param_groups = [{**opt.param_groups[0], "snr_lambda": 0.3}]
    (second.weight * 0).sum().backward()
    norm = torch.linalg.matrix_norm(second.weight, 2).item()
    assert second.weight.grad.norm().item() == pytest.approx(0.3 * norm, rel=1e-3)


def test_a_weight_that_the_optimizer_holds_no_more_gets_no_term():
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    opt = wrap(torch.nn.ModuleList([first, second]))
    del opt.param_groups[0]["params"][2:]
    opt.zero_grad()
    for layer in (first, second):
        layer.weight.grad = None
        (layer.weight * 0).sum().backward()
    assert first.weight.grad.any()
    assert not second.weight.grad.any()


def test_a_group_that_says_none_is_not_taken_for_one_that_says_nothing():
    model = build("mlp")
    opt = wrap(model)
    opt.param_groups[0]["snr_lambda"] = None
    with pytest.raises(TypeError, match="snr_lambda of group 0"):
        model(model.example).sum().backward()


def test_a_backward_that_reaches_weights_without_lambda_alone_computes_nothing(monkeypatch):
    first, second = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    groups = [
        {"params": first.parameters(), "snr_lambda": 0.0},
        {"params": second.parameters(), "snr_lambda": 0.1},
    ]
    model = torch.nn.ModuleList([first, second])
    opt = SNROptimizer(torch.optim.SGD(groups, lr=0.1), model)
    advanced = []
    monkeypatch.setattr(opt._term.estimator, "advance", advanced.append)
    (first.weight * 0).sum().backward()
    assert not advanced


def test_lambda_zero_is_the_plain_optimizer_and_computes_nothing(monkeypatch):
    off, plain = build("convolutions"), build("convolutions")
    opt = SNROptimizer(sgd(off), off, 0.0)
    monkeypatch.setattr(opt._term.estimator, "advance", lambda target: pytest.fail("computed"))
    train(off, opt, 3)
    train(plain, sgd(plain), 3)
    assert_same(off, plain)


# --- param groups and unfreezing ---


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_maximizing_groups_have_their_norms_pressed_down_too(make):
    ascending, descending = build("mlp"), build("mlp")
    for model, sign in ((ascending, -1), (descending, 1)):
        base = make(model.parameters(), lr=0.01, maximize=sign < 0)
        opt = SNROptimizer(base, model, 0.1, exact=True)
        for _ in range(5):
            opt.zero_grad()
            (sign * model(model.example).square().mean()).backward()
            opt.step()
    for p, q in zip(ascending.parameters(), descending.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-15)


def test_only_groups_that_maximize_have_the_sign_of_their_term_turned():
    model, bare = build("mlp"), build("mlp")
    first, second = list(model.body[0].parameters()), list(model.body[2].parameters())
    base = torch.optim.SGD([{"params": first}, {"params": second, "maximize": True}], lr=0.1)
    opt = SNROptimizer(base, model, 0.1, exact=True)
    for m in (model, bare):
        m(m.example).sum().backward()
    for target, sign in zip(opt.targets, (1, -1), strict=True):
        weight = bare.get_parameter(target.name)
        u, s, vh = torch.linalg.svd(weight.detach(), full_matrices=False)
        added = target.parameter.grad - weight.grad
        torch.testing.assert_close(added, sign * 0.1 * s[0] * u[:, :1] * vh[:1])


def test_add_param_group_regularizes_what_it_brings():
    model = build("mlp")
    opt = SNROptimizer(sgd(model.body[0]), model, LAMBDA)
    assert [t.name for t in opt.targets] == ["body.0.weight"]
    assert dict(opt.skipped) == {"body.2.weight": "not held by the optimizer"}
    opt.add_param_group({"params": model.body[2].parameters(), "snr_lambda": 0.2})
    assert [t.name for t in opt.targets] == ["body.0.weight", "body.2.weight"]
    assert opt.skipped == ()
    assert [group["snr_lambda"] for group in opt.param_groups] == [LAMBDA, 0.2]
    twin = build("mlp")
    groups = [
        {"params": twin.body[0].parameters()},
        {"params": twin.body[2].parameters(), "snr_lambda": 0.2},
    ]
    reference = SNROptimizer(
        torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True), twin, LAMBDA
    )
    train(model, opt, 3)
    train(twin, reference, 3)
    assert_same(model, twin)


@pytest.mark.parametrize("through_model", [False, True])
def test_a_weight_unfrozen_later_is_regularized_from_the_next_zero_grad_on(through_model):
    model, reference = build("with_frozen"), build("mlp")
    opt = wrap(model, exact=True)
    assert [t.name for t in opt.targets] == ["body.2.weight"]
    model.body[0].weight.requires_grad_(True)
    if through_model:
        opt.step()
    opt.zero_grad()
    assert [t.name for t in opt.targets] == ["body.2.weight", "body.0.weight"]
    assert opt.skipped == ()
    train(model, opt, 1)
    train(reference, wrap(reference, exact=True), 1)
    assert_same(model, reference)


# --- state ---


def test_a_state_with_a_weight_that_was_unfrozen_continues_bitwise():
    def frozen():
        model = build("mlp")
        model.body[0].weight.requires_grad_(False)
        return model, wrap(model)

    model, opt = frozen()
    train(model, opt, 2)
    model.body[0].weight.requires_grad_(True)
    train(model, opt, 2)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 3)

    resumed, new = frozen()
    resumed.load_state_dict(saved[0])
    resumed.body[0].weight.requires_grad_(True)
    new.load_state_dict(saved[1])
    train(resumed, new, 3)
    assert len(new.targets) == len(opt.targets) == 2
    assert_same(resumed, model)


def test_a_state_with_a_weight_that_joined_the_wrapped_optimizer_continues_bitwise():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 2)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, 3)

    resumed = build("mlp")
    resumed.load_state_dict(saved[0])
    first, *others = resumed.parameters()
    inner = sgd(resumed)
    inner.param_groups[0]["params"] = others
    new = SNROptimizer(inner, resumed, LAMBDA)
    assert len(new.targets) == 1
    inner.param_groups[0]["params"] = [first, *others]
    new.load_state_dict(saved[1])
    train(resumed, new, 3)
    assert_same(resumed, model)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"exact": True},
        {"n_vectors": 1},
        {"n_vectors": 4, "n_power_iterations": 1},
        {"n_vectors": 1, "n_power_iterations": 0.125},
        {"n_power_iterations": 0.25},
    ],
)
@pytest.mark.parametrize("model_first", [False, True])
@pytest.mark.parametrize("n_steps", [5, 6])
def test_save_load_continue_is_bitwise_the_same_as_not_stopping(
    tmp_path, make, options, model_first, n_steps
):
    model = build("convolutions", torch.float32)
    model.example[:] = torch.randn(model.example.shape)
    opt = wrap(model, make, **options)
    train(model, opt, n_steps)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "c.pt")
    train(model, opt, 5)

    resumed = build("convolutions", torch.float32)
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    if model_first:
        resumed.load_state_dict(saved["model"])
    opt = wrap(resumed, make, **options)
    opt.load_state_dict(saved["optimizer"])
    resumed.load_state_dict(saved["model"])
    train(resumed, opt, 5)
    assert_same(resumed, model)


def test_seed_and_iterations_survive_loading_and_unseen_weights_start_from_the_seed():
    options = {"seed": 7, "n_power_iterations": 3}
    model = build("with_unused")
    opt = wrap(model, **options)
    train(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    del state["snr_hooks"]["vectors"]["unused.weight"]  # as if it had been frozen all along
    opt.load_state_dict(copy.deepcopy(state))
    resumed = copy.deepcopy(model)
    again = wrap(resumed, **options)
    again.load_state_dict(state)
    for m, o in ((model, opt), (resumed, again)):
        o.zero_grad()
        (m.unused.weight.square().sum() + m(m.example).sum()).backward()
        o.step()
        train(m, o, 2)
    assert_same(model, resumed)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_checkpoints_of_plain_and_wrapped_optimizers_are_exchangeable(make):
    model = build("convolutions")
    plain = make(model)
    train(model, plain, 3)
    state = copy.deepcopy(plain.state_dict())

    wrapped = copy.deepcopy(model)
    opt = wrap(wrapped, make, n_power_iterations=3)
    opt.param_groups[0]["snr_lambda"] = 0.0
    opt.load_state_dict(state)
    assert opt.param_groups[0]["snr_lambda"] == 0.0  # not silently the default again
    train(model, plain, 3)
    train(wrapped, opt, 3)
    assert_same(model, wrapped)

    opt.param_groups[0]["snr_lambda"] = LAMBDA
    train(wrapped, opt, 3)
    unwrapped = copy.deepcopy(wrapped)
    back = make(unwrapped)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.remove()
    train(wrapped, opt, 3)
    train(unwrapped, back, 3)
    assert_same(wrapped, unwrapped)


def test_the_state_dict_is_a_snapshot_of_the_vectors():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 1)
    vectors = opt.state_dict()["snr_hooks"]["vectors"]
    before = copy.deepcopy(vectors)
    train(model, opt, 3)
    after = opt.state_dict()["snr_hooks"]["vectors"]
    for name, pair in vectors.items():
        for side in ("left", "right"):
            part = pair[side]
            assert torch.equal(part, before[name][side])
            assert not torch.equal(part, after[name][side])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vectors_of_half_precision_weights_are_float32_through_a_checkpoint(dtype):
    model = build("mlp", dtype)
    opt = wrap(model)
    train(model, opt, 2)
    opt.load_state_dict(opt.state_dict())
    train(model, opt, 1)
    vectors = opt.state_dict()["snr_hooks"]["vectors"]
    assert {v.dtype for pair in vectors.values() for v in pair.values()} == {torch.float32}
    assert all(p.dtype == p.grad.dtype == dtype for p in model.parameters())


def test_vectors_of_other_weights_in_the_state_are_named():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 1)
    state = opt.state_dict()
    opt.remove()
    with pytest.warns(UserWarning, match=r"vectors of 1 weights .* first 'body\.2\.weight'"):
        wrap(model, exclude="body.2.*").load_state_dict(state)


# --- copies ---


def test_deepcopy_of_model_and_optimizer_trains_on_alone():
    model = build("convolutions")
    opt = wrap(model)
    scheduler = CosineAnnealingLR(opt, 10)  # patches opt.step
    train(model, opt, 3, scheduler)
    before = weights(model)
    twin, twin_opt = copy.deepcopy((model, opt))
    assert hooks_on(twin) == hooks_on(model) > 0
    train(twin, twin_opt, 3)
    for name, p in before.items():
        assert torch.equal(model.state_dict()[name], p)
    train(model, opt, 3)
    assert_same(model, twin)


def test_pickle_of_model_and_optimizer_trains_on_alike():
    model = build("convolutions")
    opt = wrap(model)
    train(model, opt, 3)
    twin, twin_opt = pickle.loads(pickle.dumps((model, opt)))
    train(twin, twin_opt, 3)
    train(model, opt, 3)
    assert_same(model, twin)


def test_a_copy_in_the_middle_of_accumulation_starts_with_no_gradient_and_its_own_term():
    model = build("mlp")
    opt = wrap(model, exact=True)
    model(model.example).sum().backward()
    twin, twin_opt = copy.deepcopy((model, opt))
    train(twin, twin_opt, 1)
    train(model, opt, 1)
    assert_same(model, twin)


def test_model_copies_carry_no_hooks():
    model = build("mlp")
    opt = wrap(model)
    ema = timm.utils.ModelEmaV3(model, decay=0.9)
    swa = AveragedModel(model)
    plain_copy = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for other in (ema, swa, plain_copy, pickled):
        assert hooks_on(other) == 0
    SWALR(opt, swa_lr=0.1)
    train(model, opt, 2)
    ema.update(model)
    swa.update_parameters(model)
    SNROptimizer(sgd(plain_copy), plain_copy)  # a copy may be wrapped too


# --- schedulers ---


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda opt: CosineAnnealingLR(opt, 10),
        lambda opt: LambdaLR(opt, lambda step: 0.9**step),
        lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=20),
    ],
)
def test_torch_schedulers_reach_the_wrapped_optimizer_also_after_loading(make_scheduler):
    wrapped, plain = build("mlp"), build("mlp")
    opt, reference = SNROptimizer(sgd(wrapped), wrapped, 0.0), sgd(plain)
    schedulers = make_scheduler(opt), make_scheduler(reference)
    for _ in range(2):
        train(wrapped, opt, 3, schedulers[0])
        train(plain, reference, 3, schedulers[1])
        assert opt.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert_same(wrapped, plain)


def test_reduce_on_plateau():
    model = build("mlp")
    opt = wrap(model)
    scheduler = ReduceLROnPlateau(opt, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert opt.optimizer.param_groups[0]["lr"] < 0.05


@pytest.mark.parametrize("name", ["cosine", "step", "multistep", "poly"])
def test_timm_schedulers_reach_the_wrapped_optimizer(name):
    model, plain = build("mlp"), build("mlp")
    opt, reference = wrap(model), sgd(plain)
    schedules = [
        timm.scheduler.create_scheduler_v2(o, name, num_epochs=10, decay_epochs=2, warmup_epochs=2)[
            0
        ]
        for o in (opt, reference)
    ]
    for epoch in range(10):
        for scheduler in schedules:
            scheduler.step(epoch)
        assert opt.optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]


@pytest.mark.parametrize("outside", [False, True])
def test_lookahead_inside_and_outside(outside):
    model = build("mlp")

    def combine(model):
        base = timm.optim.create_optimizer_v2(model, "adamw", lr=0.01)
        if outside:
            return timm.optim.Lookahead(SNROptimizer(base, model, LAMBDA, exact=True))
        return SNROptimizer(timm.optim.Lookahead(base), model, LAMBDA, exact=True)

    opt = combine(model)
    train(model, opt, 4)
    state, halfway = copy.deepcopy(opt.state_dict()), copy.deepcopy(model)
    train(model, opt, 4)
    resumed = combine(halfway)
    resumed.load_state_dict(state)
    train(halfway, resumed, 4)
    assert_same(model, halfway)


# --- reading ---


def test_reading_the_norms_changes_nothing():
    read, unread = build("convolutions"), build("convolutions")
    opt, other = wrap(read), wrap(unread)
    for _ in range(4):
        opt.spectral_norms()
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            opt.spectral_norms()
        train(read, opt, 1)
        train(unread, other, 1)
    assert_same(read, unread)


def test_spectral_norms_are_those_of_the_current_weights():
    model = build("mlp")
    opt = wrap(model, n_power_iterations=200)
    with torch.no_grad():
        model.body[0].weight *= 10
    exact = torch.linalg.matrix_norm(model.body[0].weight, 2).item()
    assert opt.spectral_norms()["body.0.weight"] == pytest.approx(exact, rel=1e-6)
    assert all(type(value) is float for value in opt.spectral_norms().values())


def test_weights_loaded_after_wrapping_get_the_warm_up():
    trained = build("convolutions")
    model = build("convolutions")
    with torch.no_grad():
        for p in trained.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    late, early = wrap(model), wrap(trained)
    model.load_state_dict(trained.state_dict())
    assert late.spectral_norms() == early.spectral_norms()


# --- removal and lifetime ---


def test_remove_leaves_the_plain_optimizer_and_no_trace():
    model, plain = build("mlp"), build("mlp")
    opt, reference = wrap(model), sgd(plain)
    groups = [set(group) for group in reference.param_groups]
    opt.remove()
    opt.remove()
    assert hooks_on(model) == 0
    assert [set(group) for group in opt.param_groups] == groups
    assert "removed" in repr(opt)
    train(model, opt, 3)
    train(plain, reference, 3)
    assert_same(model, plain)
    assert copy.deepcopy(opt)._removed
    again = SNROptimizer(opt.optimizer, model, 0.7)
    assert again.param_groups[0]["snr_lambda"] == 0.7


def test_remove_keeps_a_lambda_that_the_user_set():
    model = build("mlp")
    groups = [{"params": model.parameters(), "snr_lambda": 0.0}]
    opt = SNROptimizer(torch.optim.SGD(groups, lr=0.1), model, 0.5)
    opt.remove()
    assert opt.param_groups[0]["snr_lambda"] == 0.0


def test_a_removed_wrapper_does_not_adopt():
    model = build("with_frozen")
    opt = wrap(model)
    opt.remove()
    model.body[0].weight.requires_grad_(True)
    opt.step()
    opt.zero_grad()
    model.body[2].weight.requires_grad_(True)
    opt.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert hooks_on(model) == 0
    assert "snr_lambda" not in opt.param_groups[1]


def test_a_dropped_wrapper_is_freed_at_once_and_leaves_no_hooks():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 1)
    dropped = weakref.ref(opt)
    gc.disable()  # freed by reference count: there is no cycle
    try:
        del opt
        assert dropped() is None
        assert hooks_on(model) == 0
    finally:
        gc.enable()
    wrap(model)


def test_the_lambda_of_a_dropped_wrapper_does_not_win_over_the_next_one():
    model = build("mlp")
    base = sgd(model)
    opt = SNROptimizer(base, model, 0.01)
    del opt
    again = SNROptimizer(base, model, 0.1)
    assert again.param_groups[0]["snr_lambda"] == 0.1


def test_a_dropped_model_is_freed():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 1)
    dropped = weakref.ref(model)
    del model, opt
    gc.collect()
    assert dropped() is None
