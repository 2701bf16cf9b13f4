"""Discovery on timm's and torchvision's models: nothing missed, nothing wrongly included."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from snr_hooks import discover
from snr_hooks.blocks import BlockView

# Parameters with two or more dimensions that are no linear maps, by the last part of the name.
NOT_MATRICES = {
    "pos_embed", "pos_embed_0", "pos_embed_1", "pos_embed1", "pos_embed2", "pos_embed3",
    "pos_embed_x", "pos_embed_y", "pos_embed_win", "pos_embed_window", "pos_emb", "patch_pos",
    "pixel_pos", "position_embedding_table", "cls_token", "cls_token_0", "cls_token_1",
    "cls_token1", "cls_token2", "cls_token3", "cls_token4", "class_token", "dist_token",
    "reg_token", "latent", "pos_embedding", "gamma", "layer_scale", "alpha", "beta", "gain",
    "temperature", "logit_scale", "freqs", "relative_position_bias_table", "attention_biases",
    "rel_pos_h", "rel_pos_w", "height_rel", "width_rel", "w_g", "height", "width",
}  # fmt: skip
MAPS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
STANDARDIZED = {"StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"}


def check(model):
    """Compare with an independent walk over the modules."""
    found = discover(model)
    targets = {target.name for target in found.targets}
    skipped = dict(found.skipped)
    assert not targets & skipped.keys()
    assert all(skipped.values())
    seen = set()
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module).__name__
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if parameter.ndim < 2:
                assert name not in targets | skipped.keys()
                continue
            assert name in targets or name in skipped, name
            if attribute in NOT_MATRICES:
                assert name in skipped, name
            elif isinstance(module, MAPS) and attribute == "weight":
                if kind in STANDARDIZED:
                    assert "standardizes" in skipped[name]
                elif parameter.numel() == 0:
                    assert skipped[name] == "empty"
                elif not parameter.requires_grad:
                    assert "frozen" in skipped[name]
                elif id(parameter) in seen:
                    assert "the same parameter as" in skipped[name]
                else:
                    assert name in targets, name
                seen.add(id(parameter))
            else:
                # What is left must be a known map of another kind, or it was overlooked.
                known = {"CondConv2d", "LSTM", "MultiheadAttention"}
                assert kind in known, f"{kind}.{attribute} of {name}"
                assert name in skipped, name


def check_family(model, family):
    """Every weight is a target as what it is, or no linear map, or has no gradient of its own."""
    found = discover(model, choose=family)
    targets = {target.parameter_name for target in found.targets}
    skipped = dict(found.skipped)
    assert not targets & skipped.keys()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.ndim < 2 or name in targets:
            continue
        attribute, reason = name.rpartition(".")[2], skipped[name]
        assert (
            (attribute in NOT_MATRICES and "is not the weight of a Linear" in reason)
            or "the same parameter as" in reason
            or reason == "empty"
            or "frozen" in reason
        ), (name, reason)
    # Blocks of a weight tile it: none is left out, none is twice.
    sizes = {}
    for target in found.targets:
        if isinstance(target.view, BlockView):
            b, m, n = target.view.shape(target.parameter)
            sizes.setdefault(target.parameter_name, [target.parameter.numel()]).append(b * m * n)
    for name, (whole, *parts) in sizes.items():
        assert sum(parts) == whole, name


def on_meta(name):
    with torch.device("meta"):
        return timm.create_model(name)


def one_per_family():
    return [timm.list_models(module=module)[0] for module in timm.list_modules()]


@pytest.mark.parametrize("name", one_per_family())
def test_one_model_of_each_timm_family(name):
    model = on_meta(name)
    check(model)
    check_family(model, "vit")
    check_family(model, "mobile")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the models' constructors, thousands of them
@pytest.mark.parametrize("initial", sorted({name[0] for name in timm.list_models()}))
def test_every_timm_model(initial):
    names = timm.list_models(f"{initial}*")
    for name in names:
        model = on_meta(name)
        check(model)
        check_family(model, "vit")
        check_family(model, "mobile")


LARGE = {"regnet_x_16gf", "regnet_x_32gf", "regnet_y_16gf", "regnet_y_32gf", "regnet_y_128gf"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LARGE else ())
        for name in torchvision.models.list_models(module=torchvision.models)
    ],
)
def test_every_torchvision_classification_model(name):
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # regnet reads tensor values while it is built, which meta tensors do not have.
    device = "cpu" if name.startswith("regnet") else "meta"
    with torch.device(device):
        check(torchvision.models.get_model(name, **kwargs))
