"""The measurements of the paper, each against a computation of another kind."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from recipes.measures import best_accuracy, generalization_gap, hessian_eigenvalue, sensitivity


def network():
    """A small smooth network with batch norm, in float64, that has seen some images."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, 4),
    ).double()
    with torch.no_grad():
        model(torch.randn(16, 2, 4, 4, dtype=torch.float64))
        model[1].weight.copy_(torch.tensor([1.5, 0.5, -1.0]))
    return model


def loader(*sizes):
    return [(torch.randn(n, 2, 4, 4, dtype=torch.float64), torch.randint(4, (n,))) for n in sizes]


def exact_hessian(model, batches, loss):
    """Return the Hessian of the mean loss over all images, all of it in memory."""
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    shapes = [p.shape for p in parameters.values()]
    model.eval()

    def of_vector(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        values = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        output = functional_call(model, dict(zip(parameters, values, strict=True)), (images,))
        return loss(output, labels)

    vector = torch.cat([p.flatten() for p in parameters.values()])
    return torch.autograd.functional.hessian(of_vector, vector)


# --- the Hessian ---


@pytest.mark.parametrize("frozen", [False, True])
def test_the_eigenvalue_is_the_largest_of_the_hessian_in_memory(frozen):
    model, batches = network(), loader(5, 5, 2)  # the last batch weighs less
    model[0].weight.requires_grad_(not frozen)
    hessian = exact_hessian(model, batches, nn.functional.cross_entropy)
    found = hessian_eigenvalue(model, batches, tolerance=1e-6)
    expected = float(torch.linalg.eigvalsh(hessian)[-1])
    assert found.value == pytest.approx(expected, rel=1e-6)
    assert found.residual < 1e-5
    assert found.n_images == 12
    assert 10 <= found.n_products < 200


def test_the_eigenvalue_is_the_largest_and_not_that_of_largest_size():
    def concave(output, labels):
        return -output.square().mean()

    model, batches = network(), loader(4, 4)
    values = torch.linalg.eigvalsh(exact_hessian(model, batches, concave))
    assert -values[0] > 2 * values[-1] > 0
    found = hessian_eigenvalue(model, batches, concave, tolerance=1e-6)
    assert found.value == pytest.approx(float(values[-1]), rel=1e-5)


def test_the_residual_is_that_of_the_pair_that_was_found(monkeypatch):
    """With a loose tolerance, some eigenvalue still lies within the residual."""
    model, batches = network(), loader(8)
    values = torch.linalg.eigvalsh(exact_hessian(model, batches, nn.functional.cross_entropy))
    found = hessian_eigenvalue(model, batches, tolerance=0.5)
    nearest = float((values - found.value).abs().min())
    assert 0 < nearest <= found.residual * abs(found.value)
    assert found.residual <= 0.5


def test_the_residual_is_relative_and_the_seed_is_that_of_the_start():
    model, batches = network(), loader(8)

    def larger(output, labels):
        return 1000 * nn.functional.cross_entropy(output, labels)

    one = hessian_eigenvalue(model, batches, tolerance=0.1)
    other = hessian_eigenvalue(model, batches, larger, tolerance=0.1)
    assert other.value == pytest.approx(1000 * one.value)
    assert other.residual == pytest.approx(one.residual, rel=1e-3)
    assert hessian_eigenvalue(model, batches, tolerance=0.1, seed=0) == one
    assert hessian_eigenvalue(model, batches, tolerance=0.1, seed=1) != one


def test_an_iteration_that_does_not_converge_says_so():
    found = hessian_eigenvalue(network(), loader(8), tolerance=1e-15, max_restarts=1)
    assert math.isnan(found.value)
    assert math.isnan(found.residual)
    assert found.n_products >= 10


def test_a_loss_that_is_linear_in_the_parameters_has_a_hessian_of_zero():
    model = nn.Linear(3, 4)
    batches = [(torch.randn(5, 3), torch.zeros(5))]
    found = hessian_eigenvalue(model, batches, lambda output, _: output.mean())
    assert found.value == found.residual == 0


def test_weights_that_are_not_finite_give_no_eigenvalue():
    model = network()
    with torch.no_grad():
        model[4].bias[0] = math.nan
    assert math.isnan(hessian_eigenvalue(model, loader(4)).value)


# --- sensitivity ---


def test_sensitivity_is_that_of_finite_differences():
    model, batches = network(), loader(3, 2)
    found = sensitivity(model, batches)
    model.eval()
    norms = []
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            slopes = []
            for pixel in range(image.numel()):
                step = torch.zeros(image.numel(), dtype=image.dtype)
                step[pixel] = 1e-5
                two = torch.stack([image + step.view_as(image), image - step.view_as(image)])
                up, down = nn.functional.cross_entropy(
                    model(two), label.repeat(2), reduction="none"
                ).tolist()
                slopes.append((up - down) / 2e-5)
            norms.append(np.linalg.norm(slopes))
    assert found == pytest.approx(np.mean(norms), rel=1e-6)
    assert np.std(norms) > 0.01 * np.mean(norms)  # else the mean could be any other average


# --- what all have in common ---


@pytest.mark.parametrize("measure", [sensitivity, hessian_eigenvalue])
def test_measuring_leaves_no_trace(measure):
    model, batches = network(), loader(4)
    model.train()
    model[1].eval()  # someone's frozen batch norm
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():  # may be called within
        assert measure(model, batches) is not None
    assert [module.training for module in model] == [True, False, True, True, True]
    assert all(bool((p.grad == 3).all()) for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(images.requires_grad for images, _ in batches)


# --- accuracy and gap ---

HISTORY = [
    {"train_eval_accuracy": 50.0, "test_accuracy": 49.0},
    {"train_eval_accuracy": 80.0, "test_accuracy": 70.0},
    {"train_eval_accuracy": 85.0, "test_accuracy": 78.0},
    {"train_eval_accuracy": 99.0, "test_accuracy": 77.5},
]


@pytest.mark.parametrize(
    ("alpha", "gap"), [(0, 1.0), (49, 1.0), (49.1, 7.0), (70, 7.0), (78, 7.0), (77.0, 7.0)]
)
def test_the_gap_by_hand(alpha, gap):
    assert generalization_gap(HISTORY, alpha) == gap


def test_the_gap_of_the_accuracies_that_are_asked_for_and_of_no_epoch():
    running = [{"train_accuracy": 60.0, "test_accuracy": 58.0}]
    assert generalization_gap(running, 50, "train_accuracy") == 2
    assert math.isnan(generalization_gap(HISTORY, 78.1))


def test_the_best_accuracy():
    assert best_accuracy(HISTORY) == 78
