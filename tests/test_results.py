"""The results that the repository shows are those of the runs' files beside them."""

import json
from pathlib import Path

import pytest

from recipes import bench, compare, frontier
from recipes.comparison_report import learning_rates_table, markdown, results_table
from recipes.experiment import read_experiment
from recipes.settings import DEFAULT, ECONOMICAL

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "results" / "compare"
BENCH = ROOT / "recipes" / "results" / "bench"
FRONTIER = ROOT / "recipes" / "results" / "frontier"


@pytest.mark.parametrize(
    ("name", "data"), [("digits", "digits"), ("cifar10_reduced", "folder:data/cifar10-jpeg")]
)
def test_tables_are_those_of_the_files(name, data):
    experiment = read_experiment(name)
    for entries in experiment.cells.values():
        entries["data"] = data
    comparison = compare.finished(experiment, FOLDER / name)
    assert len(comparison.results) == len(experiment.cells) * len(experiment.seeds)
    assert len(comparison.selected) == len(experiment.cells) * len(experiment.learning_rates)
    results = markdown(results_table(comparison))
    text = (FOLDER / name / "table.md").read_text()
    assert results in text
    assert markdown(learning_rates_table(comparison)) in text
    assert results in (FOLDER / "compare.md").read_text()
    page = (FOLDER / name / "report.html").read_text()
    for line in results.splitlines()[2:]:
        for cell in line.strip("| ").split(" | "):
            assert cell.replace("*", "") in page


def test_the_accuracies_in_the_readme_are_those_of_the_table():
    rows = [
        line.split("|")[3:7]
        for line in (FOLDER / "cifar10_reduced" / "table.md").read_text().splitlines()
        if "best test accuracy" in line
    ]
    assert len(rows) == 2
    for row in rows:
        assert "|".join(row) in (ROOT / "README.md").read_text()


def test_every_file_of_a_run_is_used():
    for name in ("digits", "cifar10_reduced"):
        files = {path.stem for path in FOLDER.glob(f"{name}/*/*.json")}
        experiment = read_experiment(name)
        cells = {"-".join(cell) for cell in experiment.cells}
        assert len(files) == len(cells) * (len(experiment.seeds) + len(experiment.learning_rates))


def test_tables_of_cost_and_accuracy_are_those_of_the_files():
    measured = json.loads((BENCH / "bench.json").read_text())
    assert (BENCH / "bench.md").read_text() == bench.table(measured)
    results = {path.stem: json.loads(path.read_text()) for path in frontier.trainings(FRONTIER)}
    assert len(results) == 8
    assert (FRONTIER / "frontier.md").read_text() == frontier.table(results)


def rows(start):
    """The cells of the table in the README whose header starts so, by the first."""
    _, _, text = (ROOT / "README.md").read_text().partition(start)
    lines = (start + text.partition("\n\n")[0]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def test_the_costs_in_the_readme_are_those_of_the_files():
    measured = json.loads((BENCH / "bench.json").read_text())
    table = rows("| | resnet18 | resnet50 |")
    models = table.pop("")
    assert models == list(measured["own_work"])
    table.pop("---")
    for title in bench.TRAININGS:
        found = [measured["in_training"][model][title] for model in models]
        assert table.pop(f"in a training ({title}), with products a step: default") == [
            "{ratio:.1f} ({products:.1f})".format(**entry) if entry else "diverged"
            for entry in found
        ]
    for row, cells in table.items():
        what, _, name = row.rpartition(": ")
        name = {
            "torch's spectral_norm": "spectral_norm",
            "penalty in the loss, one power iteration": "penalty, power iteration",
            "penalty in the loss, exact SVD (timed once)": "penalty, exact SVD",
            "default": DEFAULT,
        }.get(name, name)
        part, key, form = {
            "term over weight decay": ("own_work", "ratio", "{:.2f}"),
            "added to a whole step, %": (
                "whole_step",
                "ratio",
                "{:+.0f}" if "SVD" in name else "{:+.1f}",
            ),
            "share of what the penalty (one power iteration) adds to a step": (
                "short_step",
                "share",
                "{:.2f}",
            ),
            "memory kept, % of the parameters": ("memory", "state_percent", "{:.2f}"),
        }[what]
        assert cells == [form.format(measured[part][model][name][key]) for model in models]
    assert {f"term over weight decay: {name}" for name in (ECONOMICAL, DEFAULT)} < table.keys()


def test_the_errors_in_the_readme_are_those_of_the_files():
    table = rows("| training (data, optimizer, learning rate) |")
    *settings, _ = next(iter(table.values()))
    assert {ECONOMICAL, DEFAULT} < set(settings)
    trainings = {key: cells for key, cells in table.items() if ", " in key and "(" not in key}
    assert len(trainings) == 8
    for training, cells in trainings.items():
        path = FRONTIER / f"{training.replace(', ', '-')}.json"
        result = json.loads(path.read_text())
        expected = [
            f"{result['watching'][name]['p95']:.2g} / {result['driving'][name]['p95']:.2g}"
            for name in settings
        ]
        assert cells == [*expected, f"{result['driving'][DEFAULT]['products']:.2f}"]
