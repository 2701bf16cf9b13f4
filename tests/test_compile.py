"""torch.compile: no graph break of ours, no recompilation from step to step, the same numbers."""

import copy
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from _models import build
from torch._dynamo import compiled_autograd
from torch._dynamo.utils import counters

from snr_hooks import SNROptimizer
from snr_hooks.hooks import check_not_captured

BACKENDS = ["eager", "inductor"]

# Upstream's, about itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(forward, opt, *, step=None, n_steps=6, backward=nullcontext, twice=False):
    """Train, and return what the compiler had counted after three steps."""
    for i in range(n_steps):
        opt.zero_grad()
        for _ in range(2 if twice else 1):
            loss = forward(forward.example).square().mean()
            with backward():
                loss.backward()
        (step or opt.step)()
        if i == 2:
            early = {name: dict(count) for name, count in counters.items()}
    return early


def eager_reference(**options):
    model = build("convolutions")
    train(model, SNROptimizer(sgd(model), model, 0.05), **options)
    torch._dynamo.reset()
    counters.clear()
    return model


def assert_equal(model, reference):
    plain = build("convolutions")
    train(plain, sgd(plain))
    for p, q, r in zip(model.parameters(), reference.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-13)
        assert not torch.allclose(p, r, rtol=0, atol=1e-6)


def assert_compiled_once(early, *, n_graphs):
    assert early == {name: dict(count) for name, count in counters.items()}
    assert counters["stats"]["unique_graphs"] == n_graphs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("when", ["before", "after", "in_place"])
def test_a_compiled_model(when, backend):
    reference = eager_reference()
    model = build("convolutions")
    if when == "before":
        forward = torch.compile(model, backend=backend, fullgraph=True)
        opt = SNROptimizer(sgd(forward), forward, 0.05)
    else:
        opt = SNROptimizer(sgd(model), model, 0.05)
        forward = model
        if when == "after":
            forward = torch.compile(model, backend=backend, fullgraph=True)
        else:
            model.compile(backend=backend, fullgraph=True)
    early = train(forward, opt)
    assert_equal(model, reference)
    assert_compiled_once(early, n_graphs=1)
    assert [target.name for target in opt.targets][:1] == ["body.0.weight"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_model_whose_input_sizes_are_observed(when):
    options = {"choose": "operator", "n_power_iterations": 2}
    reference, model = build("convolutions"), build("convolutions")
    train(reference, SNROptimizer(sgd(reference), reference, 0.05, **options))
    torch._dynamo.reset()
    counters.clear()
    if when == "after":
        opt = SNROptimizer(sgd(model), model, 0.05, **options)
    forward = torch.compile(model, backend="eager", fullgraph=True)
    if when == "before":
        opt = SNROptimizer(sgd(forward), forward, 0.05, **options)
    early = train(forward, opt)
    assert_equal(model, reference)
    assert_compiled_once(early, n_graphs=1)
    assert opt.targets[1].view.size.value == (8, 8)


def test_compiled_autograd_through_an_effective_weight():
    """It works, or says what does not."""
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 3))
    model.example = torch.ones(2, 4)
    opt = SNROptimizer(sgd(model), model, choose={"*": {"weight": "effective"}})

    def compiled():
        return compiled_autograd._enable(torch.compile(backend="eager"))

    with pytest.raises(RuntimeError, match="expected autograd to be available in backward hooks"):
        train(model, opt, backward=compiled)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twice", [False, True])
def test_compiled_autograd(backend, twice):
    reference = eager_reference(twice=twice)
    model = build("convolutions")
    opt = SNROptimizer(sgd(model), model, 0.05)

    def compiled():
        return compiled_autograd._enable(torch.compile(backend=backend, fullgraph=True))

    early = train(model, opt, backward=compiled, twice=twice)
    assert_equal(model, reference)
    # With and without a gradient from before are two graphs.
    assert_compiled_once(early, n_graphs=1 + twice)
    assert not counters["graph_break"]


def assert_same_under_compiled_autograd(loop):
    """Run a loop of (model, optimizer, backward) with and without, and compare the weights."""

    def compiled(loss):
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()

    models = build("mlp"), build("mlp")
    for model, backward in zip(models, (torch.Tensor.backward, compiled), strict=True):
        loop(model, SNROptimizer(sgd(model), model, 0.05), backward)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-14)


def test_compiled_autograd_notices_gradients_reset_past_the_optimizer():
    def loop(model, opt, backward):
        for reset_to_none in (True, False, True, False):
            model.zero_grad(set_to_none=reset_to_none)
            for _ in range(2):
                backward(model(model.example).square().mean())
        opt.step()

    assert_same_under_compiled_autograd(loop)


def test_compiled_autograd_adds_a_term_a_step_to_gradients_that_are_kept():
    def loop(model, opt, backward):
        for _ in range(3):  # without zero_grad
            backward(model(model.example).square().mean())
            opt.step()

    assert_same_under_compiled_autograd(loop)


def test_compiled_autograd_takes_a_gradient_with_some_zeros_for_no_reset():
    model = torch.nn.Linear(3, 2).double()
    # The term would fill the zeros: lambda is 0 in the first pass, which counts all the same.
    opt = SNROptimizer(sgd(model), model, 0.0)
    x = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    for passes in (1, 2):
        loss = model(x).sum()
        with compiled_autograd._enable(torch.compile(backend="eager")):
            loss.backward()
        assert torch.equal(model.weight.grad, passes * x.expand(2, 3))  # no term
        opt.param_groups[0]["snr_lambda"] = 0.05


@pytest.mark.filterwarnings("ignore:Profiler record function:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_step_is_compiled_as_that_of_the_wrapped_optimizer(backend):
    plain = build("convolutions")
    base = sgd(plain)
    train(plain, base, step=torch.compile(base.step, backend=backend))
    graphs = dict(counters["stats"])
    breaks = set(counters["graph_break"])  # one, which Optimizer.step asks for

    reference = eager_reference()
    model = build("convolutions")
    opt = SNROptimizer(sgd(model), model, 0.05)
    early = train(model, opt, step=torch.compile(opt.step, backend=backend))
    assert_equal(model, reference)
    assert_compiled_once(early, n_graphs=graphs["unique_graphs"])
    assert dict(counters["stats"]) == graphs
    assert set(counters["graph_break"]) == breaks


def test_the_state_of_a_compiled_model_continues_in_a_bare_one():
    compiled, bare = build("mlp"), build("mlp")
    forward = torch.compile(compiled, backend="eager")
    opt = SNROptimizer(sgd(forward), forward, 0.05)
    train(forward, opt)
    bare.load_state_dict(compiled.state_dict())
    other = SNROptimizer(sgd(bare), bare, 0.05, seed=5)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))  # torch's loading shares tensors
    train(forward, opt)
    train(bare, other)
    for p, q in zip(compiled.parameters(), bare.parameters(), strict=True):
        assert torch.equal(p, q)


def test_cuda_graph_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    check_not_captured()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="outside of CUDA graph capture, found it inside"):
        check_not_captured()


@pytest.mark.parametrize("is_cuda", [False, True])
def test_every_term_on_a_gpu_asks_for_a_capture(monkeypatch, is_cuda):
    # Stands for a gradient; no GPU is needed.
    grad = Mock(is_cuda=is_cuda, layout=torch.strided, _version=0)
    asked = Mock()
    monkeypatch.setattr("snr_hooks.hooks.check_not_captured", asked)
    model = build("mlp")
    opt = SNROptimizer(sgd(model), model, 0.05)
    for weight in opt._hooks._weights:
        weight._add_term = Mock()
        weight.after_accumulation(grad)
        weight._add_term.assert_called_once()
    assert asked.call_count == (len(opt.targets) if is_cuda else 0)
