"""The paper's experiment at toy size: the grid, its files, and every figure it reports."""

import json
import math
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_measures import exact_hessian
from tqdm import tqdm

from recipes import compare, train
from recipes.comparison import MEASURES, Comparison, Spread, best
from recipes.comparison_report import learning_rates_table, markdown, results_table
from recipes.experiment import FOLDER, Cell, read_experiment
from snr_hooks import SNROptimizer

TOY = """
common:
  data: folder:images
  img_size: 8
  subset: 60
  test_subset: 40
  transform_kwargs: {no_aug: true}
  model: vggnet_cifar
  model_kwargs: {stages: [[[3, 4]], [[3, 4]]]}
  snr_lambda: 0.0
  sched: multistep
  sched_kwargs: {decay_milestones: [2, 3], warmup_epochs: 0}
  epochs: 4
networks:
  tiny: {}
batches:
  "8": {batch_size: 8}
  "32": {batch_size: 32}
methods:
  vanilla: {}
  adversarial: {adversarial_eps: 1.0}
  decay+spectral: {weight_decay: 1.0e-3, snr_lambda: 0.05}
learning_rates: [0.03, 0.3]
validation: 0.25
seeds: [3, 4]
hessian_images: 30
"""


def toy(**changes):
    """Write a toy experiment, with some of its keys changed, and return its path."""
    content = yaml.safe_load(TOY)
    common = content["common"] | changes.pop("common", {})
    content |= {"common": common, **changes}
    Path("toy.yaml").write_text(yaml.safe_dump(content))
    return "toy.yaml"


def write_images(root):
    """Write four classes of noisy images; noise, so that no two pixels tie in max pooling."""
    rng = np.random.default_rng(0)
    for label in range(4):
        pattern = rng.uniform(90, 160, (8, 8, 3))
        for split, n in (("train", 15), ("test", 10)):
            folder = Path(root, "images", split, str(label))
            folder.mkdir(parents=True)
            for i in range(n):
                pixels = (pattern + rng.normal(0, 30, pattern.shape)).clip(0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in a folder that holds only the images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished toy experiment: its folder, and what the run returned."""
    folder = tmp_path_factory.mktemp("finished")
    path = folder / "toy.yaml"
    path.write_text(TOY.replace("folder:images", f"folder:{folder}/images"))
    write_images(folder)
    return folder, compare.compare(read_experiment(str(path)), folder)


def replayed(result):
    """Train the recipe of a run's file again and return what that leaves."""
    recipe = train.Recipe(**result["recipe"])
    training = train.build(recipe)
    with tqdm(disable=True) as bar:
        assert [row["epoch"] for row in train.train(training, bar)] == [0, 1, 2, 3]
    return training


def images_of(selection, n=None):
    """Return images and labels of a selection, one by one and not through its loader."""
    found = [selection[index] for index in range(len(selection))][:n]
    return torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])


# --- every figure against another computation ---


@pytest.mark.parametrize("method", ["adversarial", "decay+spectral"])
def test_every_measurement_of_a_run_is_that_of_another_computation(finished, method):
    folder, _ = finished
    result = json.loads((folder / "runs" / f"tiny-8-{method}-seed4.json").read_text())
    training = replayed(result)
    model = training.model.double().eval()
    train_images, train_labels = images_of(training.loaders.train_eval.dataset)
    test_images, test_labels = images_of(training.loaders.test.dataset)
    train_images, test_images = train_images.double(), test_images.double()

    # accuracy
    last = result["history"][-1]
    for images, labels, name in (
        (train_images, train_labels, "train_eval_accuracy"),
        (test_images, test_labels, "test_accuracy"),
    ):
        correct = float((model(images).argmax(1) == labels).double().mean())
        assert last[name] == pytest.approx(100 * correct)

    # sensitivity, by central differences at every pixel of a few images, and as a whole
    for images, labels, name in (
        (train_images, train_labels, "train"),
        (test_images, test_labels, "test"),
    ):
        norms = [
            finite_difference_norm(model, image, label)
            for image, label in zip(images, labels, strict=True)
        ]
        assert result["sensitivity"][name] == pytest.approx(np.mean(norms), rel=1e-4)

    # the Hessian, in memory
    few = [(train_images[:30], train_labels[:30])]
    values = torch.linalg.eigvalsh(exact_hessian(model, few, torch.nn.functional.cross_entropy))
    assert len(values) == sum(p.numel() for p in model.parameters()) == result["n_parameters"]
    assert result["hessian"]["value"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert result["hessian"]["n_images"] == 30
    assert result["hessian"]["residual"] < 1e-2

    # spectra, by an SVD that is not the project's
    for name, p in model.named_parameters():
        if p.ndim > 1:
            expected = np.linalg.svd(p.detach().flatten(1).numpy(), compute_uv=False)
            assert result["spectra"][name] == pytest.approx(expected.tolist(), rel=1e-4)


def finite_difference_norm(model, image, label, step=1e-5):
    steps = step * torch.eye(image.numel(), dtype=image.dtype).view(-1, *image.shape)
    with torch.no_grad():
        up, down = (
            torch.nn.functional.cross_entropy(
                model(image + sign * steps), label.repeat(len(steps)), reduction="none"
            )
            for sign in (1, -1)
        )
    return float(((up - down) / (2 * step)).norm())


def test_the_table_holds_mean_and_deviation_of_the_files(finished):
    folder, comparison = finished
    found = [
        json.loads((folder / "runs" / f"tiny-32-vanilla-seed{seed}.json").read_text())
        for seed in (3, 4)
    ]
    best_of = [max(row["test_accuracy"] for row in run["history"]) for run in found]
    assert best_of[0] != best_of[1]
    table = (folder / "table.md").read_text()
    cell = f"{sum(best_of) / 2:.2f} \u00b1 {abs(best_of[0] - best_of[1]) / math.sqrt(2):.2f}"
    row = next(line for line in table.splitlines() if line.startswith("| tiny, 32"))
    assert row.replace("*", "").split("|")[3].strip() == cell
    assert "(4 epochs, 4 steps)" in row  # 60 images, batches of 32: one step an epoch

    # the threshold: what all six runs of the row reach
    tops = [
        max(row["test_accuracy"] for row in json.loads(path.read_text())["history"])
        for path in (folder / "runs").glob("tiny-32-*.json")
    ]
    assert len(tops) == 6
    assert comparison.alpha("tiny", "32") == min(tops)
    gaps = [
        min(
            row["train_eval_accuracy"] - row["test_accuracy"]
            for row in run["history"]
            if row["test_accuracy"] >= min(tops)
        )
        for run in found
    ]
    row = table.splitlines()[table.splitlines().index(row) + 1]
    assert f"alpha = {min(tops):.2f}" in row
    cell = f"{statistics.mean(gaps):.2f} \u00b1 {statistics.stdev(gaps):.2f}"
    assert row.replace("*", "").split("|")[3].strip() == cell
    assert "12 of 12 runs finished, 0 of them diverged" in table


def test_the_learning_rate_is_the_best_on_the_held_out_part(finished):
    folder, comparison = finished
    for cell, chosen in comparison.chosen().items():
        found = {}
        for lr in (0.03, 0.3):
            path = folder / "selection" / f"{'-'.join(cell)}-lr{lr:g}.json"
            result = json.loads(path.read_text())
            assert result["n_train"] + result["n_test"] == 60  # no test image is touched
            assert "sensitivity" not in result
            found[lr] = max(row["test_accuracy"] for row in result["history"])
        assert found[chosen] == max(found.values())
        for seed in (3, 4):
            path = folder / "runs" / f"{'-'.join(cell)}-seed{seed}.json"
            recipe = json.loads(path.read_text())["recipe"]
            assert (recipe["lr"], recipe["validation"]) == (chosen, 0)


def test_methods_are_what_they_are_called(finished):
    folder, _ = finished
    result = json.loads((folder / "runs/tiny-8-decay+spectral-seed3.json").read_text())
    recipe = result["recipe"]
    assert (recipe["weight_decay"], recipe["snr_lambda"]) == (1e-3, 0.05)
    training = train.build(train.Recipe(**recipe))
    assert isinstance(training.optimizer, SNROptimizer)
    assert training.optimizer.param_groups[-1]["weight_decay"] == 1e-3
    lrs = [row["lr"] for row in result["history"]]
    # At the last step of each epoch; timm's scheduler drops one step before its milestone.
    assert lrs == pytest.approx([recipe["lr"] * f for f in (1, 0.1, 0.01, 0.01)])


# --- what it writes ---


def test_figures_show_something_and_the_report_needs_no_other_file(finished):
    folder, _ = finished
    names = ["accuracy", "gap", "sensitivity", "hessian", "spectra-tiny-8", "spectra-tiny-32"]
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 600
            assert np.asarray(picture.convert("L")).std() > 5
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    sources = re.findall(r"(?:src|href)='([^']*)'", page)
    assert all(source.startswith("data:") for source in sources)
    assert "tiny, 8, decay+spectral, seed 4" in page
    assert page.count("<b>") >= 2 * len(MEASURES)


def test_a_finished_experiment_is_only_read(finished, monkeypatch, capsys):
    folder, comparison = finished
    monkeypatch.setattr(compare, "trial", None)
    compare.main([str(folder / "toy.yaml"), "--output", str(folder)])
    assert (folder / "table.md").read_text().strip() in capsys.readouterr().out
    assert compare.finished(comparison.experiment, folder).results == comparison.results


# --- interruptions, divergence, bad input ---


def small(**changes):
    """Write an experiment of two methods and one batch size."""
    methods = {"vanilla": {}, "spectral": {"snr_lambda": 0.05}}
    changes = {"batches": {"8": {"batch_size": 8}}, "seeds": [0]} | changes
    return toy(methods=methods, **changes)


def without_time(results):
    return [{k: v for k, v in result.items() if k != "seconds"} for result in results]


def test_a_killed_experiment_loses_one_run_and_ends_the_same(monkeypatch):
    experiment = read_experiment(small(seeds=[0, 1]))
    whole = compare.compare(experiment, Path("whole"))
    started, trial = [], compare.trial

    def killed(run, hessian_images):
        started.append(run.name)
        if len(started) == 6:
            raise KeyboardInterrupt
        return trial(run, hessian_images)

    monkeypatch.setattr(compare, "trial", killed)
    with pytest.raises(SystemExit, match="interrupted; the same command continues"):
        compare.main(["toy.yaml", "--output", "killed"])
    assert not Path("killed/table.md").exists()
    compare.main(["toy.yaml", "--output", "killed", "--report"])
    table = Path("killed/table.md").read_text()
    assert "1 of 4 runs finished" in table
    assert table.count("not run") == table.count("(1 of 2 seeds)") == len(MEASURES)
    again = compare.compare(experiment, Path("killed"))
    assert len(started) - 1 == len(set(started)) == 4 + 4
    assert without_time(again.results) == without_time(whole.results)
    assert without_time(again.selected) == without_time(whole.selected)


def test_a_diverged_run_is_recorded_and_does_not_stop_the_grid():
    path = small(learning_rates=[0.1, 1e38])
    comparison = compare.compare(read_experiment(path), Path("out"))
    table = markdown(learning_rates_table(comparison))
    assert table.count("diverged") == 2
    assert set(comparison.chosen().values()) == {0.1}
    assert len(comparison.results) == 2
    result = json.loads(Path("out/selection/tiny-8-vanilla-lr1e+38.json").read_text())
    assert "the loss is" in result["diverged"]


def test_a_method_that_always_diverges_is_reported_as_such():
    path = small(learning_rates=[1e38])
    comparison = compare.compare(read_experiment(path), Path("out"))
    table = Path("out/table.md").read_text()
    assert "2 of 2 runs finished, 2 of them diverged" in table
    assert table.count("diverged (1 of 1)") == 2 * len(MEASURES)
    assert "**" not in markdown(results_table(comparison))  # nothing is best
    assert "diverged" in Path("out/report.html").read_text()


@pytest.mark.slow
def test_several_jobs_give_the_same_results():
    experiment = read_experiment(small())
    one = compare.compare(experiment, Path("one"))
    two = compare.compare(experiment, Path("two"), jobs=2)
    for a, b in zip(one.results, two.results, strict=True):
        assert a["history"][-1]["test_loss"] == pytest.approx(b["history"][-1]["test_loss"], 1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"networks": {"x": {"model": "vggnet_cifa"}}}, "unknown model 'vggnet_cifa'; nearest"),
        ({"networks": {"x": {"modle": "a"}}}, "unknown key in x of networks.*'modle'; nearest"),
        ({"methods": {"x": {"snr_lamda": 1}}}, "unknown key in x of methods.*nearest: snr_lambda"),
        ({"methods": {"x": {"opt": "sdg"}}}, "unknown optimizer 'sdg'"),
        ({"methods": {"x": {"lr": 0.1}}}, "expected no lr in x of methods.*learning_rates"),
        ({"methods": {"x": {"snr_kwargs": {"inclde": "a"}}}}, "refused snr_lambda.*inclde"),
        ({"methods": {"x": {"choose": "vitt"}}}, "refused snr_lambda, choose.*nearest: 'vit'"),
        ({"methods": {"a/b": {}}}, "expected letters, digits.*found 'a/b'"),
        ({"batches": {"x": {"batch_size": 61}}}, "subset to hold at least one batch of 61"),
        ({"batches": {"x": {"batch_size": 48}}}, "at least one batch of 48 .*found 45 images"),
        ({"batches": ["8"]}, "expected batches in .* to map names to entries"),
        ({"common": {"data": "digit"}}, "unknown data set 'digit'"),
        ({"common": {"data": "cifar10"}}, "expected cifar10 in the folder.*--download"),
        ({"seeds": []}, "expected toy.yaml to say seeds"),
        ({"seeds": [1, 1]}, "expected seeds in .* a list of values, each once"),
        ({"seeds": [1.5]}, "expected seeds in .* to be int and at least 0, found 1.5"),
        ({"learning_rates": 0.1}, "expected learning_rates in .* a list of values"),
        ({"learning_rates": ["fast"]}, "expected learning_rates in .* float.*found 'fast'"),
        ({"validation": 1.5}, r"expected validation to be in \[0, 1\), found 1.5"),
        ({"sedes": [1]}, "unknown key in toy.yaml 'sedes'; nearest: seeds"),
    ],
)
def test_a_bad_grid_fails_before_any_training(changes, message, monkeypatch):
    monkeypatch.setattr(compare, "trial", None)
    with pytest.raises(SystemExit, match=message):
        compare.main([toy(**changes), "--output", "out"])
    assert not list(Path("out").glob("*/*"))


def test_bad_command_lines(capsys):
    with pytest.raises(SystemExit, match="unknown experiment 'digit'; nearest: digits"):
        compare.main(["digit"])
    with pytest.raises(SystemExit, match="expected at least 1 job, found 0"):
        compare.main([toy(), "--jobs", "0"])
    Path("list.yaml").write_text("[1]")
    with pytest.raises(SystemExit, match=r"expected list\.yaml to map keys to values"):
        compare.main(["list.yaml"])


def test_files_that_are_damaged_or_of_another_experiment_are_refused(monkeypatch):
    monkeypatch.setattr(compare, "trial", lambda run, _: {"recipe": vars(run.recipe)})
    path = Path("out/selection/tiny-8-vanilla-lr0.03.json")
    path.parent.mkdir(parents=True)
    for text in ("", "{", "[]", '{"recipe": {}}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"found a damaged file.*remove it"):
            compare.main([toy(), "--output", "out"])
    recipe = vars(read_experiment(toy()).selection()[0].recipe)
    path.write_text(json.dumps({"recipe": {**recipe, "epochs": 5}, "seconds": 1}))
    with pytest.raises(SystemExit, match=r"another recipe .*epochs is 5 there and 4 here"):
        compare.main(["toy.yaml", "--output", "out"])


# --- parts ---


def test_the_data_of_an_experiment_can_be_named_on_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "compare", lambda experiment, *_: seen.append(experiment))
    compare.main([toy(), "--data", "folder:x", "--data-dir", "there", "--download"])
    for run in seen[0].selection():
        recipe = run.recipe
        assert (recipe.data, recipe.data_dir, recipe.download) == ("folder:x", "there", True)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_the_experiments_that_come_along(name):
    experiment = read_experiment(name)
    methods = {cell.method: entries for cell, entries in experiment.cells.items()}
    assert set(methods) == {"vanilla", "decay", "adversarial", "spectral"}
    for entries in experiment.cells.values():
        epochs = entries["epochs"]
        milestones = entries["sched_kwargs"]["decay_milestones"]
        assert milestones == [epochs // 2, epochs * 3 // 4]
    assert methods["vanilla"].get("weight_decay", 0) == methods["vanilla"]["snr_lambda"] == 0
    assert methods["decay"]["weight_decay"] == 5e-4
    assert methods["spectral"]["snr_lambda"] == 0.01
    assert methods["adversarial"]["adversarial_eps"] == 1


def test_the_best_is_what_is_printed_best():
    accuracy, gap = MEASURES[:2]
    spreads = [Spread(70.001, 1, 2, 0), Spread(70.004, 1, 2, 0), Spread(69, 1, 2, 0)]
    assert best(spreads, accuracy) == {0, 1}
    assert best(spreads, gap) == {2}
    assert best([Spread(90, 1, 2, 1), *spreads], accuracy) == {1, 2}  # a diverged seed: no prize
    assert best([Spread(math.nan, math.nan, 0, 0)], accuracy) == set()


def test_rates_at_the_end_of_the_range_have_a_star_and_ties_take_the_smaller_one():
    experiment = read_experiment(toy(learning_rates=[0.1, 0.2, 0.3]))
    cell = Cell("tiny", "8", "vanilla")

    def selected(*accuracies):
        return [
            {
                "cell": cell._asdict(),
                "recipe": {"lr": lr},
                "diverged": None,
                "history": [{"test_accuracy": accuracy}],
            }
            for lr, accuracy in zip((0.1, 0.2, 0.3), accuracies, strict=True)
        ]

    for accuracies, rate, words in (
        ((50, 60, 55), 0.2, "| 50.00 | **60.00** | 55.00 |"),
        ((50, 60, 65), 0.3, "| 50.00 | 60.00 | **65.00*** |"),
        ((50, 60, 60), 0.2, "| 50.00 | **60.00** | 60.00 |"),
    ):
        comparison = Comparison(experiment, selected(*accuracies), [])
        assert comparison.chosen() == {cell: rate}
        assert f"| tiny, 8, vanilla {words}" in markdown(learning_rates_table(comparison))
