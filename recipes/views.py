"""What there is to choose, measured: ``python -m recipes.views``.

Four parts, each written to a file of its own when it is done, and not run again if the file
is there: which weights of timm's models are regularized as what, on the meta device; what each
view costs in a step, next to the default; how the norms of ResNet-50's convolutions as
operators compare with those of their flattened kernels; and what the term does under AdamW,
through the gradient and decoupled.
"""

import argparse
import copy
import csv
import json
import math
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from tqdm import tqdm

from recipes import networks, report
from recipes.bench import CYCLE, MODELS, cycles, hooked_step, measure, spread, weight_decay, wrapped
from recipes.recipe import Recipe, read
from recipes.train import run
from snr_hooks import Target, audit, discover

FAMILY = "vit"
"""The choice that splits most: into groups, heads, gates and experts, through what is stored."""

CHOICES: dict[str, Any] = {
    "matrix (default)": None,
    "blocks": "blocks",
    "heads": "heads",
    "folded": {"*": {"view": "blocks", "weight": "folded"}},
    "top 3": {"*": {"top": 3}},
    "operator": "operator",
}
ADAMW: tuple[tuple[bool, float], ...] = (
    (False, 0.0),
    *((False, strength) for strength in (0.001, 0.01, 0.1)),
    *((True, strength) for strength in (0.01, 0.1, 1.0)),
)
"""Whether the term is decoupled, and lambda."""

ADAMW_ENTRIES = {"opt": "adamw", "lr": 0.003, "epochs": 8, "sched_kwargs": {"warmup_epochs": 1}}
SEEDS = (0, 1, 2)
COST_MODELS = ("resnet18", "mobilenetv3_large_100", "vit_small_patch16_224")
NORM_MODEL, NORM_SIZE = "resnet50", 224


def coverage(models: Sequence[str]) -> dict[str, Any]:
    """Count what is regularized as what, by default and by the family choice.

    Args:
        models: Names of timm models.

    Returns:
        For both choices, by what weights are seen as or why they are skipped: the number of
        models, of tensors, and of parameters.
    """
    found: dict[str, Any] = {"models": len(models)}
    for choose in (None, FAMILY):
        found[str(choose)] = defaultdict(lambda: {"models": 0, "tensors": 0, "parameters": 0})
    for name in tqdm(models, unit="model", mininterval=10):
        with torch.device("meta"):
            model = timm.create_model(name)
        for choose in (None, FAMILY):
            _count(model, choose, found[str(choose)])
    return found


def _count(model: nn.Module, choose: str | None, counts: dict[str, dict[str, int]]) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    discovery = discover(model, choose=choose)
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for target in discovery.targets:
        entries = math.prod(target.view.shape(target.parameter))  # of its part of the parameter
        size = min(entries, target.parameter.numel())
        found[_kind(target)][target.parameter_name] += size
    for skipped in discovery.skipped:
        size = parameters[skipped.name].numel()
        found[f"skipped: {_reason(skipped.reason)}"][skipped.name] = size
    for kind, sizes in found.items():
        counts[kind]["models"] += 1
        counts[kind]["tensors"] += len(sizes)
        counts[kind]["parameters"] += sum(sizes.values())


def _kind(target: Target) -> str:
    """Return what a weight is seen as, without its numbers."""
    words = target.view.describe(target.parameter)
    plain = words.replace(", flatten(1)", "").replace(", movedim(1, 0).flatten(1)", "")
    return re.sub(r"\d+( x \d+)*", "N", plain)


def _reason(reason: str) -> str:
    """Return why a weight is skipped, without the names of modules."""
    if "is not the weight of a Linear" in reason:
        return "no linear map (embeddings, tokens, scales, tables)"
    if "the matrix that" in reason:
        return "a gain of standardized weights"
    return re.sub(r"^\w+ standardizes", "a module standardizes", re.sub("'.*'", "another", reason))


def cost(name: str, repetitions: int) -> dict[str, Any]:
    """Time the wrapper's work in a step for every choice, in turn, in one process.

    Args:
        name: A model of ``MODELS``.
        repetitions: Cycles of sixteen steps.

    Returns:
        By choice, the ratios to the default and to weight decay with their spread.
    """
    size, _, options = MODELS[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options)
    functions: dict[str, Callable[[], object]] = {}
    optimizers = []
    for label, choose in CHOICES.items():
        copied = copy.deepcopy(model)
        optimizer = wrapped(copied, {"choose": choose})
        copied(torch.zeros(2, 3, size, size))  # the sizes of inputs are observed
        functions[label] = hooked_step(optimizer)
        optimizers.append(optimizer)
    functions["floor"] = weight_decay(optimizers[0])
    times = measure(functions, CYCLE * repetitions, warm_up=CYCLE)
    default, floor = cycles(times["matrix (default)"]), cycles(times["floor"])
    found = {}
    for label, optimizer in zip(CHOICES, optimizers, strict=True):
        own = cycles(times[label])
        found[label] = {
            "to_default": spread([a / b for a, b in zip(own, default, strict=True)]),
            "to_decay": spread([a / b for a, b in zip(own, floor, strict=True)]),
            "targets": len(optimizer.targets),
        }
        optimizer.remove()
    return found


def norms(name: str, size: int) -> list[dict[str, Any]]:
    """Compare the norms of convolutions as operators with those of their flattened kernels.

    Args:
        name: A timm model, with the weights it starts from.
        size: Height and width of the images.

    Returns:
        For each convolution its shape, the size of its input, and both norms.
    """
    torch.manual_seed(0)
    model = timm.create_model(name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    sizes: dict[str, tuple[int, ...]] = {}
    for layer_name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _, inputs, key=layer_name: sizes.update({key: tuple(inputs[0].shape[2:])})
        )
    with torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    rows = []
    for layer_name, layer in tqdm(layers.items(), unit="layer", mininterval=10):
        choose = {"weight": {"view": "operator", "input_size": sizes[layer_name]}}
        start = time.perf_counter()
        rows.append(
            {
                "name": layer_name,
                "shape": list(layer.weight.shape),
                "stride": list(layer.stride),
                "input": list(sizes[layer_name]),
                "matrix": audit(layer).rows[0].sigma,
                "operator": audit(layer, choose).rows[0].sigma,
                "seconds": time.perf_counter() - start,
            }
        )
    return rows


def decoupled(folder: Path) -> list[dict[str, Any]]:
    """Train on digits with AdamW, with the term in the gradient and decoupled from it.

    Args:
        folder: Where runs are written; those that are complete there are not run again.

    Returns:
        For each run its setting, the test accuracy after the last epoch in percent, and the exact
        sigma_1 of each weight.
    """
    runs = []
    for seed in SEEDS:
        for is_decoupled, strength in ADAMW:
            entries = read("digits") | ADAMW_ENTRIES | {"seed": seed, "snr_lambda": strength}
            name = f"{'decoupled' if is_decoupled else 'gradient'}-{strength:g}-{seed}"
            recipe = Recipe(**entries, decoupled=is_decoupled)
            optimizer = run(recipe, folder / name)
            with (folder / name / "metrics.csv").open() as file:
                accuracy = float(list(csv.DictReader(file))[-1]["test_accuracy"])
            sigmas = {row.name: row.sigma for row in audit(optimizer)}
            found = {"decoupled": is_decoupled, "lambda": strength, "seed": seed}
            runs.append({**found, "accuracy": accuracy, "sigma": sigmas})
    return runs


# --- the page ---


def page(found: dict[str, Any]) -> str:
    """Return all that was measured as a page in Markdown."""
    pages: dict[str, Callable[[Any], str]] = {
        "coverage": _coverage_page,
        "cost": _cost_page,
        "decoupled": _decoupled_page,
        "norms": _norms_page,
    }
    parts = ["# Views, measured\n\nWritten by `python -m recipes.views`."]
    for part, write in pages.items():
        if part in found:
            parts.append(f"{write(found[part]['result'])}\n\nMeasured with {found[part]['with']}.")
    return "\n\n".join(parts) + "\n"


def _versions() -> str:
    return (
        f"torch {torch.__version__}, timm {timm.__version__}, Python "
        f"{platform.python_version()}, {torch.get_num_threads()} threads on CPU"
    )


def _coverage_page(found: dict[str, Any]) -> str:
    lines = [f"## What is regularized as what, in {found['models']} timm models"]
    titles = {"None": "By default", FAMILY: f"With `choose={FAMILY!r}`"}
    for choose, title in titles.items():
        counts = found[choose]
        total = sum(count["parameters"] for count in counts.values())
        lines.append(
            f"\n{title}, of all parameters with two or more dimensions:\n\n"
            "| seen as, or skipped because | models | tensors | share of parameters |\n"
            "|---|---|---|---|"
        )
        order = sorted(counts, key=lambda kind: (":" in kind, -counts[kind]["parameters"]))
        lines += [
            f"| {kind} | {counts[kind]['models']} | {counts[kind]['tensors']} | "
            f"{100 * counts[kind]['parameters'] / total:.3g} % |"
            for kind in order
        ]
    return "\n".join(lines)


def _cost_page(found: dict[str, Any]) -> str:
    lines = [
        "## What a view costs",
        "",
        "The wrapper's own work in a step, over that of the default, and in brackets over weight "
        "decay on the same weights: medians, all choices of a model timed in turn in one process.",
        "",
        f"| choice | {' | '.join(found)} |",
        f"|---|{'---|' * len(found)}",
    ]
    for label in CHOICES:
        cells = [
            f"{rows[label]['to_default']['ratio']:.2f} "
            f"[{rows[label]['to_default']['low']:.2f}, {rows[label]['to_default']['high']:.2f}] "
            f"({rows[label]['to_decay']['ratio']:.1f})"
            for rows in found.values()
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _decoupled_page(runs: list[dict[str, Any]]) -> str:
    lines = [
        "## Under AdamW: through the gradient, or decoupled",
        "",
        f"Digits, test_resnet, AdamW at learning rate {ADAMW_ENTRIES['lr']}, "
        f"{ADAMW_ENTRIES['epochs']} epochs, seeds {', '.join(map(str, SEEDS))}. Accuracy: mean and "
        "standard deviation over seeds. sigma_1: exact, over that of the same weight and seed "
        "without the term; median, and the ends of the middle 80 percent, over all weights and "
        "seeds.",
        "",
        "| term | lambda | test accuracy, % | sigma_1, relative |",
        "|---|---|---|---|",
    ]
    without = {run["seed"]: run["sigma"] for run in runs if run["lambda"] == 0}
    for is_decoupled, strength in ADAMW:
        chosen = [r for r in runs if (r["decoupled"], r["lambda"]) == (is_decoupled, strength)]
        accuracies = [run["accuracy"] for run in chosen]
        ratios = [run["sigma"][n] / without[run["seed"]][n] for run in chosen for n in run["sigma"]]
        middle = spread(ratios)
        lines.append(
            f"| {'decoupled' if is_decoupled else 'in the gradient' if strength else 'none'} | "
            f"{strength:g} | {statistics.mean(accuracies):.2f} ± {statistics.stdev(accuracies):.2f}"
            f" | {middle['ratio']:.2f} [{middle['low']:.2f}, {middle['high']:.2f}] |"
        )
    return "\n".join(lines)


def _norms_page(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"## Norms of the convolutions of {NORM_MODEL}",
        "",
        f"Weights as initialized (seed 0), images of {NORM_SIZE} pixels: the operator on images, "
        "iterated until it stops growing, and the flattened kernel, by SVD.",
        "",
        "| layer | kernel | stride | input | operator | flattened | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {' x '.join(map(str, row['shape']))} | {row['stride'][0]} | "
        f"{' x '.join(map(str, row['input']))} | {row['operator']:.3f} | {row['matrix']:.3f} | "
        f"{row['operator'] / row['matrix']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n\n![Both norms of every layer](norms.png)"


def _models_of_timm() -> list[str]:
    """Return the models that come with timm, without those registered here."""
    return [name for name in timm.list_models() if name not in networks.default_cfgs]


def main(arguments: list[str] | None = None) -> None:
    """Measure what is not measured yet, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m recipes.views", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/views"))
    parser.add_argument("--parts", nargs="*", default=["coverage", "cost", "norms", "decoupled"])
    parser.add_argument("--repetitions", type=int, default=10, help="cycles of sixteen steps")
    parser.add_argument("--models", nargs="*", help="timm models to cover (default all)")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    measures: dict[str, Callable[[], Any]] = {
        "coverage": lambda: coverage(options.models or _models_of_timm()),
        "cost": lambda: {name: cost(name, options.repetitions) for name in COST_MODELS},
        "norms": lambda: norms(NORM_MODEL, NORM_SIZE),
        "decoupled": lambda: decoupled(options.output / "runs"),
    }
    found = {}
    for part, take in measures.items():
        path = options.output / f"{part}.json"
        if part in options.parts and not path.exists():
            measured = {"with": _versions(), "result": take()}
            path.write_text(json.dumps(measured, indent=1) + "\n")
        if path.exists():
            found[part] = json.loads(path.read_text())
    if "norms" in found:
        rows = found["norms"]["result"]
        report.draw_norms(options.output / "norms.png", rows, NORM_MODEL)
    (options.output / "views.md").write_text(page(found))
    print(page(found))


if __name__ == "__main__":
    main()
