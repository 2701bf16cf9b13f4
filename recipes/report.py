"""What a run leaves for a person to read: metrics as CSV, two pictures and a table."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from torch import Tensor

matplotlib.use("Agg")  # pictures go to files; no screen is needed

import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

Spectra = Mapping[str, Tensor]
"""Singular values in descending order, by parameter name."""

MAX_PANELS = 24
"""How many layers one picture of spectra shows at most."""


def write_csv(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write one line an epoch, all anew: a resumed run leaves no gap and no double."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)


def write_json(path: Path, content: Any, indent: int | None = None) -> None:
    """Replace a file, all of it or nothing."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(content, indent=indent) + "\n")
    unfinished.replace(path)


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, whose header is the first row."""
    header, *others = ("| " + " | ".join(row) + " |" for row in rows)
    return [header, "|---" * len(rows[0]) + "|", *others]


def audit_table(start: Spectra, end: Spectra, estimates: Mapping[str, float]) -> str:
    """Compare the exact sigma_1 of every weight before and after training.

    Args:
        start: Spectra of the untrained model.
        end: Spectra of the trained model.
        estimates: The optimizer's estimates at the end, of the regularized weights.

    Returns:
        A table in plain text. Weights without an estimate were not regularized.
    """
    width = max(map(len, start))
    header = f"{'parameter':{width}}  {'before':>8}  {'after':>8}  {'estimate':>8}  rel. error"
    lines = [
        "sigma_1 of the weight as a matrix (out x rest), or as chosen, before and after training;",
        "the optimizer's estimate after training, and how far it is below the exact value",
        "",
        header,
        "-" * len(header),
    ]
    for name in start:
        before, after = float(start[name][0]), float(end[name][0])
        line = f"{name:{width}}  {before:8.4f}  {after:8.4f}"
        if name in estimates:
            error = (after - estimates[name]) / after if after else 0.0
            line += f"  {estimates[name]:8.4f}  {error:10.1e}"
        else:
            line += f"  {'-':>8}  {'not regularized':>10}"
        lines.append(line)
    return "\n".join(lines)


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw loss and accuracy over the epochs, with the gap between train and test shaded.

    Args:
        path: The PNG to write.
        history: One mapping an epoch, with the columns of the CSV.
        title: Says which run it is.
    """
    epochs = [row["epoch"] + 1 for row in history]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        train = [row[f"train_{metric}"] for row in history]
        test = [row[f"test_{metric}"] for row in history]
        style = {"marker": "o", "markersize": 3}
        axis.plot(epochs, train, label="train (average over the epoch)", color="C0", **style)
        axis.plot(epochs, test, label="test (end of the epoch)", color="C1", **style)
        axis.fill_between(epochs, train, test, color="grey", alpha=0.15, label="gap")
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_ylabel(metric + (" (%)" if metric == "accuracy" else ""))
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    last = history[-1]
    gap = last["train_accuracy"] - last["test_accuracy"]
    axes[1].set_title(f"last epoch: test {last['test_accuracy']:.2f} %, gap {gap:+.2f} points")
    axes[0].set_title("cross-entropy")
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_spectra(path: Path, start: Spectra, end: Spectra, title: str) -> None:
    """Draw the singular values of each layer at the start and at the end of the run.

    Args:
        path: The PNG to write.
        start: Spectra of the untrained model.
        end: Spectra of the trained model.
        title: Says which run it is.
    """
    names = evenly_spaced(list(start), MAX_PANELS)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    size = (3.4 * columns, 2.5 * rows + 0.8)
    figure, grid = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axis in grid.flat[len(names) :]:
        axis.axis("off")
    for axis, name in zip(grid.flat, names, strict=False):
        for spectra, style in ((start, "C7--"), (end, "C3-")):
            marker = "o" if len(start[name]) == 1 else None
            ranks = range(1, len(spectra[name]) + 1)
            axis.plot(ranks, spectra[name].tolist(), style, marker=marker)
        axis.set_ylim(bottom=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axis.grid(alpha=0.3)
        top = f"$\\sigma_1$: {float(start[name][0]):.2f} \u2192 {float(end[name][0]):.2f}"
        axis.set_title(f"{name.removesuffix('.weight')}\n{top}", fontsize=8)
    figure.supxlabel("rank of the singular value")
    figure.supylabel("singular value (of the weight as a matrix, unless chosen otherwise)")
    shown = "" if len(names) == len(start) else f" ({len(names)} of {len(start)} layers)"
    figure.suptitle(f"{title}{shown}: dashed at the start, solid at the end")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def evenly_spaced(names: list[str], most: int) -> list[str]:
    """Return so many of the names at most, with the first and the last one."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


_COLORS = [plt.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))]
"""Of settings; more than the ten of the default cycle."""


def draw_frontier(path: Path, results: Mapping[str, Any], bench: Mapping[str, Any]) -> None:
    """Draw the error of sigma against the cost of a step, one panel a training.

    Args:
        path: The PNG to write.
        results: For each training the errors per setting, from ``recipes.frontier``.
        bench: From ``recipes.bench``; the cost is that of its first model.
    """
    model, costs = next(iter(bench["own_work"].items()))
    figure, axes = plt.subplots(2, 4, figsize=(15, 7), sharex=True, sharey=True)
    for axis, (training, result) in zip(axes.flat, results.items(), strict=False):
        for number, name in enumerate(costs):
            if name not in result["watching"]:  # timed, but of another version of the settings
                continue
            errors = result["watching"][name]
            cost = costs[name]["ratio"]
            color = _COLORS[number]
            axis.plot(cost, errors["p95"], "o", color=color, label=name)
            if name in result["driving"]:
                driven = result["driving"][name]["p95"]
                axis.plot(cost, driven, "o", color=color, fillstyle="none")
        axis.axhline(2, color="grey", linewidth=0.8, linestyle="--")
        axis.set(title=training, yscale="log")
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel(f"time of a step over weight decay's ({model})")
    for axis in axes[:, 0]:
        axis.set_ylabel("error of sigma, 95th percentile (%)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(
        "filled: watching a training that an exact SVD regularizes; open: driving its own.\n"
        "The time is that of a step without further products. "
        f"The exact SVD itself: error 0 at {bench['exact_work'][model]:.0f} times weight decay"
    )
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_bench(path: Path, bench: Mapping[str, Any]) -> None:
    """Draw the cost of the term over weight decay per model, and how it grows.

    Args:
        path: The PNG to write.
        bench: From ``recipes.bench``.
    """
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    models = list(bench["own_work"])
    settings = list(bench["own_work"][models[0]])
    width = 0.8 / len(settings)
    for number, name in enumerate(settings):
        found = [bench["own_work"][model][name] for model in models]
        places = [i + (number - (len(settings) - 1) / 2) * width for i in range(len(models))]
        ratios = [entry["ratio"] for entry in found]
        spread = [
            [r - entry["low"] for r, entry in zip(ratios, found, strict=True)],
            [entry["high"] - r for r, entry in zip(ratios, found, strict=True)],
        ]
        axes[0].bar(
            places,
            ratios,
            width,
            yerr=spread,
            label=name,
            color=_COLORS[number],
            error_kw={"linewidth": 0.7},
        )
    axes[0].axhline(1, color="black", linewidth=0.8)
    axes[0].set_xticks(range(len(models)), models, rotation=20, fontsize=8)
    axes[0].set(title="the term alone, over weight decay (1)", ylabel="ratio of times")
    axes[0].set_ylim(top=1.6 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].legend(fontsize=7, ncols=2, loc="upper center")
    for axis, key, label in (
        (axes[1], "parameters", "parameters in 50 weights"),
        (axes[2], "weights", "weights of 16 x 16"),
    ):
        for name, points in bench["growth"][key].items():
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label, ylabel="milliseconds a step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_norms(path: Path, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Draw the norms of convolutions as operators and as flattened kernels.

    Args:
        path: The PNG to write.
        rows: Layers with ``name``, ``operator`` and ``matrix``.
        model: The name of the model.
    """
    figure, axis = plt.subplots(figsize=(11, 4.5), layout="constrained")
    places = range(len(rows))
    axis.plot(places, [row["operator"] for row in rows], "C3o", label="operator on images")
    axis.plot(places, [row["matrix"] for row in rows], "C0s", label="flattened kernel", ms=4)
    axis.set_xticks(places, [row["name"] for row in rows], rotation=90, fontsize=6)
    axis.set_ylabel("largest singular value")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    axis.set_title(f"convolutions of {model}: two norms of the same weights")
    figure.savefig(path, dpi=120)
    plt.close(figure)
