"""The measurements of views at toy size, against what they should count and compute."""

import json

import pytest
import timm
import torch
from PIL import Image
from test_operators import operator

from recipes import bench, views
from snr_hooks import discover

# The measurements together; what they are made of is tested by itself.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bench, "MODELS", {"test_resnet": (32, 4, {}), "test_vit": (32, 4, {"img_size": 32})}
        )
        patch.setattr(views, "MODELS", bench.MODELS)
        patch.setattr(views, "COST_MODELS", ("test_resnet", "test_vit"))
        patch.setattr(views, "NORM_MODEL", "test_resnet")
        patch.setattr(views, "NORM_SIZE", 12)
        patch.setattr(views, "SEEDS", (0, 1))
        toy = {"epochs": 1, "subset": 64, "sched_kwargs": {"warmup_epochs": 0}}
        patch.setattr(views, "ADAMW_ENTRIES", views.ADAMW_ENTRIES | toy)
        patch.setattr(views, "ADAMW", ((False, 0.0), (False, 0.1), (True, 1.0)))
        line = [
            "--output",
            str(folder),
            "--repetitions",
            "2",
            "--models",
            "test_vit",
            "test_resnet",
        ]
        views.main(line)
        for part in ("coverage", "cost", "norms", "decoupled"):
            patch.setattr(views, part, None)  # what is measured is not measured again
        views.main(line)
    return folder


def read(output, part):
    return json.loads((output / f"{part}.json").read_text())["result"]


def test_coverage_counts_what_discover_finds(output):
    counts = read(output, "coverage")
    assert counts["models"] == 2
    models = [timm.create_model(name) for name in ("test_vit", "test_resnet")]
    for choose in (None, "vit"):
        found = [discover(model, choose=choose) for model in models]
        tensors = sum(len({t.parameter_name for t in f.targets}) + len(f.skipped) for f in found)
        entries = sum(p.numel() for m in models for p in m.parameters() if p.ndim > 1)
        kinds = counts[str(choose)].values()
        assert sum(kind["tensors"] for kind in kinds) == tensors
        assert sum(kind["parameters"] for kind in kinds) == entries
    heads = counts["vit"]["N heads of N, each"]
    assert heads == {"models": 1, "tensors": 12, "parameters": heads["parameters"]}


def test_norms_are_those_of_the_operator_and_of_the_matrix(output):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet")
    rows = {row["name"]: row for row in read(output, "norms")}
    layer = model.conv1[0]
    row = rows["conv1.0"]
    assert row["input"] == [12, 12]
    exact = torch.linalg.svdvals(operator(layer, layer.weight.detach(), (12, 12)))[0]
    assert row["operator"] == pytest.approx(exact.item(), rel=1e-3)
    matrix = torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)
    assert row["matrix"] == pytest.approx(matrix.item(), rel=1e-5)


def test_costs_have_every_choice_next_to_the_default(output):
    for rows in read(output, "cost").values():
        assert list(rows) == list(views.CHOICES)
        assert rows["matrix (default)"]["to_default"]["ratio"] == 1
        assert rows["blocks"]["to_decay"]["ratio"] > 0


def test_runs_under_adamw_are_what_they_say(output):
    runs = read(output, "decoupled")
    assert [(r["decoupled"], r["lambda"], r["seed"]) for r in runs] == [
        (decoupled, strength, seed)
        for seed in (0, 1)
        for decoupled, strength in ((False, 0.0), (False, 0.1), (True, 1.0))
    ]
    assert all(0 <= run["accuracy"] <= 100 and len(run["sigma"]) == 16 for run in runs)
    assert sum(runs[1]["sigma"].values()) < sum(runs[0]["sigma"].values())


def test_the_page_and_the_picture(output):
    page = (output / "views.md").read_text()
    assert page.count("\n## ") == 4
    with Image.open(output / "norms.png") as picture:
        assert picture.size[0] > 500
