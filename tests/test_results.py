"""The results that the repository shows are those of the runs' files beside them."""

from pathlib import Path

import pytest

from recipes import compare
from recipes.comparison_report import learning_rates_table, markdown, results_table
from recipes.experiment import read_experiment

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "recipes" / "results" / "compare"


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
