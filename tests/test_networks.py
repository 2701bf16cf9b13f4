"""The paper's networks: shapes and sizes against the papers they come from."""

import pytest
import timm
import torch
import torchvision

import recipes.networks  # noqa: F401  registers them
from snr_hooks import discover

NAMES = ["vggnet_cifar", "nin_cifar", "densenet40_12_bc"]


def create(name, **kwargs):
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]


def n_parameters(model):
    return sum(p.numel() for p in model.parameters())


def test_vgg_has_the_convolutions_of_configuration_d():
    with torch.device("meta"):
        theirs = torchvision.models.vgg16()
    shapes = [conv.weight.shape for conv in convolutions(create("vggnet_cifar"))]
    assert shapes == [conv.weight.shape for conv in convolutions(theirs)]
    # 138 million in the paper's table 2, of which the three linear layers are the rest.
    linear = 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    biases = sum(shape[0] for shape in shapes)
    assert round((sum(shape.numel() for shape in shapes) + biases + linear) / 1e6) == 138


def test_nin_has_the_size_that_is_published():
    """966,986 parameters with biases and without batch norm: 0.97 million, as cited for it."""
    model = create("nin_cifar")
    biases = sum(conv.out_channels for conv in convolutions(model))
    norms = 2 * biases
    assert n_parameters(model) - norms + biases == 966_986
    sizes = [conv.kernel_size[0] for conv in convolutions(model)]
    assert sizes == [5, 1, 1, 5, 1, 1, 3, 1]


@pytest.mark.parametrize(
    ("depth", "growth", "millions"), [(100, 12, 0.8), (250, 24, 15.3), (190, 40, 25.6)]
)
def test_densenets_of_its_kind_have_the_sizes_of_the_papers_table(depth, growth, millions):
    layers = ((depth - 4) // 6,) * 3
    model = create("densenet40_12_bc", growth_rate=growth, block_config=layers)
    assert round(n_parameters(model) / 1e6, 1) == millions


def test_densenet_has_depth_40_and_growth_12():
    model = create("densenet40_12_bc")
    grown = [conv for conv in convolutions(model) if conv.out_channels == 12]
    assert len(grown) == 18
    assert len(convolutions(model)) + 1 == 40  # and the linear layer
    assert model.num_features == 132


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [32, 96])
def test_images_of_both_sizes_and_every_class_count(name, size):
    model = create(name, num_classes=100, in_chans=1)
    images = torch.zeros(2, 1, size, size, device="meta")
    assert model(images).shape == (2, 100)
    last = {"vggnet_cifar": 16, "nin_cifar": 4, "densenet40_12_bc": 4}[name]
    assert model.forward_features(images).shape[2:] == (size // last, size // last)
    model.reset_classifier(7)
    assert model(images).shape == (2, 7)
    model.reset_classifier(0)
    assert model(images).shape == (2, model.num_features)


@pytest.mark.parametrize("name", NAMES)
def test_features_have_the_shapes_that_they_are_said_to_have(name):
    model = create(name, features_only=True)
    outputs = model(torch.zeros(2, 3, 32, 32, device="meta"))
    expected = zip(model.feature_info.channels(), model.feature_info.reduction(), strict=True)
    assert [(2, c, 32 // r, 32 // r) for c, r in expected] == [o.shape for o in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_what_timm_says_of_them(name):
    model = create(name)
    config = model.pretrained_cfg
    assert config["input_size"] == (3, 32, 32)
    modules = dict(model.named_modules())
    assert modules[config["first_conv"]] is convolutions(model)[0]
    assert modules[config["classifier"]] is model.get_classifier()
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model(name, pretrained=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_convolution_and_the_classifier_are_regularized(name):
    model = timm.create_model(name)
    n_weights = len(convolutions(model)) + 1
    assert len(discover(model).targets) == n_weights


@pytest.mark.parametrize("name", ["vggnet_cifar", "nin_cifar"])
def test_every_convolution_is_normalized_and_rectified(name):
    model = timm.create_model(name)
    n = len(convolutions(model))
    assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) == n
    assert sum(isinstance(m, torch.nn.ReLU) for m in model.modules()) == n
    assert float(model.forward_features(torch.randn(4, 3, 32, 32)).detach().min()) == 0


@pytest.mark.parametrize("name", NAMES)
def test_convolutions_start_as_kaiming_says(name):
    """With the fan-out in VGG's way for plain networks, the fan-in for DenseNet (torchvision)."""
    for conv in convolutions(timm.create_model(name)):
        weight = conv.weight.detach()
        rows = weight[0] if name == "densenet40_12_bc" else weight[:, 0]
        expected = (2 / rows.numel()) ** 0.5
        assert float(weight.std()) == pytest.approx(expected, rel=5 / weight.numel() ** 0.5)


def test_a_narrower_vgg():
    model = create("vggnet_cifar", width=0.25)
    assert [conv.out_channels for conv in convolutions(model)][:3] == [16, 16, 32]
    stages = [[(3, 64)], [(3, 128), (3, 128)]]
    assert len(convolutions(create("vggnet_cifar", stages=stages))) == 3
