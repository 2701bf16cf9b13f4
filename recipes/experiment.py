"""An experiment: one YAML file that says which networks, batches and methods to compare."""

from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

from recipes.recipe import Recipe, RecipeError, check_known, load, merged, typed

FOLDER = Path(__file__).parent / "experiments"
"""Where the experiments that can be called by name lie."""

AXES = ("networks", "batches", "methods")
"""What is crossed: each maps names to entries of a recipe."""

SCALARS = ("learning_rates", "validation", "seeds", "hessian_images")

OWN = ("lr", "seed", "validation")
"""Entries of a recipe that the experiment sets run by run."""


class Cell(NamedTuple):
    """A network, a batch and a method, by their names in the experiment."""

    network: str
    batch: str
    method: str


class Run(NamedTuple):
    """One training; its learning rate is being chosen, or was chosen and the test set counts."""

    cell: Cell
    recipe: Recipe

    @property
    def name(self) -> str:
        """Under which the run is filed."""
        name = f"{'-'.join(self.cell)}-lr{self.recipe.lr}"
        return name if self.recipe.validation else f"{name}-seed{self.recipe.seed}"


@dataclass(frozen=True)
class Experiment:
    """A grid of trainings.

    Attributes:
        name: After the file.
        cells: For each the entries that its recipes share.
        learning_rates: Those that every cell may choose from.
        validation: Part of the training images held out for that choice.
        seeds: Of the runs on the test set; the first one also of those on the validation part.
        hessian_images: Over how many training images the Hessian is averaged.
    """

    name: str
    cells: dict[Cell, dict[str, Any]]
    learning_rates: list[float]
    validation: float
    seeds: list[int]
    hessian_images: int

    def selection(self) -> list[Run]:
        """Return the runs that choose learning rates: all of them, for every cell, once."""
        own: dict[str, Any] = {"seed": self.seeds[0], "validation": self.validation}
        return [
            Run(cell, _recipe(cell, entries | own | {"lr": lr}))
            for cell, entries in self.cells.items()
            for lr in self.learning_rates
        ]

    def runs(self, chosen: dict[Cell, float]) -> list[Run]:
        """Return the runs on the test set.

        Args:
            chosen: The learning rate of each cell; cells without one are left out.

        Returns:
            One run for each cell and seed, seed by seed, so that an experiment that is cut
            off has fewer seeds and not fewer cells.
        """
        return [
            Run(cell, _recipe(cell, entries | {"lr": chosen[cell], "seed": seed}))
            for seed in self.seeds
            for cell, entries in self.cells.items()
            if cell in chosen
        ]


def read_experiment(name: str) -> Experiment:
    """Read an experiment file.

    Args:
        name: An experiment of ``recipes/experiments`` by its name, or the path of a YAML file.

    Returns:
        The experiment, with every recipe of it checked.

    Raises:
        RecipeError: There is no such experiment, or something in it is not as expected.
    """
    content, place = load("experiment", name, FOLDER)
    if not isinstance(content, dict):
        raise RecipeError(f"expected {place} to map keys to values, found {content!r}")
    for key in content:
        check_known(f"key in {place}", str(key), ["common", *AXES, *SCALARS])
    missing = [key for key in (*AXES, *SCALARS) if not content.get(key)]
    if missing:
        raise RecipeError(f"expected {place} to say {', '.join(missing)}")
    common = _entries(content.get("common", {}), place)
    axes = [_axis(content[axis], f"{axis} in {place}") for axis in AXES]
    cells = {
        Cell(network, batch, method): merged(common, *entries)
        for network, entries_n in axes[0].items()
        for batch, entries_b in axes[1].items()
        for method, entries_m in axes[2].items()
        for entries in [(entries_n, entries_b, entries_m)]
    }
    experiment = Experiment(
        name=Path(place).stem,
        cells=cells,
        learning_rates=_numbers(content, "learning_rates", float, place),
        validation=_number(content, "validation", float, place),
        seeds=_numbers(content, "seeds", int, place),
        hessian_images=_number(content, "hessian_images", int, place),
    )
    experiment.selection()  # makes every recipe, and so refuses what one of them refuses
    return experiment


def _recipe(cell: Cell, entries: dict[str, Any]) -> Recipe:
    """Make the recipe of a cell; errors name the cell."""
    try:
        return Recipe(**entries)
    except RecipeError as error:
        raise RecipeError(f"{', '.join(cell)}: {error}") from None


def _axis(content: Any, place: str) -> dict[str, dict[str, Any]]:
    if not isinstance(content, dict):
        raise RecipeError(f"expected {place} to map names to entries, found {content!r}")
    for name in content:
        if not str(name).replace("_", "").replace("+", "").replace(".", "").isalnum():
            raise RecipeError(f"expected letters, digits, _, + and . in {place}, found {name!r}")
    if len({str(name) for name in content}) < len(content):
        raise RecipeError(f"expected each name in {place} once, found {list(content)}")
    return {str(key): _entries(value, f"{key} of {place}") for key, value in content.items()}


def _entries(content: Any, place: str) -> dict[str, Any]:
    entries = typed({} if content is None else content, place)
    for key in OWN:
        if key in entries:
            raise RecipeError(
                f"expected no {key} in {place}, found {entries[key]!r}: an experiment sets it run "
                "by run, from learning_rates, seeds and validation"
            )
    return entries


def _numbers(content: dict[str, Any], key: str, kind: type, place: str) -> list[Any]:
    values = content[key]
    if key == "learning_rates" and isinstance(values, list) and 0 in values:
        raise RecipeError(f"expected learning_rates in {place} to be positive, found 0")
    if not isinstance(values, list):
        raise RecipeError(f"expected {key} in {place} to be a list, found {values!r}")
    numbers = [_number({key: value}, key, kind, place) for value in values]
    if len(set(numbers)) < len(numbers):
        raise RecipeError(f"expected each of {key} in {place} once, found {values!r}")
    return numbers


def _number(content: dict[str, Any], key: str, kind: type, place: str) -> Any:
    try:
        value = kind(content[key])
        if isinstance(content[key], bool) or value != float(content[key]) or not 0 <= value < inf:
            raise ValueError
    except (TypeError, ValueError, OverflowError):
        found = content[key]
        message = f"expected {key} in {place} to be {kind.__name__} and at least 0, found {found!r}"
        raise RecipeError(message) from None
    return value
