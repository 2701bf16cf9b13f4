"""The paper's networks for small images, registered with timm: ``create_model('vggnet_cifar')``.

All three have batch norm, end in a global average and so take images of any size, such as the
32 pixels of CIFAR and the 96 of STL-10. There are no pretrained weights.
"""

from collections.abc import Sequence
from typing import Any

from timm.layers import ClassifierHead, ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from torch import Tensor, nn

VGG16 = [[(3, 64)] * 2, [(3, 128)] * 2, [(3, 256)] * 3, [(3, 512)] * 3, [(3, 512)] * 3]
"""Kernel size and channels of each convolution, stage by stage: configuration D."""

NIN = [
    [(5, 192), (1, 160), (1, 96)],
    [(5, 192), (1, 192), (1, 192)],
    [(3, 192), (1, 192)],
]
"""The same of the CIFAR-10 network that the authors of Network in Network published."""

CIFAR = {
    "url": "",
    "num_classes": 10,
    "input_size": (3, 32, 32),
    "pool_size": None,
    "crop_pct": 1.0,
    "interpolation": "bilinear",
    "mean": (0.4914, 0.4822, 0.4465),  # of the training images of CIFAR-10
    "std": (0.2470, 0.2435, 0.2616),
}

PLAIN = CIFAR | {"first_conv": "features.0.conv", "classifier": "head.fc"}

default_cfgs = generate_default_cfgs(
    {
        "vggnet_cifar": PLAIN,
        "nin_cifar": PLAIN,
        "densenet40_12_bc": CIFAR | {"first_conv": "features.conv0", "classifier": "classifier"},
    }
)


class PlainNet(nn.Module):
    """Convolutions, each with batch norm and ReLU, and a linear layer on their global average.

    Args:
        stages: Kernel size and channels of the convolutions; between stages, max pooling
            halves the image.
        pool_size: Kernel size of that pooling.
        width: Multiplies the channels of every convolution.
        num_classes: Outputs; 0 for the pooled features.
        in_chans: Channels of the images.
        global_pool: As in timm.
        drop_rate: Dropout before the linear layer.

    Raises:
        ValueError: The width is not positive.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[tuple[int, int]]],
        pool_size: int,
        width: float = 1.0,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not width > 0:
            raise ValueError(f"expected width to be positive, found {width}")
        self.num_classes = num_classes
        self.feature_info: list[dict[str, Any]] = []
        modules: list[nn.Module] = []
        channels = in_chans
        for number, stage in enumerate(stages):
            if number > 0:
                modules.append(nn.MaxPool2d(pool_size, stride=2, padding=(pool_size - 1) // 2))
            for kernel_size, out_channels in stage:
                wider = max(1, round(out_channels * width))
                modules.append(ConvNormAct(channels, wider, kernel_size))
                channels = wider
            info = {"num_chs": channels, "reduction": 2**number}
            self.feature_info.append(info | {"module": f"features.{len(modules) - 1}"})
        self.features = nn.Sequential(*modules)
        self.num_features = self.head_hidden_size = channels
        self.head = ClassifierHead(channels, num_classes, global_pool, drop_rate)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def get_classifier(self) -> nn.Module:
        """Return the linear layer."""
        return self.head.fc  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the linear layer, as timm's models do."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (n, in_chans, height, width) to (n, num_features, height', width')."""
        return self.features(x)  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features to logits (n, num_classes), or to pooled features."""
        return self.head(x, pre_logits=pre_logits)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        return self.forward_head(self.forward_features(x))


class SmallDenseNet(DenseNet):  # type: ignore[misc]
    """timm's DenseNet-BC with the stem for small images: a single 3 x 3 convolution, no pooling.

    Args:
        in_chans: Channels of the images.
        kwargs: As for timm's DenseNet.
    """

    def __init__(self, in_chans: int = 3, **kwargs: Any) -> None:
        super().__init__(in_chans=in_chans, **kwargs)
        channels = self.features.conv0.out_channels
        self.features.conv0 = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        del self.features.norm0, self.features.pool0
        self.feature_info[0]["module"] = "features.conv0"
        names = [name for name, _ in self.features.named_children()]
        for number, info in enumerate(self.feature_info):
            info["reduction"] = 2 ** max(0, number - 1)
        modules = [info["module"].removeprefix("features.") for info in self.feature_info]
        self.feature_ends = [names.index(module) for module in modules]


def _build(
    cls: type[nn.Module], variant: str, pretrained: bool, n_features: int, kwargs: Any
) -> nn.Module:
    features = {"flatten_sequential": True, "out_indices": tuple(range(n_features))}
    return build_model_with_cfg(cls, variant, pretrained, feature_cfg=features, **kwargs)  # type: ignore[no-any-return]


@register_model  # type: ignore[untyped-decorator]
def vggnet_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build VGG-16 with batch norm for small images.

    The 13 convolutions of configuration D (Simonyan & Zisserman 2015, arXiv 1409.1556, table
    1) with batch norm; global average and one linear layer in place of the last pooling and
    the three fully connected layers, which are made for 224 pixels.

    Args:
        pretrained: Refused, as there are no weights.
        kwargs: Of PlainNet; ``width=0.25`` for a quarter of the channels.

    Returns:
        The model.
    """
    options: dict[str, Any] = {"stages": VGG16, "pool_size": 2} | kwargs
    return _build(PlainNet, "vggnet_cifar", pretrained, len(options["stages"]), options)


@register_model  # type: ignore[untyped-decorator]
def nin_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build Network in Network with batch norm for small images.

    Three perceptron convolutions (Lin et al. 2014, arXiv 1312.4400) with batch norm in place
    of dropout. The last 1 x 1 convolution acts on the average in place of before it, which is
    the same map, but without a ReLU on the logits.

    Args:
        pretrained: Refused, as there are no weights.
        kwargs: Of PlainNet.

    Returns:
        The model.
    """
    options: dict[str, Any] = {"stages": NIN, "pool_size": 3} | kwargs
    return _build(PlainNet, "nin_cifar", pretrained, len(options["stages"]), options)


@register_model  # type: ignore[untyped-decorator]
def densenet40_12_bc(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build DenseNet-BC of depth 40 with growth rate 12 for small images.

    Three blocks of (depth - 4) / 6 layers with bottlenecks, compression 0.5 between them and 2
    * growth channels in front (Huang et al. 2017, arXiv 1608.06993).

    Args:
        pretrained: Refused, as there are no weights.
        kwargs: Of timm's DenseNet.

    Returns:
        The model.
    """
    options: dict[str, Any] = {"growth_rate": 12, "block_config": (6, 6, 6)} | kwargs
    n_features = 1 + len(options["block_config"])
    return _build(SmallDenseNet, "densenet40_12_bc", pretrained, n_features, options)
