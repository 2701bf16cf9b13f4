"""How projections of attention are split, against what reaches the output of real modules."""

import pytest
import torch
from timm.layers import attention, bottleneck_attn, halo_attn, lambda_layer, mlp
from timm.models import (
    davit,
    gcvit,
    hiera,
    levit,
    maxxvit,
    mobilevit,
    nest,
    pvt_v2,
    shvit,
    tiny_vit,
    vision_transformer,
)
from torch import nn

from snr_hooks import SNROptimizer, discover

# Module, input and name of the projection; all have a second one with a column per head.
MODULES = {
    "timm Attention": (lambda: attention.Attention(8, num_heads=2), (1, 3, 8), "qkv"),
    "beit-like, kv": (lambda: pvt_v2.Attention(8, num_heads=2), (1, 4, 8), "kv"),
    "MaxViT, heads first": (
        lambda: maxxvit.AttentionCl(8, dim_head=4, head_first=True),
        (1, 3, 8),
        "qkv",
    ),
    "MaxViT, heads second": (
        lambda: maxxvit.AttentionCl(8, dim_head=4, head_first=False),
        (1, 3, 8),
        "qkv",
    ),
    "CoAtNet": (lambda: maxxvit.Attention2d(8, dim_head=4), (1, 8, 2, 2), "qkv"),
    "LeViT": (
        lambda: levit.Attention(8, 4, num_heads=2, resolution=2, act_layer=nn.Identity),
        (1, 4, 8),
        "qkv.linear",
    ),
    "TinyViT": (lambda: tiny_vit.Attention(8, 4, num_heads=2, resolution=(2, 2)), (1, 4, 8), "qkv"),
    "NesT": (lambda: nest.Attention(8, num_heads=2), (1, 2, 3, 8), "qkv"),
    "DaViT, groups": (lambda: davit.ChannelAttentionV2(8, num_heads=2), (1, 4, 8), "qkv"),
    "GCViT, global": (
        lambda: gcvit.WindowAttentionGlobal(8, 2, (2, 2), use_global=True),
        (1, 4, 8),
        "qkv",
    ),
    "Hiera, heads": (lambda: hiera.MaskUnitAttention(8, 8, heads=2), (1, 4, 8), "qkv"),
}


class Wrapped(nn.Module):
    """An attention module, called with what it wants beside its input."""

    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, x):
        if isinstance(self.attn, pvt_v2.Attention):
            return self.attn(x, (2, 2))
        if isinstance(self.attn, gcvit.WindowAttentionGlobal):
            return self.attn(x, torch.ones_like(x))
        return self.attn(x)


def heads_of(view, n_heads):
    """The head that each block of a view belongs to."""
    blocks = torch.arange(view.shape(torch.empty(0))[0])
    heads_first = len(view.blocks) == 2 or view.part is not None
    if heads_first:
        return blocks // (len(blocks) // n_heads)
    return blocks % n_heads


@pytest.mark.parametrize("name", MODULES)
def test_a_head_reaches_the_output_through_its_columns_alone(name):
    make, shape, projection = MODULES[name]
    torch.manual_seed(0)
    model = Wrapped(make()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) / 2)
    x = torch.randn(shape, dtype=torch.float64)
    found = discover(model, choose="heads").targets
    rows = [t for t in found if t.parameter_name == f"attn.{projection}.weight"]
    [columns] = [t for t in found if t.name.startswith("attn.proj") and t.view.rows == (0,)]
    with torch.no_grad():
        columns.view._arranged(columns.parameter)[0].zero_()  # the first of two heads
        before = model(x)
        for target in rows:
            blocks = target.view._arranged(target.parameter).flatten(0, len(target.view.blocks) - 1)
            for block, head in zip(blocks, heads_of(target.view, 2), strict=True):
                kept = block.clone()
                block += torch.randn(block.shape, dtype=torch.float64)
                change = (model(x) - before).abs().max()
                block.copy_(kept)
                assert (change < 1e-12) == (head == 0), (target.name, head)


@pytest.mark.parametrize("view", ["blocks", "heads"])
@pytest.mark.parametrize("gate_last", [False, True])
def test_a_gated_mlp_is_two_maps(gate_last, view):
    module = mlp.GluMlp(4, 12, gate_last=gate_last, act_layer=nn.Sigmoid)
    [first, _] = discover(nn.Sequential(module), choose=view).targets
    assert first.view.shape(first.parameter) == (2, 6, 4)
    assert ("value gate" if gate_last else "gate value") in first.view.describe(first.parameter)


class GroupedQueries(nn.Module):
    """Four heads of queries, two of keys and values, width 3."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.num_kv_heads = 4, 2
        self.qkv = nn.Linear(5, 8 * 3)
        self.k_proj = nn.Linear(5, 2 * 3)
        self.q_proj = nn.Linear(5, 4 * 3)
        self.v_proj = nn.Linear(5, 2 * 3)
        self.out_proj = nn.Linear(4 * 3, 5)


def test_grouped_queries():
    model = GroupedQueries()
    shapes = {t.name: t.view.shape(t.parameter) for t in discover(model, choose="heads").targets}
    assert shapes == {
        "qkv.weight": (8, 3, 5),
        "k_proj.weight": (2, 3, 5),
        "q_proj.weight": (4, 3, 5),
        "v_proj.weight": (2, 3, 5),
        "out_proj.weight": (4, 5, 3),
    }
    shapes = {t.name: t.view.shape(t.parameter) for t in discover(model, choose="blocks").targets}
    assert shapes == {
        "qkv.weight[q]": (1, 12, 5),
        "qkv.weight[k]": (1, 6, 5),
        "qkv.weight[v]": (1, 6, 5),
        "k_proj.weight": (6, 5),
        "q_proj.weight": (12, 5),
        "v_proj.weight": (6, 5),
        "out_proj.weight": (5, 12),
    }


def test_parts_of_one_weight_are_hooked_together_and_removed_together():
    model = GroupedQueries()
    opt = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, choose="blocks")
    assert set(opt.spectral_norms()) >= {"qkv.weight[q]", "qkv.weight[k]", "qkv.weight[v]"}
    (model.qkv.weight * 0).sum().backward()
    assert model.qkv.weight.grad.abs().sum(1).gt(0).all()
    opt.step()
    opt.remove()
    assert not model.qkv.weight._post_accumulate_grad_hooks


def test_a_number_of_heads_that_is_given_and_does_not_divide_is_refused():
    model = nn.Sequential()
    model.qkv = nn.Linear(4, 12)
    [target] = discover(model, choose={"qkv.*": {"view": "heads", "heads": 2}}).targets
    assert target.view.shape(target.parameter) == (6, 2, 4)
    with pytest.raises(ValueError, match="5/5/5 heads for 12 rows of a 12 x 4 weight"):
        discover(model, choose={"qkv.*": {"view": "heads", "heads": 5}})


def test_heads_that_are_given_and_cannot_be_used_are_refused():
    model = nn.Sequential(nn.Linear(16, 48))
    with pytest.raises(ValueError, match=r"'0.weight', which is not known to be one"):
        discover(model, choose={"0.weight": {"view": "heads", "heads": 4}})
    model = GroupedQueries()
    with pytest.raises(ValueError, match="4/3/3 heads for 24 rows"):
        discover(model, choose={"qkv.*": {"view": "heads", "kv_heads": 3}})


@pytest.mark.parametrize("name", ["to_qkv", "to_kv", "query", "key", "value", "to_out"])
def test_common_names_of_projections(name):
    model = nn.Module()
    model.num_heads = 2
    model.add_module(name, nn.Linear(12, 12))
    [target] = discover(model, choose="heads").targets
    assert target.view.shape(target.parameter)[0] == {"to_qkv": 6, "to_kv": 4}.get(name, 2)


def test_given_numbers_of_heads_win_over_those_of_the_module():
    model = nn.Module()
    model.num_heads = 2
    model.qkv = nn.Linear(4, 24)
    choose = {"qkv.*": {"view": "heads", "heads": 4, "kv_heads": 2}}
    [target] = discover(model, choose=choose).targets
    assert target.view.shape(target.parameter) == (8, 3, 4)


def test_numbers_of_a_module_that_do_not_fit_leave_the_matrix():
    model = nn.Module()
    model.num_heads = 3
    model.qkv = nn.Linear(4, 16)
    [target] = discover(model, choose="heads").targets
    assert target.view.shape(target.parameter) == (16, 4)


def rows_of(owner, name, choose="blocks"):
    """The rows of a projection that each of its maps has, by name."""
    places = torch.arange(owner.get_submodule(name).weight.shape[0])
    found = {}
    for target in discover(owner, choose=choose).targets:
        if target.parameter_name == f"{name}.weight":
            weight = places.view(-1, 1).expand(-1, target.parameter[0].numel())
            weight = weight.reshape(target.parameter.shape)
            blocks = target.view.matrix(weight)[:, :, 0].tolist()
            found |= {target.part or target.view.unit: blocks}
    return found


def span(start, size):
    return list(range(start, start + size))


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (
            lambda: bottleneck_attn.BottleneckAttn(32, feat_size=(2, 2), num_heads=2, qk_ratio=0.5),
            "qkv",
            {"[q]": [span(0, 16)], "[k]": [span(16, 16)], "[v]": [span(32, 32)]},
        ),
        (
            lambda: lambda_layer.LambdaLayer(8, feat_size=(2, 2), num_heads=2, dim_head=3),
            "qkv",
            {"[q]": [span(0, 6)], "[k]": [span(6, 3)], "[v]": [span(9, 4)]},
        ),
        (
            lambda: mobilevit.LinearSelfAttention(6),
            "qkv_proj",
            {"[q]": [[0]], "[k]": [span(1, 6)], "[v]": [span(7, 6)]},
        ),
        (
            lambda: shvit.SHSA(8, 2, 4, nn.BatchNorm2d, nn.Identity),
            "qkv.c",
            {"[q]": [span(0, 2)], "[k]": [span(2, 2)], "[v]": [span(4, 4)]},
        ),
        (
            lambda: halo_attn.HaloAttn(32, num_heads=2, block_size=2, halo_size=1, qk_ratio=0.5),
            "kv",
            {"[k]": [span(0, 8) + span(24, 8)], "[v]": [span(8, 16) + span(32, 16)]},
        ),
        (
            lambda: vision_transformer.ParallelScalingBlock(4, 2, mlp_ratio=2.0),
            "in_proj",
            {
                "[mlp]": [span(0, 8)],
                "[q]": [span(8, 4)],
                "[k]": [span(12, 4)],
                "[v]": [span(16, 4)],
            },
        ),
        (lambda: pvt_v2.Attention(4, num_heads=2), "kv", {"maps (k v)": [span(0, 4), span(4, 4)]}),
    ],
)
def test_rows_of_unequal_parts(make, name, expected):
    assert rows_of(make(), name) == expected


def test_heads_of_unequal_parts():
    block = vision_transformer.ParallelScalingBlock(4, 2, mlp_ratio=2.0)
    assert rows_of(block, "in_proj", "heads") == {
        "[mlp]": [span(0, 8)],
        "[q]": [[8, 9], [10, 11]],
        "[k]": [[12, 13], [14, 15]],
        "[v]": [[16, 17], [18, 19]],
    }
