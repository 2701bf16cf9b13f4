"""Cases that slipped through once, or that a mutation of the code once survived."""

import copy
import pickle
import weakref

import numpy as np
import pytest
import torch
from _models import build
from _oracles import exact_term, matrix_with
from test_once_per_step import LAMBDA, loss_of, record
from test_optimizer import hooks_on, sgd, train, wrap
from torch import nn

from snr_hooks import SNROptimizer
from snr_hooks.subspace import starting_vectors


def assert_n_terms(loop, n):
    """After the loop's last step, gradients differ by n terms from those without wrapper."""
    bare, wrapped, terms = record(build("mlp"), loop)
    for name, (_, term) in terms.items():
        torch.testing.assert_close(wrapped[-1][name], bare[-1][name] + n * LAMBDA * term)


def parameters(model):
    return [p for p in model.parameters() if p.grad is not None]


def effective_lambda(model, opt, name):
    """Measure lambda in the gradient of a loss that contributes nothing itself."""
    opt.zero_grad()
    model.zero_grad()
    (model(model.example).sum() * 0).backward()
    weight = model.get_parameter(name)
    _, term = exact_term(weight)
    return float((weight.grad * term).sum() / (term * term).sum())


# --- once per step ---


def test_a_gradient_touched_after_a_step_still_gets_the_next_term():
    def loop(model, opt):
        loss_of(model).backward()
        opt.step()
        for p in parameters(model):
            p.grad.add_(1.0)
        loss_of(model).backward()
        opt.step()

    assert_n_terms(loop, 2)


def test_a_step_with_a_closure_that_does_not_zero_counts_as_a_step():
    def loop(model, opt):
        opt.step(lambda: loss_of(model).backward())
        loss_of(model).backward()
        opt.step()

    assert_n_terms(loop, 2)


@pytest.mark.parametrize("values", [(1.0, 0.0), (1.0, -1.0)])
def test_a_gradient_is_reset_only_if_every_entry_is_zero(values):
    def loop(model, opt):
        loss_of(model).backward()
        for p in parameters(model):
            p.grad.zero_()
            p.grad.view(-1)[0], p.grad.view(-1)[-1] = values
        loss_of(model).backward()
        opt.step()

    assert_n_terms(loop, 0)  # the one from before was overwritten by the user


def test_a_replaced_gradient_of_zeros_is_noticed_at_any_version():
    def loop(model, opt):
        loss_of(model).backward()
        for p in parameters(model):
            zeros = torch.zeros_like(p)
            while zeros._version < p.grad._version:
                zeros.add_(0)
            p.grad = zeros
        loss_of(model).backward()
        opt.step()

    assert_n_terms(loop, 1)


def test_ordinary_loops_compare_no_gradient_with_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "any", lambda *_: pytest.fail("compared"))

    def loop(model, opt):
        for _ in range(2):
            for _ in range(3):
                loss_of(model).backward()
            opt.step()
            opt.zero_grad()

    assert_n_terms(loop, 1)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
def test_the_term_is_no_part_of_the_graph_of_create_graph():
    bare, wrapped = build("mlp"), build("mlp")
    opt = wrap(wrapped)
    for model in (bare, wrapped):
        loss_of(model).backward(create_graph=True)
    for p, q in zip(bare.parameters(), wrapped.parameters(), strict=True):
        assert type(p.grad.grad_fn) is type(q.grad.grad_fn)
    for model in (bare, wrapped):
        model.zero_grad()
    del opt


def test_a_gradient_that_was_sparse_once_gets_its_term_when_it_is_dense():
    layer = nn.Linear(4, 7, bias=False).double()
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer, LAMBDA, exact=True)
    with pytest.warns(UserWarning, match="is sparse"):
        nn.functional.embedding(torch.tensor([0]), layer.weight, sparse=True).sum().backward()
    layer.weight.grad = None
    layer.weight.sum().backward()
    torch.testing.assert_close(layer.weight.grad - 1, LAMBDA * exact_term(layer.weight)[1])
    opt.step()


def test_a_gradient_that_another_hook_consumed_is_reported():
    model = build("mlp")
    model.body[0].weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    opt = wrap(model)
    with pytest.raises(
        RuntimeError, match=r"gradient of 'body\.0\.weight' just accumulated, found"
    ):
        loss_of(model).backward()
    opt.remove()


def test_the_last_gradient_is_not_kept_alive():
    model = build("mlp")
    opt = wrap(model)
    loss_of(model).backward()
    grad = weakref.ref(model.body[0].weight.grad)
    opt.zero_grad()
    assert grad() is None


# --- what is wrapped ---


def test_wrapping_is_all_or_nothing():
    model = build("mlp")
    first = SNROptimizer(sgd(model), model, include="body.2.*")
    before = hooks_on(model)
    with pytest.raises(RuntimeError, match=r"'body\.2\.weight' already wrapped"):
        SNROptimizer(sgd(model), model)
    assert hooks_on(model) == before == 2
    first.remove()


def test_swapped_tensors_stop_the_step():
    model = build("mlp")
    opt = wrap(model)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict(copy.deepcopy(model.state_dict()))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"'body\.0\.weight' to be the parameter.*swap_tensors"):
        opt.step()


def test_a_replaced_layer_stops_the_step():
    model = build("mlp")
    opt = wrap(model)
    model.body[2] = nn.Linear(8, 3).double()
    with pytest.raises(RuntimeError, match=r"'body\.2\.weight' to be the parameter"):
        opt.step()


def test_a_removed_layer_stops_add_param_group_before_it_adds():
    model = build("mlp")
    opt = wrap(model)
    del model.body[2]
    with pytest.raises(RuntimeError, match=r"'body\.2\.weight' to be the parameter"):
        opt.add_param_group({"params": nn.Linear(2, 2).parameters()})
    assert len(opt.param_groups) == 1


def test_moving_a_model_keeps_its_hooks():
    model = build("mlp", torch.float32)
    opt = SNROptimizer(sgd(model), model, LAMBDA, n_power_iterations=100)
    train(model, opt, 1)
    model.to(torch.float64)
    opt.state.clear()  # momentum buffers do not move with the model
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(LAMBDA, rel=1e-6)
    opt.step()


def test_patterns_from_an_iterator_are_remembered():
    model = build("with_frozen")
    opt = SNROptimizer(sgd(model), model, exclude=iter(["body.0.*"]))
    model.body[0].weight.requires_grad_(True)
    opt.zero_grad()
    assert [t.name for t in opt.targets] == ["body.2.weight"]


def test_a_weight_unfrozen_as_nan_is_refused_again_and_again():
    model = build("with_frozen")
    opt = wrap(model)
    with torch.no_grad():
        model.body[0].weight.fill_(torch.nan)
    model.body[0].weight.requires_grad_(True)
    before = hooks_on(model)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"'body\.0\.weight' NaN or infinite"):
            opt.zero_grad()
    assert hooks_on(model) == before


def test_no_weight_is_listed_both_as_target_and_as_skipped():
    model = build("with_frozen")
    opt = wrap(model)
    model.body[2].weight.requires_grad_(False)  # a target, frozen later
    model.body[0].weight.requires_grad_(True)
    opt.zero_grad()
    assert {t.name for t in opt.targets} == {"body.0.weight", "body.2.weight"}
    assert opt.skipped == ()


def test_a_copy_of_a_removed_wrapper_adopts_nothing():
    model = build("with_frozen")
    opt = wrap(model)
    opt.remove()
    twin, twin_opt = copy.deepcopy((model, opt))
    twin.body[0].weight.requires_grad_(True)
    twin_opt.zero_grad()
    assert hooks_on(twin) == 0


# --- lambda ---


def two_groups(model, first=0.1, second=0.2):
    groups = [
        {"params": list(model.body[0].parameters()), "snr_lambda": first},
        {"params": list(model.body[2].parameters()), "snr_lambda": second},
    ]
    return SNROptimizer(torch.optim.SGD(groups, lr=0.0), model, 0.7, exact=True)


def test_lambda_follows_reassigned_and_edited_groups():
    model = build("mlp")
    opt = two_groups(model)
    assert "snr_lambda: 0.1, 0.2" in repr(opt)
    opt.param_groups = opt.param_groups[::-1]
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(0.1)
    first, second = opt.param_groups
    first["params"], second["params"] = second["params"], first["params"]
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(0.2)
    del opt.param_groups[1]
    opt.zero_grad()
    assert effective_lambda(model, opt, "body.2.weight") == pytest.approx(0.0)


def test_a_group_without_lambda_gets_the_default_and_loses_it_again():
    model = build("mlp")
    opt = SNROptimizer(sgd(model.body[0]), model, LAMBDA, exact=True)
    opt.add_param_group({"params": model.body[2].parameters()})
    assert opt.param_groups[1]["snr_lambda"] == LAMBDA
    opt.param_groups[:] = opt.param_groups[::-1]
    opt.remove()
    assert all("snr_lambda" not in group for group in opt.param_groups)


def test_a_group_added_past_the_wrapper_is_regularized_from_the_next_zero_grad_on():
    model = build("mlp")
    opt = SNROptimizer(sgd(model.body[0]), model, LAMBDA, exact=True)
    opt.optimizer.add_param_group({"params": model.body[2].parameters()})
    assert effective_lambda(model, opt, "body.2.weight") == pytest.approx(LAMBDA)
    assert opt.skipped == ()


def test_reordered_groups_lose_only_the_lambda_they_were_given():
    model = build("mlp")
    groups = [
        {"params": model.body[0].parameters(), "snr_lambda": 0.5},
        {"params": model.body[2].parameters()},
    ]
    opt = SNROptimizer(torch.optim.SGD(groups, lr=0.1), model)
    opt.param_groups[:] = opt.param_groups[::-1]
    opt.remove()
    assert [group.get("snr_lambda") for group in opt.param_groups] == [None, 0.5]


def test_a_saved_lambda_is_restored_like_a_learning_rate():
    model = build("mlp")
    opt = wrap(model, exact=True)
    opt.param_groups[0]["snr_lambda"] = 0.3
    state = copy.deepcopy(opt.state_dict())
    opt.param_groups[0]["snr_lambda"] = 0.7
    opt.load_state_dict(state)
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(0.3)


def test_a_plain_state_loaded_past_the_wrapper_leaves_the_default():
    model = build("mlp")
    plain_state = sgd(model).state_dict()
    opt = wrap(model, exact=True)
    opt.optimizer.load_state_dict(plain_state)
    assert "snr_lambda" not in opt.param_groups[0]
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(0.05)


def test_numpy_numbers_are_numbers():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, np.float32(0.5), exact=True)
    assert effective_lambda(model, opt, "body.0.weight") == pytest.approx(0.5)


def test_reading_the_scale_needs_no_synchronization(monkeypatch):
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda _: pytest.fail("synchronized"))
    model = build("mlp")
    scaler = torch.amp.GradScaler("cpu")
    wrap(model, scaler=scaler)
    scaler.scale(loss_of(model)).backward()


# --- state ---


def test_zero_grad_to_zeros():
    model = build("mlp")
    opt = wrap(model)
    loss_of(model).backward()
    opt.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())


def test_loading_respects_hooks_and_leaves_the_state_dict_alone():
    model = build("mlp")
    opt = wrap(model)
    seen = []
    opt.optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.extend(state))
    opt.register_load_state_dict_pre_hook(lambda _, state: state.update(extra=1))

    def other_rate(_, state):
        groups = [{**group, "lr": 9.0} for group in state["param_groups"]]
        return {**state, "param_groups": groups}

    opt.register_load_state_dict_pre_hook(other_rate)
    state = opt.state_dict()
    opt.load_state_dict(state)
    assert "extra" not in state
    assert opt.param_groups[0]["lr"] == 9.0
    assert "snr_hooks" not in seen
    assert "param_groups" in seen


def test_an_unfinished_wrapper_has_no_attributes_to_forward():
    with pytest.raises(AttributeError, match="no attribute"):
        _ = SNROptimizer.__new__(SNROptimizer).lr


def test_the_first_look_at_a_weight_is_fifteen_iterations():
    layer = nn.Linear(256, 256)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    opt = SNROptimizer(sgd(layer), layer, n_vectors=1, seed=3)
    matrix = layer.weight.detach()
    v = starting_vectors(1, 256, 3, "weight").T.float()
    for _ in range(15):
        v = matrix.T @ (matrix @ v)
        v /= v.norm()
    assert opt.spectral_norms()["weight"] == pytest.approx((matrix @ v).norm().item(), rel=1e-6)
    (layer.weight * 0).sum().backward()
    u = matrix @ v
    half_more = (matrix.T @ (u / u.norm())).norm().item()
    assert opt.spectral_norms()["weight"] == pytest.approx(half_more, rel=1e-6)


def test_loaded_vectors_are_copies_and_only_of_targets():
    model = build("mlp")
    opt = wrap(model)
    train(model, opt, 1)
    state = copy.deepcopy(opt.state_dict())
    vectors = state["snr_hooks"]["vectors"]
    vectors["elsewhere.weight"] = {"left": torch.ones(1, 3), "right": torch.ones(2, 3)}
    with pytest.warns(UserWarning, match=r"'elsewhere\.weight'"):
        opt.load_state_dict(state)
    for pair in vectors.values():
        pair["right"].zero_()
    loaded = opt.state_dict()["snr_hooks"]["vectors"]
    assert set(loaded) == {"body.0.weight", "body.2.weight"}
    assert all(pair["right"].any() for pair in loaded.values())


def test_exact_is_exact_in_float64_also_for_float32_weights():
    model = build("mlp", torch.float32)
    opt = wrap(model, exact=True)
    for name, sigma in opt.spectral_norms().items():
        assert sigma == pytest.approx(exact_term(model.get_parameter(name))[0], rel=1e-13)


def test_a_gradient_put_there_by_hand_is_reported_and_one_left_from_before_is_not():
    model = build("with_unused")
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)
    model(model.example).sum().backward()
    opt.step()
    opt.step()  # with the old gradients, and none for the unused weight
    opt.zero_grad(set_to_none=False)
    model.unused.weight.grad = torch.zeros_like(model.unused.weight)
    opt.step()
    grads = torch.autograd.grad(model(model.example).sum(), list(model.body.parameters()))
    for p, grad in zip(model.body.parameters(), grads, strict=True):
        p.grad = grad
    with pytest.warns(
        UserWarning, match=r"'body\..*has a gradient that no backward pass"
    ) as caught:
        opt.step()
    assert len(caught) == 2
    assert {warning.filename for warning in caught} == {__file__}
    opt.param_groups[0]["snr_lambda"] = 0.0
    opt.step()


def test_gradients_that_were_clipped_in_a_closure_are_not_reported():
    model = build("mlp")
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model)

    def closure():
        opt.zero_grad()
        loss = model(model.example).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return loss

    for _ in range(3):
        opt.step(closure)


@pytest.mark.parametrize("n_vectors", [1, 2, 3, 8, 16])
def test_a_wrapper_loads_what_it_saved(n_vectors):
    """Also of weights with one row, and of ones whose vectors are not all unit vectors."""
    for seed in range(5):
        model = torch.nn.Sequential(torch.nn.Linear(60, 40), torch.nn.Linear(40, 1))
        with torch.no_grad():
            model[0].weight.copy_(matrix_with([0.5**i for i in range(30)], 40, 60, seed))
        opt = SNROptimizer(sgd(model), model, n_vectors=n_vectors, seed=seed)
        for _ in range(4):
            opt.zero_grad()
            sum((layer.weight * 0).sum() for layer in model).backward()
            opt.step()
            norms = opt.spectral_norms()
            opt.load_state_dict(opt.state_dict())
            assert opt.spectral_norms() == norms


@pytest.mark.parametrize("n_vectors", [1, 2, 3, 4])
@pytest.mark.parametrize("scale", [1e-38, 1e-40, 1e-44])
def test_a_weight_below_the_normal_numbers_leaves_gradients_finite_and_recovers(n_vectors, scale):
    layer = torch.nn.Linear(6, 5)
    before = layer.weight.detach().clone()
    opt = SNROptimizer(sgd(layer), layer, n_vectors=n_vectors)
    for factor in (scale, scale, scale, *[1.0] * 80):
        opt.zero_grad()
        with torch.no_grad():
            layer.weight.copy_(before * factor)
        (layer.weight * 0).sum().backward()
        assert layer.weight.grad.isfinite().all()
        opt.step()
    with torch.no_grad():
        layer.weight.copy_(before)
    top = torch.linalg.matrix_norm(before, 2).item()
    assert opt.spectral_norms()["weight"] == pytest.approx(top, rel=1e-3)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("choose", [None, "blocks", "operator", {"*": {"top": 2}}])
def test_copies_hold_terms_of_their_own(copied, choose):
    conv = torch.nn.Conv2d(4, 4, 3, groups=2)
    model = torch.nn.Sequential(conv)
    x = torch.randn(2, 4, 5, 5)
    opt = SNROptimizer(sgd(model), model, choose=choose, n_power_iterations=0.125)

    def step(model, opt):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()

    step(model, opt)
    model(x).square().mean().backward()  # a term is prepared, and at other steps held
    twin, twins_opt = copied((model, opt))
    step(model, opt)
    expected = conv.weight.detach().clone()
    for _ in range(4):  # all that the original holds is replaced
        step(model, opt)
    step(twin, twins_opt)
    assert torch.equal(twin[0].weight, expected)
