"""How accurate sigma is along real training, per setting: ``python -m recipes.frontier``.

Each training is run once with the exact term (an SVD of every weight at every step) while all
settings watch: every one has its own vectors and sees the same weights. Then each of a few
settings drives a training of its own, in which its errors feed back: a direction that it
misses is not held down. The error of a weight is |sigma_1 - sigma| / sigma_1, with sigma the
value that the term of that step is made with and sigma_1 from an SVD in float64.

Every training is a file; the same command goes on with what is missing. At the end, a table and
a picture set the errors beside the cost that ``recipes.bench`` measured.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm.utils
import torch
from torch import Tensor, nn
from tqdm import tqdm

from recipes import train
from recipes.recipe import Recipe, RecipeError, read
from recipes.report import draw_frontier, markdown_table, write_json
from recipes.settings import SETTINGS, Idle
from snr_hooks import SNROptimizer, spectra

EVERY = 5
"""Steps between two looks."""

DRIVERS = [
    name
    for name in SETTINGS
    if name not in ("2 vectors, full iteration", "4 vectors, tolerance 0.001")
]
"""Settings that also drive a training of their own."""

TRAININGS = [
    (data, opt, lr)
    for data in ("digits", "cifar10")
    for opt, lr in (("sgd", 0.01), ("sgd", 0.1), ("adamw", 0.001), ("adamw", 0.01))
]


class Watcher:
    """A setting with its own copy of a model, which it regularizes but never trains."""

    def __init__(self, model: nn.Module, setting: dict[str, Any]) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = SNROptimizer(Idle(self.model.parameters()), self.model, **setting)

    def follow(self, model: nn.Module) -> None:
        """Take over the weights of the model that is trained."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def advance(self) -> None:
        """Do what the hooks do in a training step."""
        self.optimizer.zero_grad()
        loss = sum((target.parameter * 0).sum() for target in self.optimizer.targets)
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()


def errors(norms: dict[str, float], model: nn.Module) -> list[float]:
    """Return the relative error of each estimate."""
    exact = {name: float(values[0]) for name, values in spectra(model).items()}
    return [abs(1 - sigma / exact[name]) for name, sigma in norms.items()]


def watch(
    recipe: Recipe, settings: dict[str, dict[str, Any]]
) -> tuple[dict[str, list[list[float]]], list[float]]:
    """Train with the exact term while all settings watch.

    Args:
        recipe: What to train.
        settings: Options of SNROptimizer by name.

    Returns:
        For each setting and look, the errors of all weights; the loss of each epoch.
    """
    training = train.build(with_options(recipe, {"exact": True}))
    watchers = {name: Watcher(training.model, setting) for name, setting in settings.items()}
    found: dict[str, list[list[float]]] = {name: [] for name in settings}

    def look(step: int) -> None:
        for name, watcher in watchers.items():
            watcher.follow(training.model)
            if step % EVERY == 0:
                norms = watcher.optimizer.spectral_norms()
                found[name].append(errors(norms, training.model))
            watcher.advance()

    losses = run(training, recipe, look)
    return found, losses


def drive(recipe: Recipe, setting: dict[str, Any]) -> tuple[list[list[float]], float, list[float]]:
    """Train with a setting's own term.

    Args:
        recipe: What to train.
        setting: Options of SNROptimizer.

    Returns:
        For each look, the errors of all weights; how many products with a weight a step took; the
        loss of each epoch.
    """
    training = train.build(with_options(recipe, setting))
    optimizer = training.optimizer
    found = []

    def look(step: int) -> None:
        if step % EVERY == 0:
            found.append(errors(optimizer.spectral_norms(), training.model))

    losses = run(training, recipe, look)
    n_steps = recipe.epochs * len(training.loaders.train)
    return found, optimizer.n_products_taken / n_steps / len(optimizer.targets), losses


def run(training: train.Training, recipe: Recipe, look: Callable[[int], None]) -> list[float]:
    """Train, calling ``look`` with the number of the step before each forward pass."""
    steps = iter(range(recipe.epochs * len(training.loaders.train)))

    def before_forward(model: nn.Module, _: object) -> None:
        if model.training:
            look(next(steps))

    training.model.register_forward_pre_hook(before_forward)
    with tqdm(total=recipe.epochs * len(training.loaders.train), mininterval=10) as bar:
        losses = []
        for epoch in range(recipe.epochs):
            timm.utils.random_seed(recipe.seed, rank=epoch + 1)
            losses.append(train.train_epoch(training, epoch, bar)["train_loss"])
    return losses


def with_options(recipe: Recipe, setting: dict[str, Any]) -> Recipe:
    """Return the recipe with other options of SNROptimizer."""
    return Recipe(**{**vars(recipe), "snr_kwargs": setting})


def summary(looks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return median, 95th percentile and worst error in percent."""
    values = torch.tensor(looks).flatten() * 100
    at = torch.quantile(values, torch.tensor([0.5, 0.95])).tolist()
    return {"median": at[0], "p95": at[1], "worst": float(values.max())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m recipes.frontier", description=__doc__)
    parser.add_argument("--cifar", default="cifar10", help="--data of the CIFAR-10 trainings")
    parser.add_argument("--data-dir", default="data", help="folder that holds cifar10")
    parser.add_argument("--bench", type=Path, default=Path("recipes/results/bench/bench.json"))
    parser.add_argument("--output", type=Path, default=Path("runs/frontier"))
    parser.add_argument("--epochs", type=int, default=None, help="instead of the recipes' own")
    parser.add_argument("--only", default="", help="trainings whose name holds this")
    options = parser.parse_args(arguments)
    names = [f"{data}-{opt}-{lr}" for data, opt, lr in TRAININGS]
    if not any(options.only in name for name in names):
        parser.error(f"expected --only to be a part of {', '.join(names)}, found {options.only!r}")
    options.output.mkdir(parents=True, exist_ok=True)
    for data, opt, lr in TRAININGS:
        name = f"{data}-{opt}-{lr}"
        path = options.output / f"{name}.json"
        if options.only not in name:
            continue
        entries = read(data) | {"opt": opt, "lr": lr, "data_dir": options.data_dir}
        if data == "cifar10":
            entries["data"] = options.cifar
        if options.epochs is not None:
            entries["epochs"] = options.epochs
        recipe = Recipe(**entries)
        result: dict[str, Any] = {"epochs": recipe.epochs, "watching": {}, "driving": {}}
        result["loss"] = {}
        if path.exists():
            result = json.loads(path.read_text())
        if result["epochs"] != recipe.epochs:
            raise RecipeError(
                f"expected trainings of {recipe.epochs} epochs in {path}, found {result['epochs']}:"
                " take another --output, or remove the file"
            )
        print(name)
        missing = {key: SETTINGS[key] for key in SETTINGS if key not in result["watching"]}
        if missing:
            found, result["loss"]["exact SVD"] = watch(recipe, missing)
            result["watching"] |= {key: summary(looks) for key, looks in found.items()}
            write_json(path, result, indent=1)
        for key in DRIVERS:
            if key not in result["driving"]:
                looks, products, result["loss"][key] = drive(recipe, SETTINGS[key])
                result["driving"][key] = summary(looks) | {"products": products}
                write_json(path, result, indent=1)
    results = {path.stem: json.loads(path.read_text()) for path in trainings(options.output)}
    text = table(results)
    (options.output / "frontier.md").write_text(text)
    print(text)
    if options.bench.exists():
        draw_frontier(
            options.output / "frontier.png", results, json.loads(options.bench.read_text())
        )


def trainings(folder: Path) -> list[Path]:
    """Return the files of finished trainings."""
    paths = [folder / f"{data}-{opt}-{lr}.json" for data, opt, lr in TRAININGS]
    return [path for path in paths if path.exists()]


def table(results: dict[str, Any]) -> str:
    """Return all errors as a Markdown table: median / 95th percentile / worst in percent."""
    lines = []
    for mode in ("watching", "driving"):
        order = SETTINGS if mode == "watching" else DRIVERS
        names = [key for key in order if all(key in r[mode] for r in results.values())]
        rows = [["training", *names]]
        for training, result in results.items():
            cells = [
                "{median:.2g} / {p95:.2g} / {worst:.2g}".format(**result[mode][name])
                for name in names
            ]
            rows.append([training, *cells])
        lines += [f"**{mode}**", "", *markdown_table(rows), ""]
    refined = [
        key
        for key in DRIVERS
        if all("products" in r["driving"].get(key, {}) for r in results.values())
    ]
    rows = [["training", *refined]]
    for training, result in results.items():
        cells = [f"{result['driving'][name]['products']:.2f}" for name in refined]
        rows.append([training, *cells])
    lines += ["**products with a weight in a step, driving**", "", *markdown_table(rows), ""]
    names = [
        key for key in ["exact SVD", *DRIVERS] if all(key in r["loss"] for r in results.values())
    ]
    rows = [["training", *names]]
    for training, result in results.items():
        cells = [f"{result['loss'][name][-1]:.4f}" for name in names]
        rows.append([training, *cells])
    lines += ["**training loss in the last epoch**", "", *markdown_table(rows)]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from None
