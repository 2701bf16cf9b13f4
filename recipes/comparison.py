"""What the runs of an experiment say: means, spreads, tables; no pictures."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from recipes.experiment import Cell, Experiment
from recipes.measures import best_accuracy, generalization_gap

Result = dict[str, Any]
"""The content of a run's file."""


class Measure(NamedTuple):
    """A row of the table.

    Attributes:
        title: With the unit; may name ``{alpha}``.
        of: Takes a run's result and the threshold alpha of its row.
        largest: Whether more is better.
        digits: After the point.
    """

    title: str
    of: Callable[[Result, float], float]
    largest: bool
    digits: int


MEASURES = [
    Measure("best test accuracy (%)", lambda run, _: best_accuracy(run["history"]), True, 2),
    Measure(
        "gap at alpha = {alpha} (points)",
        lambda run, alpha: generalization_gap(run["history"], alpha),
        False,
        2,
    ),
    Measure("sensitivity, test", lambda run, _: float(run["sensitivity"]["test"]), False, 3),
    Measure("sensitivity, train", lambda run, _: float(run["sensitivity"]["train"]), False, 3),
    Measure("largest Hessian eigenvalue", lambda run, _: float(run["hessian"]["value"]), False, 1),
    Measure(
        "largest sigma_1",
        lambda run, _: max(float(values[0]) for values in run["spectra"].values()),
        False,
        2,
    ),
]


class Spread(NamedTuple):
    """Mean and standard deviation over seeds, and how many diverged.

    The deviation has n - 1 in the denominator and is NaN for a single seed. Both are NaN if a
    value is not finite, such as an eigenvalue that was not found.
    """

    mean: float
    std: float
    n_runs: int
    n_diverged: int


@dataclass(frozen=True)
class Comparison:
    """An experiment and what is finished of it.

    Attributes:
        experiment: The grid.
        selected: Results of the runs that choose learning rates.
        results: Results of the runs on the test set.
    """

    experiment: Experiment
    selected: Sequence[Result]
    results: Sequence[Result]

    def validation(self, cell: Cell) -> dict[float, float]:
        """Return the best accuracy on held-out images by learning rate; NaN if diverged."""
        return {
            float(run["recipe"]["lr"]): (
                math.nan if run["diverged"] else best_accuracy(run["history"])
            )
            for run in of_cell(self.selected, cell)
        }

    def chosen(self) -> dict[Cell, float]:
        """Return the best learning rate of every cell for which all have been tried.

        Of equally good ones it is the smallest, also if all have diverged.
        """
        return {
            cell: max(
                sorted(found), key=lambda lr: -math.inf if math.isnan(found[lr]) else found[lr]
            )
            for cell in self.experiment.cells
            if len(found := self.validation(cell)) == len(self.experiment.learning_rates)
        }

    def rows(self) -> list[tuple[str, str]]:
        """Return the pairs of network and batch."""
        return list(dict.fromkeys((cell.network, cell.batch) for cell in self.experiment.cells))

    def methods(self) -> list[str]:
        """Return the names of the methods."""
        return list(dict.fromkeys(cell.method for cell in self.experiment.cells))

    def runs(self, network: str, batch: str, method: str) -> list[Result]:
        """Return the finished results of a cell that did not diverge."""
        found = of_cell(self.results, Cell(network, batch, method))
        return [run for run in found if not run["diverged"]]

    def alpha(self, network: str, batch: str) -> float:
        """Return the highest test accuracy that every run of a row reaches, all methods."""
        best = [
            best_accuracy(run["history"])
            for method in self.methods()
            for run in self.runs(network, batch, method)
        ]
        return min(best, default=math.nan)

    def spread(self, network: str, batch: str, method: str, measure: Measure) -> Spread:
        """Return a measure's mean and deviation over the seeds of a cell."""
        found = of_cell(self.results, Cell(network, batch, method))
        alpha = self.alpha(network, batch)
        values = [measure.of(run, alpha) for run in self.runs(network, batch, method)]
        known = values if all(map(math.isfinite, values)) else []
        mean = statistics.fmean(known) if known else math.nan
        std = statistics.stdev(known) if len(known) > 1 else math.nan
        return Spread(mean, std, len(found), len(found) - len(values))


def of_cell(results: Sequence[Result], cell: Cell) -> list[Result]:
    """Return the results of a cell."""
    return [run for run in results if Cell(**run["cell"]) == cell]


def best(spreads: Sequence[Spread], measure: Measure, n_seeds: int) -> set[int]:
    """Return which of the cells of a row have the best mean, as it is printed.

    Args:
        spreads: The cells.
        measure: Says whether more is better.
        n_seeds: Cells with fewer runs do not count, nor do those where one has diverged.

    Returns:
        The indices of the best.
    """
    means = {
        index: round(spread.mean, measure.digits)
        for index, spread in enumerate(spreads)
        if spread.n_runs == n_seeds and not spread.n_diverged and not math.isnan(spread.mean)
    }
    if not means:
        return set()
    top = (max if measure.largest else min)(means.values())
    return {index for index, mean in means.items() if mean == top}
