"""Adversarial training and micro-batches: gradients against ones written by hand."""

import pytest
import torch
from torch import nn
from tqdm import tqdm

from recipes import train
from recipes.recipe import Recipe, read

QUIET = {"subset": 32, "batch_size": 32, "epochs": 1, "img_size": 16, "snr_lambda": 0.0}
LAYERS = {"stages": [[(3, 4)], [(3, 8)]]}


def recipe(**entries):
    model = {"model": "vggnet_cifar", "model_kwargs": LAYERS}
    return Recipe(**{**read("digits"), **model, **QUIET, **entries})


def batch(training):
    torch.manual_seed(7)
    return next(iter(training.loaders.train))


def gradients(training, images, labels):
    """Return loss and gradients as training makes them."""
    training.model.train()
    training.optimizer.zero_grad()
    loss, _, n_bad = train._backward(training, images, labels)
    assert not n_bad
    return loss, [p.grad.clone() for p in training.model.parameters()]


def by_hand(model, images, labels, eps, alpha):
    """alpha L(x) + (1 - alpha) L(x + eps g / |g|), image by image, with autograd.grad."""
    model.train()
    parameters = list(model.parameters())
    at = images.clone().requires_grad_()
    clean = nn.functional.cross_entropy(model(at), labels)
    (g,) = torch.autograd.grad(clean, at, retain_graph=True)
    moved = torch.stack([x + eps * d / d.norm() for x, d in zip(images, g, strict=True)])
    loss = alpha * clean + (1 - alpha) * nn.functional.cross_entropy(model(moved), labels)
    return loss.item(), torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(("eps", "alpha"), [(1.0, 0.5), (0.3, 0.8), (2.0, 1.0)])
def test_the_gradient_is_that_of_the_adversarial_loss(eps, alpha):
    training = train.build(recipe(adversarial_eps=eps, adversarial_alpha=alpha))
    images, labels = batch(training)
    expected = by_hand(training.model, images, labels, eps, alpha)
    loss, found = gradients(training, images, labels)
    assert loss == pytest.approx(expected[0], rel=1e-5)
    torch.testing.assert_close(found, list(expected[1]), rtol=1e-4, atol=1e-6)
    _, plain = gradients(train.build(recipe()), images, labels)
    differ = max(float((a - b).norm() / b.norm()) for a, b in zip(found, plain, strict=True))
    assert (differ > 0.05) == (alpha < 1)


@pytest.mark.parametrize("entries", [{}, {"adversarial_eps": 1.0}, {"micro_batch": 8}])
def test_the_term_is_added_once_whatever_a_step_consists_of(entries):
    """Methods combine: the gradient differs by lambda sigma_1 u_1 v_1^T of an exact SVD."""
    plain, regularized = (
        train.build(recipe(snr_lambda=strength, snr_kwargs={"exact": True}, **entries))
        for strength in (0.0, 0.1)
    )
    images, labels = batch(plain)
    _, without = gradients(plain, images, labels)
    _, found = gradients(regularized, images, labels)
    for p, a, b in zip(plain.model.parameters(), found, without, strict=True):
        expected = torch.zeros_like(p)
        if p.ndim > 1:
            u, s, vh = torch.linalg.svd(p.detach().flatten(1).double(), full_matrices=False)
            expected = (0.1 * s[0] * torch.outer(u[:, 0], vh[0])).view_as(p).float()
        torch.testing.assert_close(a - b, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [8, 12, 32, 100])
def test_micro_batches_add_up_to_the_batch(micro_batch):
    """In a network without batch norm, also where the last part is smaller."""
    options = {"model": "test_vit", "model_kwargs": {}, "img_size": 32}
    whole = train.build(recipe(**options))
    images, labels = batch(whole)
    loss, expected = gradients(whole, images, labels)
    parts = train.build(recipe(**options, micro_batch=micro_batch))
    sizes = []
    parts.model.register_forward_pre_hook(lambda _, x: sizes.append(len(x[0])))
    found_loss, found = gradients(parts, images, labels)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert max(sizes) == min(micro_batch, 32)
    assert sum(sizes) == 32


def test_test_images_come_in_micro_batches_too():
    training = train.build(recipe(micro_batch=8))
    images, _ = next(iter(training.loaders.test))
    assert len(images) == 8


def test_loss_and_accuracy_of_an_epoch_are_those_of_its_batches():
    training = train.build(recipe(adversarial_eps=1.0, micro_batch=10))
    images, labels = batch(training)
    parts = list(zip(images.split(10), labels.split(10), strict=True))
    losses = [by_hand(training.model, *part, 1.0, 0.5)[0] * len(part[1]) for part in parts]
    correct = [(training.model(x).argmax(1) == y).sum() for x, y in parts]
    training = training._replace(loaders=training.loaders._replace(train=[(images, labels)]))
    with tqdm(disable=True) as bar:
        row = train.train_epoch(training, 0, bar)
    assert row["train_loss"] == pytest.approx(sum(losses) / 32, rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(100 * float(sum(correct)) / 32)


@pytest.mark.parametrize("micro_batch", [None, 8])
@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_a_skipped_step_leaves_no_trace(micro_batch, eps):
    """The loss of a late part is not finite: earlier parts have been backpropagated by then."""
    entries = {"adversarial_eps": eps, "micro_batch": micro_batch, "skip_nonfinite": True}
    training = train.build(recipe(**entries, subset=64, snr_lambda=0.01))
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    images, labels = batch(training)
    bad = images.clone()
    bad[-1] = torch.nan
    training = training._replace(
        loaders=training.loaders._replace(train=[(bad, labels), (images, labels)]),
        scheduler=None,
    )
    with tqdm(disable=True) as bar:
        train.train_epoch(training, 0, bar)
    twin = train.build(recipe(**entries, subset=64, snr_lambda=0.01))
    for key, value in twin.model.state_dict().items():
        assert torch.equal(value, before[key])
    good = twin.loaders._replace(train=[(images, labels)])
    twin = twin._replace(loaders=good, scheduler=None)
    with tqdm(disable=True) as bar:
        train.train_epoch(twin, 0, bar)
    for name, value in twin.model.state_dict().items():
        torch.testing.assert_close(training.model.state_dict()[name], value, msg=name)


def test_a_loss_that_is_not_finite_stops_a_run_as_diverged():
    training = train.build(recipe(adversarial_eps=1.0))
    images, labels = batch(training)
    images[3] = torch.inf
    training = training._replace(loaders=training.loaders._replace(train=[(images, labels)]))
    with (
        tqdm(disable=True) as bar,
        pytest.raises(train.DivergenceError, match="the loss is nan at step 0"),
    ):
        train.train_epoch(training, 0, bar)


def test_images_with_tiny_gradients_are_perturbed_by_no_more_than_asked():
    """Squares of such gradients are zero in float32."""

    class Sure(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, images):
            self.seen.append(images.detach())
            first = images.flatten(1).mean(1) * 1e-24
            return torch.stack([first, -first], 1)

    model, images = Sure(), torch.randn(5, 3, 4, 4)
    images[0] = 0
    parts = train.objective(model, images, torch.zeros(5).long(), recipe(adversarial_eps=2))
    next(parts)[0].backward()
    next(parts)
    moved = (model.seen[1] - model.seen[0]).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved, torch.full((5,), 2.0))


def test_options_of_the_optimizer_reach_it():
    training = train.build(recipe(opt_kwargs={"nesterov": False}))
    assert training.optimizer.param_groups[0]["nesterov"] is False


def test_channels_last_trains_the_same():
    one, other = (train.build(recipe(channels_last=last)) for last in (False, True))
    assert other.model.features[0].conv.weight.is_contiguous(memory_format=torch.channels_last)
    images, labels = batch(one)
    loss, expected = gradients(one, images, labels)
    found_loss, found = gradients(other, images, labels)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
