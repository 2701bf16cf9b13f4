"""On real timm models in float32, as users train them: the exact term, an untouched loss."""

import copy
import math

import pytest
import timm
import torch
from _oracles import exact_terms
from timm.models.mlp_mixer import MlpMixer

from snr_hooks import SNROptimizer, discover
from snr_hooks.estimators import SubspaceIteration

LAMBDA = 0.01


def create(name, **options):
    """Build a timm model for 64-pixel images; options shrink it, its kinds of layer stay."""
    cfg = timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        options.setdefault("img_size", 64)
    return timm.create_model(name, num_classes=10, **options)


def mixer(**options):
    return MlpMixer(num_classes=10, img_size=64, num_blocks=2, embed_dim=64, **options)


MODELS = {
    "resnet10t": {},
    "resnetv2_18": {},
    "vgg11": {"mlp_ratio": 0.01},
    "densenet121": {"growth_rate": 8, "block_config": (2, 2, 2, 2)},
    "test_efficientnet": {},
    "mobilenetv3_small_050": {},
    "mnasnet_small": {},
    "ghostnet_050": {},
    "lcnet_035": {},
    "regnetx_002": {},
    "repvgg_a0": {},
    "hgnetv2_b0": {},
    "test_nfnet": {},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
    "vit_tiny_patch16_224": {"depth": 2},
    "deit_tiny_distilled_patch16_224": {"depth": 2},
    "beit_base_patch16_224": {"embed_dim": 96, "depth": 2, "num_heads": 3},
    "cait_xxs24_224": {"depth": 2},
    "xcit_nano_12_p16_224": {"depth": 2},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 24,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 4, 8),
        "window_size": 2,
    },
    "pvt_v2_b0": {},
    "levit_128s": {},
    "mlp_mixer": {},
    "test_maxvit": {},
    "test_coatnet": {},
    "mobilevitv2_050": {},
    "edgenext_xx_small": {},
    "fastvit_t8": {},
    "efficientformerv2_s0": {},
    "test_mambaout": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1)},
}


LARGE = {"resnet10t", "resnetv2_18", "vgg11"}  # half of the time of all


@pytest.fixture(
    params=[pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in MODELS]
)
def model(request):
    torch.manual_seed(0)
    name, options = request.param, MODELS[request.param]
    return mixer() if name == "mlp_mixer" else create(name, **options)


def one_backward(model):
    """Return the loss and the gradients of one training step, dropout and all."""
    torch.manual_seed(1)
    model.train()
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    output = model(images)
    output = output[0] if isinstance(output, tuple) else output
    # Small, so that rounding of large float32 gradients does not hide the term.
    loss = 1e-4 * torch.nn.functional.cross_entropy(output, labels)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_the_term_is_exact_and_the_loss_bitwise_the_same(model):
    bare, wrapped = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    opt = SNROptimizer(optimizer, wrapped, LAMBDA, exact=True)
    loss_without, without = one_backward(bare)
    loss_with, with_term = one_backward(wrapped)
    assert loss_with == loss_without
    terms = exact_terms(model, [target.name for target in opt.targets])
    for name, grad in without.items():
        if grad is None:
            assert with_term[name] is None
        elif name in terms:
            sigma, term = terms[name]
            difference = with_term[name].double() - grad.double()
            residual = (difference - LAMBDA * term).norm().item()
            assert residual <= 1e-4 * LAMBDA * sigma, name
        else:
            assert torch.equal(with_term[name], grad), name


def run_to_convergence(targets):
    """Iterate until a hundred more products change no sigma by one in 100,000."""
    estimator = SubspaceIteration(100, n_vectors=4, tolerance=math.inf, seed=0)
    before = torch.zeros(len(targets))
    while True:
        after = torch.tensor([term.sigma for term in estimator.advance(targets)])
        if (after - before <= 1e-5 * after).all():
            return after.tolist()
        before = after


def test_converged_iteration_is_within_a_thousandth(model):
    targets = discover(model).targets
    exact = exact_terms(model, [target.name for target in targets])
    for target, sigma in zip(targets, run_to_convergence(targets), strict=True):
        assert sigma == pytest.approx(exact[target.name][0], rel=1e-3), target.name
