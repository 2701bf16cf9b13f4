"""The tables of a comparison, in Markdown and in a report in one HTML file."""

import base64
import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from recipes.comparison import MEASURES, Comparison, Measure, Result, Spread, best
from recipes.comparison_figures import draw_all
from recipes.experiment import Cell
from recipes.measures import best_accuracy, generalization_gap
from recipes.report import markdown_table

NOTE = (
    "Mean and standard deviation over the seeds (n - 1 in the denominator); the best mean of a "
    "row is bold. The gap is the smallest train minus test accuracy over the epochs whose test "
    "accuracy is at least alpha, the highest accuracy that every run of the row reaches. "
    "Accuracies are those of the network in evaluation mode after each epoch, on images without "
    "augmentation, that of training images on as many as there are test images. Networks that have "
    "learnt little have small gaps, too. Sensitivity: mean l2 norm of the gradient of the loss at "
    "the image as the network gets it, in its units; after training. The Hessian is that of the "
    "mean loss over up to {n} training images, without penalties or perturbations, after "
    "training. sigma_1: of weights as matrices. With one seed there is no deviation."
)

LR_NOTE = (
    "Best accuracy (%) on the held-out part of the training images, one training each; the best, "
    "or the smallest of those that are equally good, is bold and was used. A star says that it is "
    "at the end of the range, so that a better one may lie outside."
)

STYLE = """
body { font-family: sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { border-bottom: 1px solid #ccc; padding: 0.25rem 0.8rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; }
"""


class Text(NamedTuple):
    """What stands in a cell of a table."""

    words: str
    bold: bool = False


Table = list[list[Text]]
"""Rows, the header first."""


def write_report(comparison: Comparison, folder: Path) -> None:
    """Write ``table.md``, the figures and ``report.html``, which holds all of them.

    Args:
        comparison: What is reported.
        folder: Where the files go.
    """
    tables = {
        "Results": (results_table(comparison), NOTE.format(n=comparison.experiment.hessian_images)),
        "Learning rates": (learning_rates_table(comparison), LR_NOTE),
    }
    figures = draw_all(comparison, folder)
    text = [f"# {comparison.experiment.name}: {summary(comparison)}"]
    for title, (table, note) in tables.items():
        text += [f"## {title}", markdown(table), note]
    (folder / "table.md").write_text("\n\n".join(text) + "\n")
    tables["Every run"] = (runs_table(comparison), _divergences(comparison))
    (folder / "report.html").write_text(_page(comparison, tables, figures))
    print("\n\n".join(text))
    for path in [*figures.values(), folder / "table.md", folder / "report.html"]:
        print(f"wrote {path}")


def summary(comparison: Comparison) -> str:
    """Return how much of the grid is finished."""
    experiment = comparison.experiment
    total, found = len(experiment.cells) * len(experiment.seeds), len(comparison.results)
    diverged = sum(run["diverged"] is not None for run in comparison.results)
    return f"{found} of {total} runs finished, {diverged} of them diverged"


def results_table(comparison: Comparison) -> Table:
    """Return the table in the paper's form: a column a method, rows by network and batch."""
    methods = comparison.methods()
    table = [[Text("network, batch"), Text("measured"), *map(Text, methods)]]
    for network, batch in comparison.rows():
        alpha = comparison.alpha(network, batch)
        for number, measure in enumerate(MEASURES):
            spreads = [comparison.spread(network, batch, method, measure) for method in methods]
            winners = best(spreads, measure, len(comparison.experiment.seeds))
            cells = [
                Text(_spread(spread, measure, comparison), bold=index in winners)
                for index, spread in enumerate(spreads)
            ]
            title = measure.title.format(alpha="?" if math.isnan(alpha) else f"{alpha:.2f} %")
            first = _row_title(comparison, network, batch) if number == 0 else ""
            table.append([Text(first), Text(title), *cells])
    return table


def _row_title(comparison: Comparison, network: str, batch: str) -> str:
    """Name network and batch, with the number of steps, which a larger batch has fewer of."""
    for run in comparison.results:
        cell = Cell(**run["cell"])
        if (cell.network, cell.batch) == (network, batch):
            epochs, steps = run["recipe"]["epochs"], run["n_steps"]
            return f"{network}, {batch} ({epochs} epochs, {steps} steps)"
    return f"{network}, {batch}"


def _spread(spread: Spread, measure: Measure, comparison: Comparison) -> str:
    seeds = len(comparison.experiment.seeds)
    if spread.n_runs == 0:
        return "not run"
    if spread.n_diverged:
        return f"diverged ({spread.n_diverged} of {spread.n_runs})"
    if math.isnan(spread.mean):
        return "unknown"
    text = _number(spread.mean, measure)
    if not math.isnan(spread.std):
        text += f" \u00b1 {_number(spread.std, measure)}"
    return text if spread.n_runs == seeds else f"{text} ({spread.n_runs} of {seeds} seeds)"


def _number(value: float, measure: Measure) -> str:
    return f"{value:.{measure.digits}f}" if abs(value) < 1e5 else f"{value:.2e}"


def learning_rates_table(comparison: Comparison) -> Table:
    """Return the accuracy on held-out images by learning rate, of every cell."""
    rates = comparison.experiment.learning_rates
    chosen = comparison.chosen()
    table = [[Text("network, batch, method"), *(Text(f"{rate:g}") for rate in rates)]]
    for cell in comparison.experiment.cells:
        found = comparison.validation(cell)
        row = [Text(", ".join(cell))]
        for rate in rates:
            is_chosen = chosen.get(cell) == rate and not math.isnan(found[rate])
            words = "not run"
            if rate in found:
                words = "diverged" if math.isnan(found[rate]) else f"{found[rate]:.2f}"
            edge = is_chosen and len(rates) > 1 and rate in (min(rates), max(rates))
            row.append(Text(words + "*" * edge, bold=is_chosen))
        table.append(row)
    return table


def runs_table(comparison: Comparison) -> Table:
    """Return one row a run."""
    titles = "run,learning rate,parameters,images,best test accuracy (%),gap at alpha (points),"
    titles += "Hessian eigenvalue,its residual,its products,seconds,machine"
    table = [[Text(title) for title in titles.split(",")]]
    for run in comparison.results:
        cell, recipe = Cell(**run["cell"]), run["recipe"]
        row = [f"{', '.join(cell)}, seed {recipe['seed']}", f"{recipe['lr']:g}"]
        row += [str(run["n_parameters"]), str(run["n_train"])]
        if run["diverged"]:
            row += ["diverged", *[""] * 4]
        else:
            row += _figures(run, comparison.alpha(cell.network, cell.batch))
        table.append([Text(words) for words in [*row, f"{run['seconds']:.0f}", run["machine"]]])
    return table


def _divergences(comparison: Comparison) -> str:
    """Say what happened in runs that diverged, those that choose learning rates included."""
    found = [
        f"{', '.join(Cell(**run['cell']))}, learning rate {run['recipe']['lr']:g}: "
        f"{run['diverged']}"
        for run in [*comparison.selected, *comparison.results]
        if run["diverged"]
    ]
    return "Diverged: " + ("; ".join(found) or "none") + "."


def _figures(run: Result, alpha: float) -> list[str]:
    hessian = run["hessian"]
    return [
        f"{best_accuracy(run['history']):.2f}",
        f"{generalization_gap(run['history'], alpha):.2f}",
        f"{hessian['value']:.2f}",
        f"{hessian['residual']:.1e}",
        str(hessian["n_products"]),
    ]


def markdown(table: Table) -> str:
    """Write a table in Markdown."""
    rows = [[f"**{c.words}**" if c.bold else c.words for c in row] for row in table]
    return "\n".join(markdown_table(rows))


def _page(
    comparison: Comparison,
    tables: dict[str, tuple[Table, str]],
    figures: dict[str, Path],
) -> str:
    """Write everything into one HTML file that needs no other."""
    name = html.escape(comparison.experiment.name)
    parts = [f"<h1>Spectral norm regularization, compared: {name}</h1>"]
    parts.append(f"<p>{html.escape(summary(comparison))}.</p>")
    for title, (table, note) in tables.items():
        parts += [f"<h2>{title}</h2>", _html(table), f"<p>{html.escape(note)}</p>"]
    for title, path in figures.items():
        data = base64.b64encode(path.read_bytes()).decode()
        title = html.escape(title)
        parts.append(f"<h2>{title}</h2><img alt='{title}' src='data:image/png;base64,{data}'>")
    parts += ["<h2>Entries of the recipes</h2>", _html(_entries(comparison))]
    head = f"<meta charset='utf-8'><title>{name}</title><style>{STYLE}</style>"
    body = "\n".join(parts)
    return f"<!DOCTYPE html>\n<html lang='en'><head>{head}</head><body>\n{body}\n</body></html>\n"


def _entries(comparison: Comparison) -> Table:
    """Return what each cell's recipe says, entry by entry."""
    table = [[Text("network, batch, method"), Text("entries")]]
    for cell, entries in comparison.experiment.cells.items():
        words = "; ".join(f"{key}: {value}" for key, value in entries.items())
        table.append([Text(", ".join(cell)), Text(words)])
    return table


def _html(table: Table) -> str:
    def row(cells: Sequence[Text], tag: str) -> str:
        words = [html.escape(cell.words) for cell in cells]
        shown = [f"<b>{w}</b>" if c.bold else w for c, w in zip(cells, words, strict=True)]
        return "<tr>" + "".join(f"<{tag}>{text}</{tag}>" for text in shown) + "</tr>"

    return "\n".join(
        ["<table>", row(table[0], "th"), *(row(r, "td") for r in table[1:]), "</table>"]
    )
