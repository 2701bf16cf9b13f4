"""Bad input gets an error that says what was expected, found and to do; nothing is lost."""

import copy
import gc
import math
from types import SimpleNamespace

import pytest
import torch
from _models import build
from torch import nn
from torch.nn.utils import prune

from snr_hooks import SNROptimizer, audit
from snr_hooks.checks import checked_products


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model)
    model(model.example).sum().backward()
    opt.step()
    return model, opt


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, -math.inf])
def test_lambda_out_of_range(value):
    model = build("mlp")
    with pytest.raises(ValueError, match=r"expected lambda_ to be finite and >= 0, found"):
        SNROptimizer(sgd(model), model, value)


@pytest.mark.parametrize("value", ["0.1", None, True, torch.tensor(0.1), 1j])
def test_lambda_is_not_a_number(value):
    model = build("mlp")
    with pytest.raises(TypeError, match=r"expected lambda_ to be a number >= 0, found"):
        SNROptimizer(sgd(model), model, value)


@pytest.mark.parametrize(("value", "error"), [(-1.0, ValueError), ("a", TypeError)])
def test_bad_lambda_of_a_group(value, error):
    model = build("mlp")
    groups = [{"params": model.parameters(), "snr_lambda": value}]
    with pytest.raises(error, match="snr_lambda of group 0"):
        SNROptimizer(torch.optim.SGD(groups, lr=0.1), model)


def test_bad_lambda_set_between_steps_is_refused_in_backward():
    model, opt = trained()
    opt.param_groups[0]["snr_lambda"] = math.nan
    opt.zero_grad()
    with pytest.raises(ValueError, match="snr_lambda of group 0 to be finite"):
        model(model.example).sum().backward()


@pytest.mark.parametrize(
    ("value", "error"),
    [
        *((0, ValueError), (-3, ValueError), (0.3, ValueError), (0.75, ValueError)),
        (math.nan, ValueError),
        *((math.inf, ValueError), ("1", TypeError), (True, TypeError)),
    ],
)
def test_bad_number_of_power_iterations(value, error):
    model = build("mlp")
    with pytest.raises(error, match="expected n_power_iterations to be a"):
        SNROptimizer(sgd(model), model, n_power_iterations=value)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_number_of_vectors(value, error):
    model = build("mlp")
    with pytest.raises(error, match="expected n_vectors to be"):
        SNROptimizer(sgd(model), model, n_vectors=value)


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1e-3, ValueError), (math.nan, ValueError), ("0", TypeError), (True, TypeError)],
)
def test_bad_tolerance(value, error):
    model = build("mlp")
    with pytest.raises(error, match="expected tolerance to be a"):
        SNROptimizer(sgd(model), model, tolerance=value)


@pytest.mark.parametrize("option", ["exact", "decoupled"])
@pytest.mark.parametrize("value", ["false", 0, None])
def test_switches_are_true_or_false(option, value):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=f"expected {option} to be True or False, found"):
        SNROptimizer(sgd(model), model, **{option: value})


@pytest.mark.parametrize(("value", "error"), [(-1, ValueError), ("0", TypeError)])
def test_bad_seed(value, error):
    model = build("mlp")
    with pytest.raises(error, match="expected seed to be"):
        SNROptimizer(sgd(model), model, seed=value)


def test_arguments_in_the_wrong_order():
    model = build("mlp")
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer, found Net: pass the"):
        SNROptimizer(model, sgd(model))


def test_model_is_no_module():
    model = build("mlp")
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model, found generator"):
        SNROptimizer(sgd(model), model.parameters())


def test_scaler_is_no_grad_scaler():
    model = build("mlp")
    with pytest.raises(TypeError, match=r"expected scaler to be a torch\.amp\.GradScaler"):
        SNROptimizer(sgd(model), model, scaler=1024.0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_that_the_wrapper_was_not_told_of_stops_the_first_step(fused):
    model = build("mlp", torch.float32)
    before = copy.deepcopy(model.state_dict())
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1, fused=fused), model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(model.example).sum()).backward()
    with pytest.raises(RuntimeError, match=r"found scaler=None.*pass the scaler as"):
        scaler.step(opt)
    for name, p in model.state_dict().items():
        assert torch.equal(p, before[name])


def test_a_disabled_grad_scaler_or_a_removed_wrapper_needs_no_scaler():
    model, opt = trained()
    torch.amp.GradScaler("cpu", enabled=False).step(opt)
    opt.remove()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(model.example).sum()).backward()
    scaler.step(opt)


def test_a_scaler_that_does_not_scale_the_loss_stops_the_first_backward():
    model = build("mlp")
    scaler = torch.amp.GradScaler("cpu")
    opt = SNROptimizer(sgd(model), model, scaler=scaler)
    with pytest.raises(RuntimeError, match=r"scaler that never scaled one.*scaler\.scale\(loss"):
        model(model.example).sum().backward()
    opt.remove()


def test_nothing_to_regularize_names_the_reasons():
    model = nn.Sequential(nn.Embedding(3, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match=r"found none.*0\.weight: Embedding\.weight is not the"):
        SNROptimizer(sgd(model), model)
    norm = nn.LayerNorm(2)
    with pytest.raises(ValueError, match="the model has no such parameter"):
        SNROptimizer(sgd(norm), norm)


def test_everything_excluded():
    model = build("mlp")
    with pytest.raises(ValueError, match=r"body\.0\.weight: matched by exclude"):
        SNROptimizer(sgd(model), model, exclude=lambda name: True)


def test_no_overlap_between_model_and_optimizer():
    with pytest.raises(ValueError, match="found one that holds none of them: build the optim"):
        SNROptimizer(sgd(build("mlp")), build("mlp"))


def test_the_optimizer_holds_no_weight_but_something_else():
    model = build("mlp")
    biases = torch.optim.SGD([model.body[0].bias], lr=0.1)
    with pytest.raises(ValueError, match=r"body\.0\.weight: not held by the optimizer"):
        SNROptimizer(biases, model)


@pytest.mark.parametrize("which", ["include", "exclude"])
@pytest.mark.parametrize("found", [3, nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), [b"head"]])
def test_a_selection_that_is_neither_patterns_nor_a_predicate(which, found):
    model = build("mlp")
    with pytest.raises(TypeError, match=f"expected {which} to be None, a shell pattern, several"):
        SNROptimizer(sgd(model), model, **{which: found})


def test_a_predicate_may_be_a_collection_too():
    class Layers(set):
        def __call__(self, name):
            return name.rpartition(".")[0] in self

    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, exclude=Layers({"body.0"}))
    assert [target.name for target in opt.targets] == ["body.2.weight"]


def test_include_without_a_match_names_the_nearest():
    model = build("mlp")
    with pytest.raises(ValueError, match=r"'body\.0\.wieght' .* nearest: 'body\.0\.weight'"):
        SNROptimizer(sgd(model), model, include="body.0.wieght")


def test_include_of_a_module_name_says_how_to_name_its_parameters():
    model = build("mlp")
    with pytest.raises(ValueError, match=r"'body' matches no parameter.*module: 'body\.\*'"):
        SNROptimizer(sgd(model), model, include="body")


def test_wrapping_twice():
    model, opt = trained()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(ValueError, match="found an SNROptimizer: wrap once"):
        SNROptimizer(opt, model)
    with pytest.raises(RuntimeError, match=r"found 'body\.0\.weight' already wrapped.*remove\(\)"):
        SNROptimizer(sgd(model), model)
    with pytest.raises(RuntimeError, match="already wrapped"):
        copy.copy(opt)
    assert opt.state_dict()["param_groups"] == before["param_groups"]
    opt.remove()
    SNROptimizer(sgd(model), model)


def test_a_wrapper_that_only_a_cycle_refers_to_is_gone():
    model = build("mlp")
    gc.disable()
    try:
        owner = SimpleNamespace(optimizer=SNROptimizer(sgd(model), model))
        owner.itself = owner
        del owner
        opt = SNROptimizer(sgd(model), model)
    finally:
        gc.enable()
    assert opt.targets
    weights = [model.body[0].weight, model.body[2].weight]
    assert [len(weight._post_accumulate_grad_hooks) for weight in weights] == [1, 1]


def test_a_refused_wrapper_leaves_model_and_optimizer_as_they_were():
    model, opt = trained()
    other = sgd(model)
    with pytest.raises(RuntimeError):
        SNROptimizer(other, model)
    assert "snr_lambda" not in other.param_groups[0]
    assert opt.param_groups[0]["snr_lambda"] == 0.01
    assert all(len(t.parameter._post_accumulate_grad_hooks) == 1 for t in opt.targets)


def test_two_wrappers_on_different_weights_of_one_model():
    model = build("mlp")
    first = SNROptimizer(sgd(model.body[0]), model, include="body.0.*")
    second = SNROptimizer(sgd(model.body[2]), model, include="body.2.*")
    assert [t.name for t in (*first.targets, *second.targets)] == ["body.0.weight", "body.2.weight"]


def test_uninitialized_lazy_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"lazy '1\.weight'.*run one forward pass"):
        SNROptimizer(sgd(model[0]), model)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value):
    model = build("mlp")
    with torch.no_grad():
        model.body[2].weight[0, :2] = value
    with pytest.raises(ValueError, match=r"found 2 of 24 entries of 'body\.2\.weight' NaN or inf"):
        SNROptimizer(sgd(model), model)


def test_weights_on_the_meta_device():
    with torch.device("meta"):
        model = build("mlp")
    with pytest.raises(ValueError, match=r"'body\.0\.weight' on the meta device: materialize"):
        SNROptimizer(sgd(model), model)


def replaced_by_assignment(model):
    model.load_state_dict(model.state_dict(), assign=True)


def replaced_by_a_parametrization(model):
    nn.utils.parametrizations.weight_norm(model.body[0])


def replaced_by_materialization(model):
    model.to("meta")


@pytest.mark.parametrize(
    "replace",
    [replaced_by_assignment, replaced_by_a_parametrization, replaced_by_materialization],
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_parameter_that_was_replaced_stops_the_step(replace):
    model, opt = trained()
    replace(model)
    before = [t.parameter.detach().clone() for t in opt.targets]
    with pytest.raises(RuntimeError, match=r"expected 'body\.0\.weight' to be the parameter that"):
        opt.step()
    for target, weight in zip(opt.targets, before, strict=True):
        assert torch.equal(target.parameter, weight)
    opt.remove()
    opt.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        nn.utils.parametrizations.spectral_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", nn.Identity()),
        nn.utils.spectral_norm,
    ],
    ids=["prune", "spectral_norm", "orthogonal", "parametrization", "old spectral_norm"],
)
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.filterwarnings("ignore:.*spectral_norm:FutureWarning")
def test_a_parameter_that_is_trained_as_a_function_by_now_stops_the_step(change, copied):
    """It still gets its gradient, but what its term presses down is not what forward applies."""
    model, opt = trained()
    if copied:
        model, opt = copy.deepcopy((model, opt))
    change(model.body[0])
    model(model.example).sum().backward()  # at once: zero_grad() would look at a copy anew
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"expected 'body\.0\.weight' to be the parameter that"):
        opt.step()
    assert all(map(torch.equal, model.parameters(), before))
    opt.remove()
    opt.step()


def test_pruning_that_was_made_permanent_between_steps_is_fine():
    model, opt = trained()
    prune.l1_unstructured(model.body[0], "weight", amount=0.5)
    prune.remove(model.body[0], "weight")
    opt.zero_grad()
    opt.step()


def test_an_exact_term_of_a_weight_that_is_not_finite_names_the_weight():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, exact=True)
    with torch.no_grad():
        opt.targets[1].parameter[0, 0] = math.nan
    message = rf"expected finite weights, found NaN or infinity in '{opt.targets[1].name}'"
    with pytest.raises(ValueError, match=message):
        model(model.example).sum().backward()


# --- state dicts ---


def test_a_saved_single_vector_that_is_no_unit_vector_is_refused():
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, n_vectors=1)
    model(model.example).sum().backward()
    for factor in (0.5, 2.0):
        state = copy.deepcopy(opt.state_dict())
        for part in state["snr_hooks"]["vectors"]["body.0.weight"].values():
            part *= factor
        with pytest.raises(ValueError, match="which are no vectors of an iteration with 1"):
            opt.load_state_dict(state)


def good_pair():
    return {"left": torch.eye(8)[:1], "right": torch.eye(6)[:3]}


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (torch.ones(6), r"\(1, 8\) and \(3, 6\), or \(3, 8\) and \(1, 6\), found a Tensor"),
        (good_pair() | {"right": torch.ones(3, 5)}, r"found \(1, 8\) and \(3, 5\)"),
        (good_pair() | {"right": torch.ones(4, 6)}, r"found \(1, 8\) and \(4, 6\), as with n_vec"),
        (good_pair() | {"left": torch.ones(3, 8)}, r"found \(3, 8\) and \(3, 6\)"),
        (good_pair() | {"left": torch.zeros(1, 8)}, "zero or not finite"),
        (good_pair() | {"right": torch.ones(3, 6).tril(-6)}, "zero or not finite"),
        (good_pair() | {"right": torch.tensor([[1.0] * 6] * 2 + [[0.0] * 6])}, "zero or not"),
        (good_pair() | {"right": torch.full((3, 6), math.nan)}, "zero or not finite"),
        (good_pair() | {"right": 101 * torch.eye(6)[:3]}, "lengths of 1.0 to 101.0, which are no"),
        (good_pair() | {"right": [[1.0] * 6] * 3}, "found no tensors"),
        ({"right": torch.eye(6)[:3]}, "found a dict"),
    ],
)
def test_a_state_dict_with_bad_vectors_changes_nothing(vectors, message):
    _, opt = trained()
    before = copy.deepcopy(opt.state_dict())
    state = copy.deepcopy(before)
    state["snr_hooks"]["vectors"]["body.0.weight"] = vectors
    state["param_groups"][0]["lr"] = 77.0
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1
    assert_same_vectors(opt.state_dict(), before)


def assert_same_vectors(state, expected):
    for name, pair in expected["snr_hooks"]["vectors"].items():
        for side in ("left", "right"):
            assert torch.equal(state["snr_hooks"]["vectors"][name][side], pair[side])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("sigma", torch.tensor(math.nan)), ("sigma", None), ("u", torch.ones(5))),
        *(("v", torch.full((6,), math.inf)), ("age", torch.ones(2))),
        *(("sigma", torch.tensor(-5.0)), ("age", torch.tensor(-7)), ("u", torch.ones(8))),
    ],
)
def test_a_state_dict_with_a_bad_held_term_changes_nothing(key, value):
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, n_power_iterations=0.125)
    model(model.example).sum().backward()
    opt.step()
    before = copy.deepcopy(opt.state_dict())
    state = copy.deepcopy(before)
    state["snr_hooks"]["vectors"]["body.0.weight"][key] = value
    with pytest.raises(ValueError, match=r"the held .* of 'body\.0\.weight' to"):
        opt.load_state_dict(state)
    assert_same_vectors(opt.state_dict(), before)


@pytest.mark.parametrize("entry", [None, [], {"v": {}}, {"vectors": []}])
def test_a_state_dict_with_a_malformed_entry(entry):
    _, opt = trained()
    with pytest.raises(ValueError, match="'snr_hooks' in the state dict to hold 'vectors'"):
        opt.load_state_dict({**opt.state_dict(), "snr_hooks": entry})


def test_a_state_dict_with_a_bad_lambda_changes_nothing():
    _, opt = trained()
    state = copy.deepcopy(opt.state_dict())
    state["param_groups"][0].update(snr_lambda=-1.0, lr=77.0)
    with pytest.raises(ValueError, match="snr_lambda of group 0 in the state dict"):
        opt.load_state_dict(state)
    assert opt.param_groups[0]["lr"] == 0.1


def test_a_state_dict_that_the_wrapped_optimizer_refuses_changes_nothing():
    _, opt = trained()
    before = opt.state_dict()
    state = copy.deepcopy(before)
    state["snr_hooks"]["vectors"]["body.0.weight"]["right"] *= -1
    state["param_groups"] *= 2
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(state)
    assert_same_vectors(opt.state_dict(), before)


def test_add_param_group_with_a_bad_lambda_adds_nothing():
    _, opt = trained()
    with pytest.raises(ValueError, match="snr_lambda"):
        opt.add_param_group({"params": nn.Linear(2, 2).parameters(), "snr_lambda": -1})
    assert len(opt.param_groups) == 1


# --- what is skipped only once it happens ---


def test_a_gradient_that_turns_out_sparse_is_left_alone_with_a_warning():
    layer = nn.Linear(4, 7, bias=False)
    opt = SNROptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    indices = torch.tensor([0, 2])
    with pytest.warns(UserWarning, match="the gradient of 'weight' is sparse"):
        nn.functional.embedding(indices, layer.weight, sparse=True).sum().backward()
    dense = layer.weight.grad.to_dense()
    assert torch.equal(dense[indices], torch.ones(2, 4))
    assert dense.sum() == 8
    opt.step()


def test_audit_of_something_else():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module or an SNROptimizer, found"):
        audit({"weight": torch.ones(2, 2)})


@pytest.mark.parametrize("k", range(1, 200))
def test_a_product_every_kth_step_can_be_said_for_every_k(k):
    assert checked_products(0.5 / k) == (1, k)
    assert checked_products(0.5 * k) == (k, 1)
