"""Train a timm model with spectral norm regularization: ``python -m recipes.train digits``.

A run is a folder. Its checkpoint is replaced atomically after every epoch, and each epoch
draws its random numbers from the seed and its own number alone, so that the same command
continues a killed run to the same weights as if it had not been killed.
"""

import dataclasses
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import timm
import timm.data
import timm.models
import timm.optim
import timm.scheduler
import timm.utils
import torch
import yaml
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from tqdm import tqdm

from recipes import report
from recipes.data import Loaders, create_datasets, create_loaders
from recipes.recipe import Recipe, RecipeError, parse
from snr_hooks import SNROptimizer, spectra

CHECKPOINT = "last.pth.tar"


class Training(NamedTuple):
    """All that is built from a recipe."""

    model: nn.Module
    loaders: Loaders
    optimizer: SNROptimizer
    scheduler: Scheduler | None
    device: torch.device


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; on bad input, exit with a message in place of a traceback."""
    try:
        recipe, options = parse(arguments)
        run(recipe, options.output, fresh=options.fresh)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues after the last finished epoch")


def run(recipe: Recipe, output: Path, *, fresh: bool = False) -> SNROptimizer:
    """Train, or continue to train, and write the report.

    Args:
        recipe: What to train.
        output: Folder of the run. Holds ``recipe.yaml``, ``last.pth.tar``,
            ``metrics.csv``, and at the end ``audit.txt``, ``curves.png``, ``spectra.png``.
        fresh: Start over even if the folder holds a run.

    Returns:
        The optimizer of the trained model.

    Raises:
        RecipeError: An entry of the recipe does not fit, the folder holds the run of
            another recipe or a broken checkpoint, or the loss is not finite.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"expected to write to the folder {output}: {error}") from None
    training = build(recipe)
    start = spectra(training.model)
    history = [] if fresh else _resume(training, recipe, output / CHECKPOINT)
    if history:
        print(f"continuing {output} after epoch {len(history)} of {recipe.epochs}")
        report.write_csv(output / "metrics.csv", history)  # if it was killed before this
    (output / "recipe.yaml").write_text(yaml.safe_dump(dataclasses.asdict(recipe)))
    steps = len(training.loaders.train)
    with tqdm(
        total=recipe.epochs * steps,
        initial=len(history) * steps,
        unit="step",
        mininterval=0.1 if sys.stderr.isatty() else 10,  # in a log, a line now and then
    ) as bar:
        for epoch in range(len(history), recipe.epochs):
            timm.utils.random_seed(recipe.seed, rank=epoch + 1)
            bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}")
            row = {"epoch": epoch, **train_epoch(training, epoch, bar), **_evaluate(training)}
            row["lr"] = training.optimizer.param_groups[0]["lr"]
            row["sigma_max"] = max(training.optimizer.spectral_norms().values())
            history.append(row)
            _save(training, recipe, history, output / CHECKPOINT)
            report.write_csv(output / "metrics.csv", history)
            bar.write(_summary(row, recipe.epochs))
    _write_report(training, recipe, history, start, output)
    return training.optimizer


def build(recipe: Recipe) -> Training:
    """Build model, data, optimizer and scheduler with timm's factories.

    Args:
        recipe: What to build.

    Returns:
        The parts; the model has the weights that the seed gives it.

    Raises:
        RecipeError: An entry does not fit the factory it is for.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timm.utils.random_seed(recipe.seed)
    datasets = create_datasets(recipe)
    size = {"img_size": recipe.img_size}
    with _explained("model, img_size or model_kwargs"):
        model = timm.create_model(
            **timm.models.resolve_model_input_args(
                recipe.model, size, num_classes=datasets.n_classes, **recipe.model_kwargs
            )
        ).to(device)
    config = timm.data.resolve_data_config(size, model=model)
    loaders = create_loaders(recipe, datasets, config)
    with _explained("opt, lr, momentum, weight_decay or opt_kwargs"):
        base = timm.optim.create_optimizer_v2(
            model,
            recipe.opt,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            **recipe.opt_kwargs,
        )
    with _explained("snr_lambda or snr_kwargs"):
        optimizer = SNROptimizer(base, model, recipe.snr_lambda, **recipe.snr_kwargs)
    with _explained("sched or sched_kwargs"):
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            step_on_epochs=False,
            updates_per_epoch=len(loaders.train),
            **recipe.sched_kwargs,
        )
    return Training(model, loaders, optimizer, scheduler, device)


@contextmanager
def _explained(entries: str) -> Iterator[None]:
    """Say which entries of the recipe a factory refused."""
    try:
        yield
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise RecipeError(f"refused {entries}: {error}") from error


def train_epoch(training: Training, epoch: int, bar: "tqdm[Any]") -> dict[str, float]:
    """Train for one epoch.

    Args:
        training: From ``build``.
        epoch: Its number, from 0, for the schedule and for messages.
        bar: Is moved on with every step.

    Returns:
        The average loss and accuracy over the epoch.

    Raises:
        RecipeError: The loss is not finite.
    """
    model, loaders, optimizer, scheduler, device = training
    model.train()
    loss_meter, accuracy_meter = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    for step, (images, labels) in enumerate(loaders.train, start=epoch * len(loaders.train)):
        if scheduler is not None:
            scheduler.step_update(num_updates=step)
        images, labels = images.to(device), labels.to(device)
        output = model(images)
        loss = nn.functional.cross_entropy(output, labels)
        if not math.isfinite(loss.item()):
            raise RecipeError(
                f"the loss is {loss.item()} at step {step} (epoch {epoch + 1}); the last "
                "checkpoint is kept: lower lr or add warm-up (sched_kwargs warmup_epochs)"
            )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss_meter.update(loss.item(), len(labels))
        accuracy_meter.update(_accuracy(output, labels), len(labels))
        bar.set_postfix(loss=f"{loss_meter.avg:.3f}", acc=f"{accuracy_meter.avg:.1f}%")
        bar.update()
    return {"train_loss": loss_meter.avg, "train_accuracy": accuracy_meter.avg}


@torch.no_grad()
def _evaluate(training: Training) -> dict[str, float]:
    training.model.eval()
    loss_meter, accuracy_meter = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    for images, labels in training.loaders.test:
        images, labels = images.to(training.device), labels.to(training.device)
        output = training.model(images)
        loss_meter.update(nn.functional.cross_entropy(output, labels).item(), len(labels))
        accuracy_meter.update(_accuracy(output, labels), len(labels))
    return {"test_loss": loss_meter.avg, "test_accuracy": accuracy_meter.avg}


def _accuracy(output: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy of a batch in percent."""
    return float(timm.utils.accuracy(output.detach(), labels)[0])


def _summary(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch'] + 1:3d}/{epochs}  train loss {row['train_loss']:.4f} acc "
        f"{row['train_accuracy']:6.2f} %  test loss {row['test_loss']:.4f} acc "
        f"{row['test_accuracy']:6.2f} %  largest sigma {row['sigma_max']:.2f}"
    )


def _save(training: Training, recipe: Recipe, history: list[dict[str, Any]], path: Path) -> None:
    """Write a checkpoint that timm's ``resume_checkpoint`` reads, all of it or nothing.

    timm's own saver unlinks the old file before it renames the new one; a run killed
    between the two would have no checkpoint.
    """
    checkpoint = {
        "epoch": history[-1]["epoch"],
        "version": 2,
        "arch": recipe.model,
        "state_dict": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "recipe": dataclasses.asdict(recipe),
        "history": history,
    }
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _resume(training: Training, recipe: Recipe, path: Path) -> list[dict[str, Any]]:
    """Load the last checkpoint, if there is one, and return the epochs so far."""
    if not path.exists():
        return []
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        parts = ("recipe", "history", "state_dict", "optimizer", "epoch")
        saved, history, *_ = (checkpoint[part] for part in parts)
        complete = isinstance(saved, dict) and len(history) == checkpoint["epoch"] + 1
    except (RuntimeError, EOFError, LookupError, TypeError, UnpicklingError, OSError) as error:
        raise RecipeError(_broken(path, type(error).__name__)) from error
    if not complete:
        raise RecipeError(_broken(path, "incomplete"))
    current = dataclasses.asdict(recipe)
    free = {"workers", "download", "data_dir"}  # may change without changing the result
    differing = [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if key not in free and saved.get(key) != current.get(key)
    ]
    if differing:
        raise RecipeError(
            f"{path} belongs to another recipe ({'; '.join(differing)}): pass another --output, "
            "or --fresh to replace it"
        )
    try:
        timm.models.resume_checkpoint(training.model, str(path), training.optimizer, log_info=False)
    except (RuntimeError, ValueError, LookupError) as error:
        raise RecipeError(_broken(path, str(error))) from error
    return list(history)


def _broken(path: Path, what: str) -> str:
    return (
        f"expected a checkpoint of a recipe in {path}, found a truncated or foreign file "
        f"({what}): restore it, or pass --fresh to start over"
    )


def _write_report(
    training: Training,
    recipe: Recipe,
    history: list[dict[str, Any]],
    start: report.Spectra,
    output: Path,
) -> None:
    end = spectra(training.model)
    text = report.audit_table(start, end, training.optimizer.spectral_norms())
    (output / "audit.txt").write_text(text + "\n")
    title = f"{recipe.model} on {recipe.data}, {recipe.opt}, lambda {recipe.snr_lambda}"
    report.draw_curves(output / "curves.png", history, title)
    report.draw_spectra(output / "spectra.png", start, end, title)
    best = max(history, key=lambda row: float(row["test_accuracy"]))
    print(f"\n{text}\n")
    print(
        f"test accuracy {history[-1]['test_accuracy']:.2f} % at the end, best "
        f"{best['test_accuracy']:.2f} % after epoch {best['epoch'] + 1}"
    )
    for name in ("curves.png", "spectra.png", "metrics.csv", "audit.txt", CHECKPOINT):
        print(f"wrote {output / name}")


if __name__ == "__main__":
    main()
