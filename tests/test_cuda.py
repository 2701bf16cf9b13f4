"""What can only be seen on a GPU: the same terms as on the CPU, and nothing that waits for it."""

import copy
import math

import pytest
import torch
from torch import nn

from recipes import bench
from snr_hooks import SNROptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = "cuda"
STRENGTH = 0.1
SETTINGS = [
    {"n_vectors": 1},
    {"n_vectors": 1, "n_power_iterations": 0.125},
    {"n_vectors": 3, "tolerance": math.inf},
    {"n_vectors": 8, "n_power_iterations": 1, "tolerance": math.inf},
    {"exact": True},
]


@pytest.fixture(autouse=True)
def _reproducible(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 24), nn.Linear(24, 5)
    )


def wrapped(model, **options):
    inner = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return SNROptimizer(inner, model, STRENGTH, **options)


def batch(i, device):
    generator = torch.Generator().manual_seed(i)
    images = torch.randn(6, 3, 8, 8, generator=generator)
    return images.to(device), torch.randint(5, (6,), generator=generator).to(device)


def backward(model, optimizer, i, scaler=None):
    images, labels = batch(i, next(model.parameters()).device)
    loss = nn.functional.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    (loss if scaler is None else scaler.scale(loss)).backward()


def train(model, optimizer, steps):
    for i in steps:
        backward(model, optimizer, i)
        optimizer.step()


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_training_is_the_same_as_on_the_cpu(options):
    models = [network().double(), network().double().to(DEVICE)]
    for model in models:
        torch.set_default_dtype(torch.float64)
        try:
            train(model, wrapped(model, **options), range(8))
        finally:
            torch.set_default_dtype(torch.float32)
    for here, there in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-6, atol=1e-9)


def test_the_term_is_that_of_the_svd_once_it_has_converged():
    model = network().to(DEVICE)
    plain = copy.deepcopy(model)
    optimizer = wrapped(model)
    for _ in range(60):  # of the same weights
        backward(model, optimizer, 0)
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.step()
    backward(model, optimizer, 0)
    backward(plain, torch.optim.SGD(plain.parameters(), lr=0.0), 0)
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    for (name, regularized), parameter in pairs:
        added = regularized.grad - parameter.grad
        if name.endswith("bias"):
            assert not added.any()
            continue
        u, sigma, vh = torch.linalg.svd(parameter.detach().flatten(1))
        expected = STRENGTH * sigma[0] * torch.outer(u[:, 0], vh[0])
        torch.testing.assert_close(added.flatten(1), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", SETTINGS[:-1], ids=str)
def test_nothing_waits_for_the_device(options):
    model = network().to(DEVICE)
    optimizer = wrapped(model, **options)
    train(model, optimizer, range(2))  # makes the vectors, and views of them
    batches = [batch(i, DEVICE) for i in range(9)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for images, labels in batches:
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_outside_products_and_additions_do_not_grow_with_the_number_of_weights():
    counts = []
    for n_weights in (10, 30):
        layers = [nn.Linear(16, 16, bias=False, device=DEVICE) for _ in range(n_weights)]
        counts.append(bench.memory(nn.ModuleList(layers), {})["kernels"])
    assert counts[0] > 0
    # For each weight the product, perhaps in two parts, and the addition with its factor.
    assert counts[1] - counts[0] <= 20 * 4


def test_the_term_has_the_scale_of_the_loss():
    gradients = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=2.0**10)):
        model = network().to(DEVICE)
        optimizer = wrapped(model, scaler=scaler)
        backward(model, optimizer, 0, scaler)
        if scaler is not None:
            scaler.unscale_(optimizer)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, unscaled in zip(*gradients, strict=True):
        torch.testing.assert_close(unscaled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", SETTINGS[:-1], ids=str)
def test_a_resumed_training_is_bitwise_the_same(options, tmp_path):
    model = network().to(DEVICE)
    optimizer = wrapped(model, **options)
    train(model, optimizer, range(5))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint.pt")
    train(model, optimizer, range(5, 9))
    resumed = network().to(DEVICE)
    again = wrapped(resumed, **options)
    weights, state = torch.load(tmp_path / "checkpoint.pt", map_location="cpu")
    resumed.load_state_dict(weights)
    again.load_state_dict(state)
    train(resumed, again, range(5, 9))
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_capture_is_refused():
    model = network().to(DEVICE)
    optimizer = wrapped(model)
    train(model, optimizer, range(3))
    images, labels = batch(0, DEVICE)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="outside of CUDA graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        nn.functional.cross_entropy(model(images), labels).backward()


def test_the_benchmark_measures_on_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "MODELS", {"test_resnet": (1, 1, {})})
    monkeypatch.setattr(bench, "ON_GPU", (32, 4, {}))
    options = ["--repetitions", "1", "--largest", "1", "--models", "test_resnet"]
    bench.main([*options, "--output", str(tmp_path)])
    text = (tmp_path / "bench.md").read_text()
    assert torch.cuda.get_device_name() in text
    assert text.count("; kernels alone ") == len(bench.SETTINGS)
    assert text.count(" kernels |") == len(bench.SETTINGS)
