"""What is a target, what is skipped and why, and what is refused."""

import copy

import pytest
import torch
from _models import TiedEmbedding, build
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import prune

from snr_hooks import discover
from snr_hooks.discovery import linear_maps
from snr_hooks.modules import parameter_at
from snr_hooks.views import MatrixView


def names(found):
    return [target.name for target in found.targets]


def reasons(found):
    return dict(found.skipped)


EXPECTED = {
    "mlp": ["body.0.weight", "body.2.weight"],
    "convolutions": ["body.0.weight", "body.2.weight", "body.4.weight", "body.7.weight"],
    "one_and_three_dimensions": [f"body.{i}.weight" for i in (0, 1, 3, 4, 6)],
    "tied": ["body.0.weight"],
    "tied_embedding": ["head.weight"],
    "reused": ["body.weight"],
    "with_unused": ["body.0.weight", "body.2.weight", "unused.weight"],
    "with_frozen": ["body.2.weight"],
    "with_parametrizations": ["plain.weight"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_targets(name):
    assert names(discover(build(name))) == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_parameter_of_two_dimensions_is_listed_once_under_each_name(name):
    model = build(name)
    found = discover(model)
    listed = names(found) + list(reasons(found))
    matrices = [n for n, p in model.named_parameters(remove_duplicate=False) if p.ndim >= 2]
    assert sorted(listed) == sorted(matrices)


@pytest.mark.parametrize("name", EXPECTED)
def test_discovery_changes_nothing(name):
    model = build(name)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    discover(model)
    for n, p in model.state_dict().items():
        assert torch.equal(p, before[n])


def test_transposed_convolutions_have_their_outputs_in_dimension_1():
    views = {t.name: t.view for t in discover(build("one_and_three_dimensions")).targets}
    assert [view.out_axis for view in views.values()] == [0, 1, 0, 1, 0]
    assert views["body.1.weight"] == MatrixView(1)


class Exotic(nn.Module):
    """One parameter of every kind that is skipped."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.randn(3, 4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.lstm = nn.LSTM(4, 4)
        self.bilinear = nn.Bilinear(2, 3, 4)
        self.embedding = nn.Embedding(3, 4)
        self.complex = nn.Linear(2, 2, dtype=torch.complex64)
        self.integer = nn.Linear(2, 2, bias=False)
        self.integer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
        with pytest.warns(UserWarning, match="zero-element"):
            self.empty = nn.Linear(0, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.gained = nn.Linear(2, 2)
        self.gained.gain = nn.Parameter(torch.ones(2, 1))
        self.pruned = prune.identity(nn.Linear(2, 2), "weight")
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
        self.sparse = TiedEmbedding(sparse=True)
        self.norm = nn.LayerNorm((2, 2))
        self.good = nn.Linear(2, 2)


def test_reasons():
    found = discover(Exotic())
    assert names(found) == ["attention.out_proj.weight", "gained.weight", "good.weight"]
    expected = {
        "position": "Exotic.position is not the weight of a Linear or convolution",
        "attention.in_proj_weight": "MultiheadAttention.in_proj_weight is not the weight",
        "lstm.weight_ih_l0": "LSTM.weight_ih_l0 is not the weight of a Linear or convolution",
        "lstm.weight_hh_l0": "LSTM.weight_hh_l0 is not the weight of a Linear or convolution",
        "bilinear.weight": "Bilinear.weight is not the weight of a Linear or convolution",
        "embedding.weight": "Embedding.weight is not the weight of a Linear or convolution",
        "complex.weight": "dtype torch.complex64 is not real floating point",
        "integer.weight": "dtype torch.int8 is not real floating point",
        "empty.weight": "empty",
        "frozen.weight": "frozen (requires_grad is False)",
        "gained.gain": "Linear.gain is not 'weight'",
        "pruned.weight_orig": "Linear.weight_orig is not 'weight'",
        "parametrized.parametrizations.weight.original0": "parametrized",
        "parametrized.parametrizations.weight.original1": "parametrized",
        "sparse.embedding.weight": "the same parameter as 'sparse.head.weight'",
        "sparse.head.weight": "its gradient is sparse",
        "norm.weight": "LayerNorm.weight is not the weight of a Linear or convolution",
        "norm.bias": "LayerNorm.bias is not the weight of a Linear or convolution",
    }
    actual = reasons(found)
    assert set(actual) == set(expected)
    for name, reason in expected.items():
        assert actual[name].startswith(reason), name


def test_weights_that_forward_standardizes_are_skipped_with_their_subclasses():
    class ScaledStdConv2d(nn.Conv2d):
        """Stands for timm's class of that name."""

    class Derived(ScaledStdConv2d):
        pass

    found = discover(nn.Sequential(ScaledStdConv2d(1, 1, 1), Derived(1, 1, 1)))
    assert names(found) == []
    assert all("standardizes its weight" in reason for reason in reasons(found).values())


def test_subclasses_of_linear_and_convolution_are_targets():
    class Conv2dSame(nn.Conv2d):
        pass

    assert names(discover(nn.Sequential(Conv2dSame(1, 2, 3)))) == ["0.weight"]


def test_a_shared_module_is_a_target_once():
    layer = nn.Linear(2, 2)
    found = discover(nn.Sequential(layer, layer))
    assert names(found) == ["0.weight"]
    assert reasons(found) == {"1.weight": "the same parameter as '0.weight'"}


# --- include and exclude ---


def test_include_takes_a_pattern_several_or_a_predicate():
    model = build("convolutions")
    assert names(discover(model, include="body.[02].*")) == ["body.0.weight", "body.2.weight"]
    chosen = ["body.7.weight", "body.0.*"]
    assert names(discover(model, include=chosen)) == ["body.0.weight", "body.7.weight"]
    assert names(discover(model, include=iter(chosen))) == ["body.0.weight", "body.7.weight"]
    assert names(discover(model, include=lambda name: "4" in name)) == ["body.4.weight"]
    assert reasons(discover(model, include="body.7.*"))["body.0.weight"] == "not matched by include"


def test_exclude_wins_over_include():
    found = discover(build("mlp"), include="body.*", exclude="*.2.*")
    assert names(found) == ["body.0.weight"]
    assert reasons(found) == {"body.2.weight": "matched by exclude"}


def test_a_tied_weight_matches_by_any_of_its_names():
    model = build("tied")
    assert names(discover(model, include="body.2.*")) == ["body.0.weight"]
    assert names(discover(model, exclude="body.2.*")) == []


def test_an_include_pattern_without_a_match_names_the_nearest():
    with pytest.raises(ValueError, match=r"'body\.3\.weight' matches no parameter.*'body\.2\.w"):
        discover(build("mlp"), include=["body.0.*", "body.3.weight"])


def test_an_exclude_pattern_without_a_match_warns():
    with pytest.warns(UserWarning, match=r"exclude pattern 'haed\.\*' matches no parameter"):
        discover(build("mlp"), exclude="haed.*")


@pytest.mark.parametrize("bad", [3, [1, 2], ["body.*", None]])
def test_a_selection_of_another_type_is_refused(bad):
    with pytest.raises(TypeError, match="expected include to be None, a shell pattern"):
        discover(build("mlp"), include=bad)


# --- bad models ---


def test_not_a_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model, found list"):
        discover(list(build("mlp").parameters()))


def test_uninitialized_lazy_parameters_are_refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"lazy '1\.weight'.*run one forward pass"):
        discover(model)


def test_meta_models_are_discovered():
    with torch.device("meta"):
        assert names(discover(nn.Linear(10**5, 10**5))) == ["weight"]


def test_linear_maps_include_frozen_ones():
    assert [t.name for t in linear_maps(build("with_frozen"))] == EXPECTED["mlp"]


# --- printing ---


def test_the_table_shows_targets_views_and_reasons():
    text = str(discover(build("one_and_three_dimensions"), exclude="body.0.*"))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "body.1.weight 4 x 3 x 3 3 x 12 matrix, movedim(1, 0).flatten(1) sigma^2 / 2" in lines
    assert "body.0.weight skipped: matched by exclude" in lines
    assert lines[-1] == "4 regularized, 1 skipped"
    assert repr(discover(nn.ReLU())).endswith("0 regularized, 0 skipped")


def test_weights_that_are_no_leaves_are_skipped():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0]._parameters["weight"] = model[0].weight * 2  # as functional optimizers do
    found = discover(model)
    assert names(found) == ["1.weight"]
    assert reasons(found) == {"0.weight": "not a leaf: its gradient is not accumulated"}


def test_names_are_those_of_the_model_inside_its_wrappers():
    model = build("mlp")
    bare = discover(model)
    inside = copy.deepcopy(model)
    inside.body[2] = checkpoint_wrapper(inside.body[2])
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager"), inside):
        found = discover(wrapped, include="body.2.*")
        assert names(found) == ["body.2.weight"]
        assert reasons(found) == {"body.0.weight": "not matched by include"}
        assert names(discover(wrapped)) == names(bare)
        assert parameter_at(wrapped, "body.2.weight") is found.targets[0].parameter
        assert parameter_at(wrapped, "body.5.weight") is None
        assert parameter_at(wrapped, "body.2.other") is None


def test_a_pattern_with_the_prefix_of_a_wrapper_is_told_from_a_typo():
    with pytest.raises(ValueError, match=r"'module\.body\.\*' matches no.*of the bare model"):
        discover(nn.DataParallel(build("mlp")), include="module.body.*")


def test_a_class_that_is_only_called_like_a_wrapper_is_none():
    class DataParallel(nn.Linear):
        pass

    assert names(discover(nn.Sequential(DataParallel(2, 2)))) == ["0.weight"]


def test_both_lists_are_in_the_order_of_the_model():
    model = Exotic()
    order = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    found = discover(model)
    for listed in (names(found), list(reasons(found))):
        assert listed == sorted(listed, key=order.index)
