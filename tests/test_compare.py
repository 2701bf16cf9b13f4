"""The paper's experiment at toy size: the grid, its files, and every figure it reports."""

import dataclasses
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import timm
import torch
import yaml
from matplotlib.axes import Axes
from PIL import Image
from test_measures import exact_hessian
from tqdm import tqdm

from recipes import compare, comparison_figures, train
from recipes.comparison import MEASURES, Comparison, Spread, best
from recipes.comparison_report import (
    learning_rates_table,
    markdown,
    results_table,
    runs_table,
    write_report,
)
from recipes.experiment import FOLDER, Cell, read_experiment
from recipes.measures import generalization_gap, hessian_eigenvalue
from recipes.recipe import RecipeError
from recipes.report import write_json
from snr_hooks import SNROptimizer

ROOT = Path(__file__).parent.parent
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
    Path("toy.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
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
def elsewhere(tmp_path, monkeypatch, unrendered):
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


def run_of(folder, cell, seed):
    """Read the file of a run, whatever learning rate was chosen."""
    (path,) = (folder / "runs").glob(f"{cell}-lr*-seed{seed}.json")
    return json.loads(path.read_text())


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
    result = run_of(folder, f"tiny-8-{method}", 4)
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
    found = [run_of(folder, "tiny-32-vanilla", seed) for seed in (3, 4)]
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
            path = folder / "selection" / f"{'-'.join(cell)}-lr{lr}.json"
            result = json.loads(path.read_text())
            assert result["n_train"] + result["n_test"] == 60  # no test image is touched
            assert "sensitivity" not in result
            found[lr] = max(row["test_accuracy"] for row in result["history"])
        assert found[chosen] == max(found.values())
        for seed in (3, 4):
            recipe = run_of(folder, "-".join(cell), seed)["recipe"]
            assert (recipe["lr"], recipe["validation"]) == (chosen, 0)


def test_methods_are_what_they_are_called(finished):
    folder, _ = finished
    result = run_of(folder, "tiny-8-decay+spectral", 3)
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

    def killed(*arguments):
        started.append(arguments[0].name)
        if len(started) == 6:
            raise KeyboardInterrupt
        return trial(*arguments)

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


@pytest.mark.parametrize(("lr", "epochs"), [(1e12, 1), (1e12, 2), (1e6, 3)])
def test_weights_that_explode_without_a_loss_that_is_not_finite_have_diverged(lr, epochs):
    path = small(learning_rates=[lr], common={"epochs": epochs, "sched": "none"})
    comparison = compare.compare(read_experiment(path), Path("out"))
    for run in comparison.results:
        assert re.search("loss is (nan|inf|[0-9.e+]+) ", run["diverged"])
        assert "another --output" not in run["diverged"]  # no advice that does not fit


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
        ({"seeds": [True]}, "expected seeds in .* to be int and at least 0, found True"),
        ({"seeds": [-1]}, "expected seeds in .* to be int and at least 0, found -1"),
        ({"seeds": [float("inf")]}, "expected seeds in .* to be int and at least 0, found inf"),
        ({"seeds": [1, 1.0]}, "expected each of seeds in toy.yaml once"),
        ({"learning_rates": [0.1, "1e-1"]}, "expected each of learning_rates in toy.yaml once"),
        ({"learning_rates": [-0.1]}, "float and at least 0, found -0.1"),
        ({"hessian_images": -5}, "int and at least 0, found -5"),
        ({"batches": {8: {}, "8": {}}}, "expected each name in batches in toy.yaml once"),
        ({"learning_rates": [0, 0.1]}, "expected learning_rates in .* to be positive, found 0"),
        ({"common": {"subset": 61}}, "expected subset to be at most 60, found 61"),
        ({"common": {"test_subset": 41}}, "expected test_subset to be at most 40, found 41"),
        (
            {"networks": {"x": {"model_kwargs": {"width": -1}}}},
            "x, 8, vanilla: refused model.*expected width to be positive, found -1",
        ),
        ({"seeds": [1, 1]}, "expected each of seeds in toy.yaml once"),
        ({"seeds": [1.5]}, "expected seeds in .* to be int and at least 0, found 1.5"),
        ({"learning_rates": 0.1}, "expected learning_rates in .* to be a list, found 0.1"),
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


def test_a_name_given_twice_is_refused():
    Path("toy.yaml").write_text(TOY.replace("vanilla: {}", "vanilla: {}\n  vanilla: {}"))
    with pytest.raises(SystemExit, match="'vanilla' is given more than once"):
        compare.main(["toy.yaml"])


def test_bad_command_lines(capsys):
    with pytest.raises(SystemExit, match="unknown experiment 'digit'; nearest: digits"):
        compare.main(["digit"])
    with pytest.raises(SystemExit, match="expected at least 1 job, found 0"):
        compare.main([toy(), "--jobs", "0"])
    Path("list.yaml").write_text("[1]")
    with pytest.raises(SystemExit, match=r"expected list\.yaml to map keys to values"):
        compare.main(["list.yaml"])


def test_files_that_are_damaged_or_of_another_experiment_are_refused(monkeypatch):
    monkeypatch.setattr(compare, "trial", None)
    path = Path("out/selection/tiny-8-vanilla-lr0.03.json")
    path.parent.mkdir(parents=True)
    for text in ("", "{", "[]", '{"recipe": {}}'):
        path.write_text(text)
        with pytest.raises(SystemExit, match=r"found a damaged file.*remove it"):
            compare.main([toy(), "--output", "out"])


OTHER = {
    "model": "nin_cifar",
    "data": "digits",
    "batch_size": 9,
    "lr": 0.5,
    "seed": 7,
    "validation": 0.3,
    "epochs": 5,
    "model_kwargs": {},
    "adversarial_eps": 0.1,
    "snr_lambda": 0.3,
}


@pytest.mark.parametrize("entry", [*OTHER, "data_dir", "download", "workers", "cell"])
def test_a_result_of_another_recipe_is_refused_unless_only_the_place_differs(entry):
    experiment = read_experiment(toy())
    run = experiment.selection()[0]
    path = Path("out/selection", f"{run.name}.json")
    path.parent.mkdir(parents=True)
    saved = dataclasses.asdict(run.recipe)
    cell = run.cell._asdict()
    if entry == "cell":
        cell["method"] = "decay+spectral"
    else:
        saved[entry] = OTHER.get(entry, 3)
    rest = {"n_train": 45, "n_test": 15, "seconds": 1, "diverged": "yes", "history": []}
    path.write_text(json.dumps({"recipe": saved, "cell": cell, **rest}))
    if entry in ("data_dir", "download", "workers"):
        assert len(compare.finished(experiment, Path("out")).selected) == 1
        return
    words = "it is of tiny, 8, decay+spectral there" if entry == "cell" else f"{entry} is"
    with pytest.raises(RecipeError, match=f"belongs to another recipe .{re.escape(words)}"):
        compare.finished(experiment, Path("out"))


def test_a_file_is_written_as_a_whole_or_not_at_all(monkeypatch):
    path = Path("run.json")
    write_json(path, {"a": 1})

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}


def test_the_order_and_the_seeds_of_the_runs():
    experiment = read_experiment(toy())
    assert {run.recipe.seed for run in experiment.selection()} == {3}
    assert {run.recipe.validation for run in experiment.selection()} == {0.25}
    runs = experiment.runs(dict.fromkeys(experiment.cells, 0.3))
    assert [run.recipe.seed for run in runs] == [3] * 6 + [4] * 6  # every cell, then more seeds
    assert {run.recipe.validation for run in runs} == {0.0}


def test_results_with_another_number_of_images_for_the_hessian_are_refused(finished):
    folder, _ = finished
    text = (folder / "toy.yaml").read_text().replace("hessian_images: 30", "hessian_images: 29")
    Path("other.yaml").write_text(text)
    with pytest.raises(SystemExit, match="hessian_images is 30 there and 29 here"):
        compare.main(["other.yaml", "--output", str(folder), "--report"])


def test_more_learning_rates_leave_the_old_results_alone():
    compare.compare(read_experiment(small(learning_rates=[1e-9])), Path("out"))
    again = compare.compare(read_experiment(small(learning_rates=[1e-9, 0.3])), Path("out"))
    assert 0.3 in again.chosen().values()
    assert len(again.results) == 2
    assert len(list(Path("out/runs").iterdir())) > 2


def test_a_single_seed_has_no_deviation():
    comparison = compare.compare(read_experiment(small(learning_rates=[0.1])), Path("out"))
    table = markdown(results_table(comparison))
    assert "nan" not in table
    assert "\u00b1" not in table


def test_a_method_that_is_missing_in_the_first_panel_is_in_the_legend(finished, monkeypatch):
    _, comparison = finished
    kept = [run for run in comparison.results if list(run["cell"].values())[1:] != ["8", "vanilla"]]
    seen = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.legend",
        lambda self, handles, labels, **_: seen.append(set(labels)),
    )
    comparison_figures.draw_all(dataclasses.replace(comparison, results=kept), Path())
    methods = {"vanilla", "adversarial", "decay+spectral"}
    assert seen[:3] == [methods] * 3  # the one for the Hessian has names on its axis
    assert methods - {"vanilla"} in seen[3:]


def test_attention_has_a_hessian_too():
    model = timm.create_model("test_vit", num_classes=4, img_size=32)
    found = hessian_eigenvalue(model, [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))])
    assert found.value > 0


def test_what_cannot_be_measured_fails_before_any_training(monkeypatch):
    def unsupported(*_, **__):
        raise RecipeError("no second derivative")

    monkeypatch.setattr(compare, "trial", None)
    monkeypatch.setattr(compare, "hessian_eigenvalue", unsupported)
    with pytest.raises(SystemExit, match="tiny, 8, vanilla: no second derivative"):
        compare.main([toy()])


def test_outputs_that_cannot_be_written_or_read():
    Path("file").write_text("x")
    for output in ("file", "file/x"):
        with pytest.raises(SystemExit, match="expected to write to the folder file"):
            compare.main([toy(), "--output", output])
    with pytest.raises(SystemExit, match="expected finished trainings in the folder nowhere"):
        compare.main([toy(), "--output", "nowhere", "--report"])


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them():
    """Killed so that it cannot tell them."""
    line = ["-m", "recipes.compare", toy(common={"epochs": 1000}), "--jobs", "2"]
    process = subprocess.Popen([sys.executable, *line], env={**os.environ, "PYTHONPATH": str(ROOT)})
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = wait_for(lambda: len(found := children.read_text().split()) >= 3 and found)
    process.kill()
    process.wait()
    wait_for(lambda: not any(is_running(pid) for pid in pids))


def wait_for(condition, seconds=120):
    for _ in range(10 * seconds):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("waited for too long")


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
    assert best(spreads, accuracy, 2) == {0, 1}
    assert best(spreads, gap, 2) == {2}
    assert best([Spread(90, 1, 2, 1), *spreads], accuracy, 2) == {1, 2}  # diverged: no prize
    assert best([Spread(90, 1, 1, 0), *spreads], accuracy, 2) == {1, 2}  # a seed is missing
    assert best([Spread(math.nan, math.nan, 0, 0)], accuracy, 2) == set()


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
        ((65, 60, 50), 0.1, "| **65.00*** | 60.00 | 50.00 |"),
        ((50, 60, 55), 0.2, "| 50.00 | **60.00** | 55.00 |"),
        ((50, 60, 65), 0.3, "| 50.00 | 60.00 | **65.00*** |"),
        ((50, 60, 60), 0.2, "| 50.00 | **60.00** | 60.00 |"),
    ):
        comparison = Comparison(experiment, selected(*accuracies), [])
        assert comparison.chosen() == {cell: rate}
        assert f"| tiny, 8, vanilla {words}" in markdown(learning_rates_table(comparison))
        backwards = Comparison(experiment, selected(*accuracies)[::-1], [])
        assert backwards.chosen() == {cell: rate}
    part = Comparison(experiment, selected(50, 60, 50)[:2], [])
    assert part.chosen() == {}  # not before all are tried
    assert "| tiny, 8, vanilla | 50.00 | 60.00 | not run |" in markdown(learning_rates_table(part))
    alone = dataclasses.replace(experiment, learning_rates=[0.1])
    table = learning_rates_table(Comparison(alone, selected(50, 60, 50)[:1], []))
    assert "**50.00** |" in markdown(table)


def by_hand(**changes):
    """Return a comparison of two methods, one batch size and two seeds with made-up results."""
    experiment = read_experiment(small(seeds=[0, 1]))
    results = []
    for seed in (0, 1):
        for number, (cell, entries) in enumerate(experiment.cells.items()):
            recipe = dataclasses.asdict(train.Recipe(**entries, seed=seed))
            up = 10.0 * number + seed
            history = [
                {"test_accuracy": 40 + up, "train_eval_accuracy": 41 + up, "test_loss": 1.0},
                {"test_accuracy": 60 + up, "train_eval_accuracy": 75 + up, "test_loss": 1.0},
            ]
            result = {
                "cell": cell._asdict(),
                "recipe": recipe,
                "diverged": None,
                "history": history,
                "n_train": 1,
                "n_steps": 9,
                "n_parameters": 5,
                "sensitivity": {"train": 0.1 + up, "test": 0.2 + up},
                "hessian": {"value": 3.0 + up, "residual": 1e-3, "n_products": 11},
                "spectra": {"a": [2.0 + up, 1.5], "b": [1.0, 0.5]},
                "seconds": 1.0,
                "machine": "<b>&",
            }
            results.append(result | changes)
    return Comparison(experiment, [], results)


def test_every_row_of_the_table():
    lines = markdown(results_table(by_hand())).splitlines()[2:]
    found = [line.replace(" \u00b1 ", "~").strip("| ").split(" | ") for line in lines]
    assert found == [
        ["tiny, 8 (4 epochs, 9 steps)", "best test accuracy (%)", "60.50~0.71", "**70.50~0.71**"],
        ["gap at alpha = 60.00 % (points)", "**15.00~0.00**", "**15.00~0.00**"],
        ["sensitivity, test", "**0.700~0.707**", "10.700~0.707"],
        ["sensitivity, train", "**0.600~0.707**", "10.600~0.707"],
        ["largest Hessian eigenvalue", "**3.5~0.7**", "13.5~0.7"],
        ["largest sigma_1", "**2.50~0.71**", "12.50~0.71"],
    ]


def test_the_table_of_runs_and_what_is_escaped_on_the_page():
    comparison = by_hand()
    comparison = dataclasses.replace(
        comparison, experiment=dataclasses.replace(comparison.experiment, name="a&<i>")
    )
    write_report(comparison, Path())
    page = Path("report.html").read_text()
    assert "&lt;b&gt;&amp;" in page
    assert "<b>&" not in page
    assert "compared: a&amp;&lt;i&gt;<" in page
    row = [cell.words for cell in runs_table(comparison)[1]]
    run = comparison.results[0]
    gap = generalization_gap(run["history"], 60)
    assert row[4:9] == ["60.00", f"{gap:.2f}", "3.00", "1.0e-03", "11"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_known_is_reported_as_such(value):
    comparison = by_hand(sensitivity={"train": value, "test": value})
    comparison.results[0]["sensitivity"] = {"train": 1.0, "test": 1.0}
    write_report(comparison, Path())
    lines = [line for line in Path("table.md").read_text().splitlines() if "sensitivity," in line]
    assert [line.count("unknown") for line in lines] == [2, 2]


def test_figures_draw_what_they_say():
    comparison = by_hand()
    drawn = {}
    for name in ("accuracy", "gap", "sensitivity", "hessian"):
        figure, axis = plt.subplots()
        getattr(comparison_figures, f"_{name}")(axis, comparison, "tiny", "8")
        drawn[name] = [
            (line.get_color(), line.get_linestyle(), np.asarray(line.get_ydata()).tolist())
            for line in axis.get_lines()
        ]
        plt.close(figure)
    # the means of both seeds
    assert drawn["accuracy"] == [
        ("C0", "-", [40.5, 60.5]),
        ("C0", "--", [41.5, 75.5]),
        ("C1", "-", [50.5, 70.5]),
        ("C1", "--", [51.5, 85.5]),
    ]
    gaps = drawn["gap"][0][2]
    assert (gaps[0], gaps[-1]) == (1, 15)
    assert drawn["sensitivity"] == [
        ("C0", "None", [0.2, 1.2]),
        ("C0", "None", [0.1, 1.1]),
        ("C1", "None", [10.2, 11.2]),
        ("C1", "None", [10.1, 11.1]),
    ]
    assert [y for _, _, y in drawn["hessian"]] == [[3, 4], [3.5], [13, 14], [13.5]]


def test_spectra_are_means_over_seeds(monkeypatch):
    seen = []
    plot = Axes.plot

    def watching(self, x, y, *arguments, **options):
        seen.append((self.get_title(), np.asarray(y).tolist()))
        return plot(self, x, y, *arguments, **options)

    monkeypatch.setattr(Axes, "plot", watching)
    comparison_figures._spectra(Path("x.png"), by_hand(), "tiny", "8")
    assert [y for _, y in seen] == [[2.5, 1.5], [12.5, 1.5], [1, 0.5], [1, 0.5]]
