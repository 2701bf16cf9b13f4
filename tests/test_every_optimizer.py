"""SNROptimizer around every optimizer of torch.optim and timm, Schedule-Free, Lookahead and SAM.

What torch and timm have is looked up when the tests are collected: an optimizer that they gain
is tested without being listed here. All are held to the same two things. Training equals
training with the penalty in the loss, and a resumed run is bitwise the uninterrupted one.
"""

import fnmatch
import inspect
import io
from functools import partial

import pytest
import timm.optim
import torch
from _models import Net
from _oracles import exact_terms, penalty
from torch import nn
from torch.optim import LBFGS, SGD, Optimizer

from snr_hooks import SNROptimizer, audit, discover

LAMBDA = 0.05
LR = 0.01
CLOSE = {"n_vectors": 1, "n_power_iterations": 30}  # to rounding, as sigma_2 is far from sigma_1

# --- the optimizers: functions of a model and of what to do with the optimizer to be wrapped ---


def unwrapped(opt):
    return opt


def regularized(model, **options):
    return lambda opt: SNROptimizer(opt, model, LAMBDA, **options)


def from_torch(cls, model, wrap, **options):
    # Muon refuses what is no matrix. Many iterations of LBFGS blow rounding up.
    params = [p for p in model.parameters() if cls.__name__ != "Muon" or p.ndim == 2]
    options |= {"max_iter": 4} if cls is LBFGS else {}
    return wrap(cls(params, lr=LR, **options))


def from_timm(name, model, wrap):
    return wrap(timm.optim.create_optimizer_v2(model, name, lr=LR))


def from_schedulefree(name, model, wrap):
    schedulefree = pytest.importorskip("schedulefree")
    return wrap(getattr(schedulefree, name)(model.parameters(), lr=LR))


def schedulefree_around(model, wrap):
    schedulefree = pytest.importorskip("schedulefree")
    return schedulefree.ScheduleFreeWrapper(from_torch(SGD, model, wrap))


def lookahead_inside(model, wrap):
    return wrap(timm.optim.Lookahead(from_timm("adamw", model, unwrapped), k=3))


def lookahead_outside(model, wrap):
    return timm.optim.Lookahead(from_timm("adamw", model, wrap), k=3)


class SAM(Optimizer):
    """Sharpness-aware minimization (arXiv 2010.01412), written as in github.com/davda54/sam."""

    def __init__(self, params, base_optimizer, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base_optimizer = base_optimizer(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([grad.norm() for grad in grads]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * group["rho"] / (norm + 1e-12))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


def sam_inside(model, wrap, **options):
    return wrap(SAM(model.parameters(), partial(SGD, lr=LR, momentum=0.9, **options)))


def sam_outside(model, wrap, **options):
    return SAM(model.parameters(), lambda groups: wrap(SGD(groups, lr=LR, momentum=0.9, **options)))


def everything():
    found = {}
    for name, cls in vars(torch.optim).items():
        if not (inspect.isclass(cls) and issubclass(cls, Optimizer)) or cls is Optimizer:
            continue
        found[f"torch.{name}"] = partial(from_torch, cls)
        for option in ("foreach", "fused", "capturable", "differentiable"):
            if option in inspect.signature(cls).parameters:
                found[f"torch.{name}({option})"] = partial(from_torch, cls, **{option: True})
    found["torch.LBFGS(strong_wolfe)"] = partial(from_torch, LBFGS, line_search_fn="strong_wolfe")
    for name in timm.optim.list_optimizers():
        found[f"timm.{name}"] = partial(from_timm, name)
    for algorithm in ("SGD", "AdamW", "RAdam"):
        for name in (f"{algorithm}ScheduleFree", f"{algorithm}ScheduleFreeClosure"):
            found[f"schedulefree.{name}"] = partial(from_schedulefree, name)
    found["schedulefree.ScheduleFreeWrapper"] = schedulefree_around
    found["lookahead inside"] = lookahead_inside
    found["lookahead outside"] = lookahead_outside
    return found


OPTIMIZERS = everything()

# Patterns of names, and what all of them say, with the wrapper and without.
CANNOT_WORK = {
    "torch.SparseAdam": "does not support dense gradients",
    "torch.*(capturable)": r"capturable=True, params.* must be on supported devices: \['cuda'",
    "torch.*(differentiable)": "a leaf Variable that requires grad is being used in an in-place",
    "timm.bnb*": "CUDA required for bitsandbytes|require bitsandbytes to be installed",
    "timm.fused*": "CUDA required for APEX|require apex to be installed",
}

# What does not resume bitwise, wrapped or not, and the generator that its state dict lacks.
LEFT_OUT = {"timm.adahessian": "generator"}

UPSTREAM_WARNINGS = {
    "timm.adahessian": "ignore:Using backward.. with create_graph=True:UserWarning",
    "timm.kron*": "ignore:It is highly recommended to have 'opt_einsum' installed:UserWarning",
}


def working(*, resumable=False):
    """All that can work, each allowed to warn as it does without the wrapper."""

    def matching(name, patterns):
        return [pattern for pattern in patterns if fnmatch.fnmatch(name, pattern)]

    return [
        pytest.param(
            name,
            marks=[
                pytest.mark.filterwarnings(UPSTREAM_WARNINGS[pattern])
                for pattern in matching(name, UPSTREAM_WARNINGS)
            ],
        )
        for name in OPTIMIZERS
        if not matching(name, CANNOT_WORK) and not (resumable and name in LEFT_OUT)
    ]


# --- training ---


@pytest.fixture(autouse=True)
def _contained():
    """Kron draws from the global stream, and compiles what runs much faster as it is."""
    with torch.random.fork_rng(), torch.compiler.set_stance("force_eager"):
        yield


def fresh(dtype=torch.float64):
    """The same small model each time, sigma_1 well above sigma_2, and the same random stream."""
    torch.manual_seed(0)
    body = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )
    model = Net(body, 5, 2, 4, 4).to(dtype)
    with torch.no_grad():
        names = [target.name for target in discover(model).targets]
        for name, (_, term) in exact_terms(model, names).items():
            model.get_parameter(name).add_(term)
    return model


def loss_of(model):
    return model(model.example).square().mean()


def needs_closure(opt):
    step = inspect.signature(type(getattr(opt, "optimizer", opt)).step)
    return step.parameters["closure"].default is inspect.Parameter.empty


def train(model, opt, n_steps, objective=lambda loss: loss, reported=lambda loss: loss):
    """Train as the optimizer's documentation asks for.

    ``objective`` makes of the loss what is differentiated, and ``reported`` of that what a
    closure returns.
    """

    def evaluate():
        opt.zero_grad()
        loss = objective(loss_of(model))
        loss.backward(create_graph=getattr(opt, "is_second_order", False))
        return reported(loss)

    if hasattr(opt, "train"):  # Schedule-Free
        opt.train()
    for _ in range(n_steps):
        if needs_closure(opt):
            opt.step(evaluate)
        else:
            evaluate()
            opt.step()
    if hasattr(opt, "eval"):
        opt.eval()
    opt.zero_grad()  # breaks the reference cycles of create_graph


def plus_penalty(model, *, curved=True):
    """Return what adds the penalty to a loss, or its tangent: the same gradient, no curvature."""
    strengths = {target.name: LAMBDA for target in discover(model).targets}

    def tangent():
        terms = exact_terms(model, strengths)
        return sum(LAMBDA * (model.get_parameter(n) * term).sum() for n, (_, term) in terms.items())

    return lambda loss: loss + (penalty(model, strengths) if curved else tangent())


def distance(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def trained(name, n_steps, checkpoint=None, *, wrapped=True):
    """Train a fresh float32 model, from a checkpoint if there is one."""
    model = fresh(torch.float32)
    opt = OPTIMIZERS[name](model, regularized(model) if wrapped else unwrapped)
    if checkpoint is not None:
        checkpoint.seek(0)
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random stream"])
    train(model, opt, n_steps)
    return model, opt


def saved(model, opt):
    state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
    file = io.BytesIO()
    torch.save({**state, "random stream": torch.get_rng_state()}, file)
    return file


def uninterrupted(name, **options):
    run = trained(name, 5, **options)
    train(*run, 5)
    return run


def is_same(run, other):
    """Compare weights, and vectors too: where only signs count, weights forgive other vectors."""

    def tensors(model, opt):
        vectors = opt.state_dict().get("snr_hooks", {"vectors": {}})["vectors"]
        sides = {(n, side): part for n, pair in vectors.items() for side, part in pair.items()}
        return {**model.state_dict(), **sides}

    run, other = tensors(*run), tensors(*other)
    assert run.keys() == other.keys()
    return all(torch.equal(tensor, other[key]) for key, tensor in run.items())


# --- every optimizer ---


@pytest.mark.parametrize("name", working())
def test_training_equals_the_penalty_in_the_loss(name):
    reference = fresh()
    loop = name.removesuffix("(foreach)").removesuffix("(fused)")  # what torch does one by one
    plain = OPTIMIZERS[loop](reference, unwrapped)
    # To create_graph=True the term is a constant.
    curved = not getattr(plain, "is_second_order", False)
    train(reference, plain, 10, plus_penalty(reference, curved=curved))

    wrapped = fresh()
    # A line search compares losses: it wants those that the gradients belong to.
    reported = plus_penalty(wrapped) if "strong_wolfe" in name else lambda loss: loss
    opt = OPTIMIZERS[name](wrapped, regularized(wrapped, exact=True))
    train(wrapped, opt, 10, reported=reported)
    assert distance(wrapped, reference) <= 1e-12

    without = fresh()
    train(without, OPTIMIZERS[name](without, unwrapped), 10)
    assert distance(wrapped, without) > 1e-4


@pytest.mark.parametrize("name", working(resumable=True))
def test_save_load_continue_is_bitwise_the_same_as_not_stopping(name):
    run = uninterrupted(name)
    assert is_same(trained(name, 5, saved(*trained(name, 5))), run)
    assert distance(run[0], uninterrupted(name, wrapped=False)[0]) > 1e-5  # it is regularized


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", [p for p in working() if p.values[0] in LEFT_OUT])
def test_what_a_state_dict_leaves_out_and_that_the_rest_resumes(name, wrapped):
    run = uninterrupted(name, wrapped=wrapped)
    first = trained(name, 5, wrapped=wrapped)
    checkpoint = saved(*first)
    assert not is_same(trained(name, 5, checkpoint, wrapped=wrapped), run)

    resumed, opt = trained(name, 0, checkpoint, wrapped=wrapped)
    generator = getattr(first[1], LEFT_OUT[name])
    getattr(opt, LEFT_OUT[name]).set_state(generator.get_state())
    train(resumed, opt, 5)
    assert is_same((resumed, opt), run)


@pytest.mark.parametrize("pattern", CANNOT_WORK)
def test_what_cannot_work_does_not_without_the_wrapper_either(pattern):
    names = fnmatch.filter(OPTIMIZERS, pattern)
    assert names
    for name in names:
        for wrapped in (False, True):
            with pytest.raises(
                (AssertionError, ImportError, RuntimeError), match=CANNOT_WORK[pattern]
            ):
                trained(name, 1, wrapped=wrapped)


def test_sparse_adam_on_what_it_is_for_has_nothing_to_regularize():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 7))
    sparse, dense = torch.optim.SparseAdam(model[0].parameters()), SGD(model[1].parameters(), lr=LR)
    with pytest.raises(ValueError, match=r"1\.weight: not held by the optimizer"):
        SNROptimizer(sparse, model)
    dense = SNROptimizer(dense, model)
    model(torch.arange(5)).sum().backward()
    sparse.step()
    dense.step()


# --- Schedule-Free ---

SCHEDULE_FREE = [f"schedulefree.{algorithm}ScheduleFree" for algorithm in ("SGD", "AdamW", "RAdam")]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_evaluates_other_weights_than_it_trains(name):
    looked_at, never_swapped = fresh(), fresh()
    opt, other = (
        OPTIMIZERS[name](model, regularized(model, **CLOSE)) for model in (looked_at, never_swapped)
    )
    with pytest.raises(Exception, match="not in train mode"):
        opt.step()
    train(looked_at, opt, 8)  # RAdam does nothing in the first five
    norms = []
    for switch in (opt.eval, opt.train):
        switch()
        exact = exact_terms(looked_at, [target.name for target in opt.targets])
        for row in audit(opt):
            assert row.sigma == pytest.approx(exact[row.name][0], rel=1e-12)
            assert row.estimate == pytest.approx(row.sigma, rel=1e-9)
        norms.append(opt.spectral_norms())
    for key, sigma in norms[0].items():
        assert sigma != pytest.approx(norms[1][key], rel=1e-6)

    train(looked_at, opt, 5)
    train(never_swapped, other, 13)
    assert distance(looked_at, never_swapped) <= 1e-12


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_schedule_free_resumes_from_a_checkpoint_made_while_training(name):
    model, opt = trained(name, 5)
    opt.train()
    assert is_same(trained(name, 5, saved(model, opt)), uninterrupted(name))


# --- sharpness-aware minimization ---


def in_two_steps(model, opt, objective):
    objective(loss_of(model)).backward()
    opt.first_step(zero_grad=True)
    objective(loss_of(model)).backward()
    opt.second_step(zero_grad=True)


def by_closure(model, opt, objective):
    def evaluate():
        objective(loss_of(model)).backward()

    evaluate()
    opt.step(evaluate)
    opt.zero_grad()


@pytest.mark.parametrize("fused", [False, True])  # fused steps do not count as writes
@pytest.mark.parametrize("options", [{"exact": True}, CLOSE])
@pytest.mark.parametrize("loop", [in_two_steps, by_closure])
@pytest.mark.parametrize("compose", [sam_inside, sam_outside])
def test_sam_climbs_and_descends_on_loss_and_penalty(compose, loop, options, fused):
    wrapped, reference, plain = fresh(), fresh(), fresh()
    runs = [(wrapped, regularized(wrapped, **options), lambda loss: loss)]
    runs += [(reference, unwrapped, plus_penalty(reference))]
    runs += [(plain, unwrapped, lambda loss: loss)]
    for model, wrap, objective in runs:
        opt = compose(model, wrap, fused=fused)
        for _ in range(10):
            loop(model, opt, objective)
    assert distance(wrapped, reference) <= 1e-12
    assert distance(wrapped, plain) > 1e-3
