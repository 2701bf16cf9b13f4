"""The frontier at toy size: errors are those of the setting that watched or drove."""

import json

import pytest
import torch
from torch import nn

from recipes import frontier, report, train
from recipes.recipe import Recipe, RecipeError
from recipes.settings import DEFAULT, ECONOMICAL, SETTINGS
from snr_hooks import SNROptimizer, discover


def test_a_watcher_sees_what_the_hooks_would_use():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 10))
    watcher = frontier.Watcher(model, {"n_vectors": 1})
    twin = SNROptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, n_vectors=1)
    for _ in range(4):
        watcher.follow(model)
        assert watcher.optimizer.spectral_norms() == twin.spectral_norms()
        watcher.advance()
        twin.zero_grad()
        (sum(p.sum() for p in model.parameters()) * 0).backward()
        twin.step()
        with torch.no_grad():
            for p in model.parameters():
                p += 0.01 * torch.randn_like(p)


def test_errors_are_relative_to_the_exact_norm():
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.diag(torch.tensor([4.0, 1.0])))
    [target] = discover(model).targets
    assert frontier.errors({target.name: 3.0}, model) == [pytest.approx(0.25)]
    assert frontier.errors({target.name: 5.0}, model) == [pytest.approx(0.25)]  # held too long
    assert frontier.summary([[0.0, 0.1], [0.2, 0.3]]) == pytest.approx(
        {"median": 15, "p95": 28.5, "worst": 30}
    )


def test_the_frontier_runs_goes_on_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(frontier, "TRAININGS", [("digits", "sgd", 0.1)])
    monkeypatch.setattr(frontier, "read", lambda name: {"data": name, "subset": 256, "epochs": 2})
    monkeypatch.setattr(frontier, "SETTINGS", {key: SETTINGS[key] for key in (ECONOMICAL, DEFAULT)})
    monkeypatch.setattr(frontier, "DRIVERS", [ECONOMICAL])
    costs = {key: {"ratio": 1.5 + i} for i, key in enumerate((ECONOMICAL, DEFAULT, "of old"))}
    (tmp_path / "bench.json").write_text(
        json.dumps({"own_work": {"resnet18": costs}, "exact_work": {"resnet18": 700.0}})
    )
    arguments = ["--output", str(tmp_path / "out"), "--bench", str(tmp_path / "bench.json")]
    frontier.main(arguments)
    path = tmp_path / "out" / "digits-sgd-0.1.json"
    result = json.loads(path.read_text())
    assert result["watching"].keys() == {ECONOMICAL, DEFAULT}
    assert result["driving"].keys() == {ECONOMICAL}
    assert len(result["loss"]["exact SVD"]) == 2
    assert "digits-sgd-0.1" in capsys.readouterr().out
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # Only what is missing is run again.
    del result["driving"][ECONOMICAL]
    path.write_text(json.dumps(result))
    monkeypatch.setattr(frontier, "watch", lambda *_: pytest.fail("ran again"))
    frontier.main(arguments)
    assert json.loads(path.read_text())["driving"].keys() == {ECONOMICAL}
    with pytest.raises(RecipeError, match=r"expected trainings of 3 epochs in .*, found 2: take"):
        frontier.main([*arguments, "--epochs", "3"])


def test_the_frontier_wants_a_training_that_there_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        frontier.main(["--only", "mnist", "--output", str(tmp_path / "out")])
    assert "expected --only to be a part of digits-sgd-0.01, " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_driving_records_what_its_own_term_is_made_with():
    recipe = Recipe(subset=128, epochs=1, batch_size=64)
    looks, products, losses = frontier.drive(recipe, {"n_vectors": 1, "n_power_iterations": 1})
    assert len(looks) == 1
    assert products == 2
    assert len(losses) == 1
    assert all(0 <= error < 1 for error in looks[0])


@pytest.fixture
def built(monkeypatch):
    """The options of SNROptimizer that trainings were built with."""
    options = []
    build = train.build

    def recording(recipe):
        options.append(recipe.snr_kwargs)
        return build(recipe)

    monkeypatch.setattr(train, "build", recording)
    return options


def test_watchers_see_the_weights_that_an_exact_term_trains(built, monkeypatch):
    advanced = []
    advance = frontier.Watcher.advance

    def recording(watcher):
        advanced.append(watcher)
        advance(watcher)

    def run(training, recipe, look):
        for step in range(6):
            look(step)
            with torch.no_grad():
                for p in training.model.parameters():
                    p.mul_(2)
        return []

    monkeypatch.setattr(frontier.Watcher, "advance", recording)
    monkeypatch.setattr(frontier, "run", run)
    recipe = Recipe(subset=64, epochs=1, batch_size=64)
    found, _ = frontier.watch(recipe, {"a": {"exact": True}})
    assert built == [{"exact": True}]
    assert len(advanced) == 6
    assert len(found["a"]) == 2  # every fifth
    assert max(map(max, found["a"])) < 1e-4


def test_driving_is_with_the_setting_that_is_named(built):
    frontier.drive(Recipe(subset=64, epochs=1, batch_size=64), {"n_vectors": 2})
    assert built == [{"n_vectors": 2}]


def test_the_picture_shows_the_95th_percentiles_of_both_modes(tmp_path, unrendered):
    results = {
        "t": {
            "watching": {"a": {"median": 1, "p95": 3, "worst": 9}},
            "driving": {"a": {"median": 2, "p95": 4, "worst": 8}},
        }
    }
    costs = {"own_work": {"m": {"a": {"ratio": 2.0}}}, "exact_work": {"m": 700.0}}
    unrendered.setattr(report.plt, "close", lambda _: None)
    report.draw_frontier(tmp_path / "frontier.png", results, costs)
    lines = report.plt.gcf().axes[0].lines
    assert [line.get_xydata().tolist() for line in lines[:2]] == [[[2, 3]], [[2, 4]]]
