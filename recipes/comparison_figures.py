"""The figures of a comparison, as PNG files."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from recipes.comparison import Comparison, Result
from recipes.measures import generalization_gap
from recipes.report import evenly_spaced

MAX_LAYERS = 12
"""How many layers the picture of spectra shows at most."""


def draw_all(comparison: Comparison, folder: Path) -> dict[str, Path]:
    """Draw every figure.

    Args:
        comparison: What is shown.
        folder: Where the files go.

    Returns:
        The files by what they show.
    """
    figures = {
        "Accuracy over the epochs: test (solid, range over seeds shaded) and train (dashed)": (
            "accuracy.png",
            _accuracy,
        ),
        "Generalization gap: the smallest over epochs with a test accuracy of at least alpha": (
            "gap.png",
            _gap,
        ),
        "Sensitivity (full: test, open: train) against the generalization gap, by run": (
            "sensitivity.png",
            _sensitivity,
        ),
        "Largest eigenvalue of the Hessian of the training loss, by run": (
            "hessian.png",
            _hessian,
        ),
    }
    found = {}
    for title, (name, draw) in figures.items():
        rows = comparison.rows()
        size = (5.6 * len(rows), 4.2)
        figure, grid = plt.subplots(1, len(rows), figsize=size, squeeze=False, layout="constrained")
        for axis, (network, batch) in zip(grid.flat, rows, strict=True):
            draw(axis, comparison, network, batch)
            axis.set_title(f"{network}, batch {batch}")
            axis.grid(alpha=0.3)
        _set_legend(figure, grid.flat, "outside lower center")
        figure.suptitle(title)
        found[title] = folder / name
        figure.savefig(found[title], dpi=100)
        plt.close(figure)
    for network, batch in comparison.rows():
        title = f"Singular values of the weights, {network}, batch {batch}: mean over seeds"
        found[title] = folder / f"spectra-{network}-{batch}.png"
        _spectra(found[title], comparison, network, batch)
    return found


def _set_legend(figure: Figure, axes: Iterable[Axes], place: Any) -> None:
    """Explain every method that is in any panel."""
    found = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    if found:
        columns = 1 if "right" in place else len(found)
        figure.legend(found.values(), found.keys(), loc=place, ncols=columns)


def _by_method(
    comparison: Comparison, network: str, batch: str
) -> Iterator[tuple[str, str, list[Result]]]:
    """Yield method, color and runs of the cells of a row that have any."""
    for number, method in enumerate(comparison.methods()):
        if runs := comparison.runs(network, batch, method):
            yield method, f"C{number}", runs


def _column(runs: list[Result], key: str) -> Any:
    """Return an array (runs, epochs) of a metric."""
    return np.array([[row[key] for row in run["history"]] for run in runs])


def _accuracy(axis: Axes, comparison: Comparison, network: str, batch: str) -> None:
    for method, color, runs in _by_method(comparison, network, batch):
        test, train = _column(runs, "test_accuracy"), _column(runs, "train_eval_accuracy")
        epochs = np.arange(1, test.shape[1] + 1)
        axis.plot(epochs, test.mean(0), color=color, label=method)
        axis.plot(epochs, train.mean(0), color=color, linestyle="--", linewidth=1)
        axis.fill_between(epochs, test.min(0), test.max(0), color=color, alpha=0.15)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="accuracy (%)")
    axis.set_ylim(top=min(101, axis.get_ylim()[1]))


def _gap(axis: Axes, comparison: Comparison, network: str, batch: str) -> None:
    for method, color, runs in _by_method(comparison, network, batch):
        tops = _column(runs, "test_accuracy").max(1)
        alphas = np.linspace(tops.min() * 0.6, tops.min(), 100)  # reached by every seed
        gaps = [[generalization_gap(run["history"], a) for a in alphas] for run in runs]
        axis.plot(alphas, np.mean(gaps, axis=0), color=color, label=method)
        axis.fill_between(alphas, np.min(gaps, 0), np.max(gaps, 0), color=color, alpha=0.15)
    axis.axvline(comparison.alpha(network, batch), color="grey", linewidth=0.8, linestyle=":")
    axis.set(xlabel="test accuracy alpha (%); dotted: that of the table", ylabel="gap (points)")


def _sensitivity(axis: Axes, comparison: Comparison, network: str, batch: str) -> None:
    alpha = comparison.alpha(network, batch)
    for method, color, runs in _by_method(comparison, network, batch):
        gaps = [generalization_gap(run["history"], alpha) for run in runs]
        for split, fill in (("test", "full"), ("train", "none")):
            values = [run["sensitivity"][split] for run in runs]
            label = method if split == "test" else None
            axis.plot(gaps, values, "o", color=color, fillstyle=fill, label=label)
    axis.set(xlabel="gap (points)", ylabel="mean |gradient at the image|")
    _set_log_scale(axis)


def _hessian(axis: Axes, comparison: Comparison, network: str, batch: str) -> None:
    methods = comparison.methods()
    for method, color, runs in _by_method(comparison, network, batch):
        values = [run["hessian"]["value"] for run in runs]
        place = [methods.index(method)] * len(values)
        axis.plot(place, values, "o", color=color, fillstyle="none")
        axis.plot(place[:1], [np.mean(values)], "_", color=color, markersize=24)
    axis.set_xticks(range(len(methods)), methods)
    axis.set(xlim=(-0.5, len(methods) - 0.5), ylabel="largest eigenvalue (bar: mean)")
    _set_log_scale(axis)


def _set_log_scale(axis: Axes) -> None:
    """Make the vertical axis logarithmic if there is anything that it can show."""
    if any((np.asarray(line.get_ydata()) > 0).any() for line in axis.get_lines()):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())


def _spectra(path: Path, comparison: Comparison, network: str, batch: str) -> None:
    found = list(_by_method(comparison, network, batch))
    names = evenly_spaced(list(found[0][2][0]["spectra"]) if found else [], MAX_LAYERS)
    columns = max(1, min(4, len(names)))
    rows = max(1, -(-len(names) // columns))
    size = (3.4 * columns, 2.5 * rows + 0.8)
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in grid.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(grid.flat, names, strict=False):
        for method, color, runs in found:
            values = np.mean([run["spectra"][name] for run in runs], axis=0)
            axis.plot(np.arange(1, len(values) + 1), values, color=color, label=method)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axis.grid(alpha=0.3)
        axis.set_title(name.removesuffix(".weight"), fontsize=8)
    if names:
        _set_legend(figure, grid.flat, "outside right upper")
    figure.supxlabel("rank of the singular value", fontsize=9)
    figure.supylabel("singular value (weight as a matrix)", fontsize=9)
    figure.suptitle(f"{network}, batch {batch}: mean over seeds")
    figure.savefig(path, dpi=100)
    plt.close(figure)
