"""Train a timm model with spectral norm regularization: ``python -m recipes.train digits``.

``torchrun --nproc-per-node 2 -m recipes.train digits`` trains on two processes that share each
batch of the same recipe, and with ``--fsdp`` the weights as well.

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
from recipes.data import Datasets, Loaders, create_datasets, create_loaders
from recipes.processes import Processes, load_sharded, started, whole
from recipes.recipe import PLACE, Recipe, RecipeError, differences, parse
from snr_hooks import SNROptimizer, audit, spectra

CHECKPOINT = "last.pth.tar"

TINY = 1e-60
"""Gradients below this norm have no direction, which are those of zero in float32."""


class DivergenceError(RecipeError):
    """The loss is not finite; ``what`` says where, without advice."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}: {advice}" if advice else what)
        self.what = what


class Training(NamedTuple):
    """A recipe and all that is built from it; ``spread`` is the model on all processes."""

    recipe: Recipe
    model: nn.Module
    spread: nn.Module
    loaders: Loaders
    optimizer: SNROptimizer
    scheduler: Scheduler | None
    processes: Processes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; on bad input, exit with a message in place of a traceback."""
    try:
        recipe, options = parse(arguments)
        if options.fsdp and "RANK" not in os.environ:
            raise RecipeError("expected --fsdp under torchrun, found a process on its own")
        with started(sharded=options.fsdp) as processes:
            run(recipe, options.output, fresh=options.fresh, processes=processes)
    except RecipeError as error:
        rank = os.environ.get("RANK", "0")
        sys.exit(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues after the last finished epoch")


def run(
    recipe: Recipe, output: Path, *, fresh: bool = False, processes: Processes | None = None
) -> SNROptimizer:
    """Train, or continue to train, and write the report.

    Args:
        recipe: What to train.
        output: Folder of the run. Holds ``recipe.yaml``, ``last.pth.tar``,
            ``metrics.csv``, and at the end ``audit.txt``, ``curves.png``, ``spectra.png``.
        fresh: Start over even if the folder holds a run.
        processes: Those that train together, each of which calls this; by default this one.
            The first one writes, and all must see the folder.

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
    training = build(recipe, processes)
    processes = training.processes
    start = _spectra(training)
    history = [] if fresh else _resume(training, output / CHECKPOINT)
    if processes.is_primary:
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
        disable=not processes.is_primary,
    ) as bar:
        for row in train(training, bar, start=len(history)):
            history.append(row)
            _save(training, history, output / CHECKPOINT)
            if processes.is_primary:
                report.write_csv(output / "metrics.csv", history)
                bar.write(_summary(row, recipe.epochs))
    _write_report(training, history, start, output)
    return training.optimizer


def train(training: Training, bar: "tqdm[Any]", start: int = 0) -> Iterator[dict[str, Any]]:
    """Train, and measure after every epoch.

    Args:
        training: From ``build``.
        bar: Is moved on with every step.
        start: How many epochs have been trained before.

    Yields:
        One row of metrics an epoch.
    """
    recipe, processes = training.recipe, training.processes
    for epoch in range(start, recipe.epochs):
        timm.utils.random_seed(recipe.seed, rank=(epoch + 1) * processes.size + processes.rank)
        bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}")
        row = {"epoch": epoch, **train_epoch(training, epoch, bar)}
        processes.average_batch_norms(training.model)
        row |= evaluate(training, "test")
        row["lr"] = training.optimizer.param_groups[0]["lr"]
        row["sigma_max"] = max(training.optimizer.spectral_norms().values())
        yield row


def build(
    recipe: Recipe, processes: Processes | None = None, datasets: Datasets | None = None
) -> Training:
    """Build model, data, optimizer and scheduler with timm's factories.

    Args:
        recipe: What to build.
        processes: Those that train together; by default this one.
        datasets: The recipe's data, if they are open already.

    Returns:
        The parts; the model has the weights that the seed gives it.

    Raises:
        RecipeError: An entry does not fit the factory it is for.
    """
    if processes is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        processes = Processes(device=device)
    timm.utils.random_seed(recipe.seed)
    if datasets is None:
        datasets = create_datasets(recipe)
    size = {"img_size": recipe.img_size}
    with _explained("model, img_size or model_kwargs"):
        model = timm.create_model(
            **timm.models.resolve_model_input_args(
                recipe.model, size, num_classes=datasets.n_classes, **recipe.model_kwargs
            )
        ).to(processes.device, memory_format=_memory_format(recipe))
    config = timm.data.resolve_data_config(size, model=model)
    loaders = create_loaders(recipe, datasets, config, processes)
    spread = processes.spread(model)  # before the optimizer, for sharding replaces parameters
    with _explained("opt, lr, momentum, weight_decay or opt_kwargs"):
        base = timm.optim.create_optimizer_v2(
            model,
            recipe.opt,
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            **recipe.opt_kwargs,
        )
    with _explained("snr_lambda, choose, decoupled or snr_kwargs"):
        optimizer = SNROptimizer(
            base,
            model,
            recipe.snr_lambda,
            choose=recipe.choose,
            decoupled=recipe.decoupled,
            **recipe.snr_kwargs,
        )
    with _explained("sched or sched_kwargs"):
        scheduler, _ = timm.scheduler.create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            step_on_epochs=False,
            updates_per_epoch=len(loaders.train),
            **recipe.sched_kwargs,
        )
    return Training(recipe, model, spread, loaders, optimizer, scheduler, processes)


def _memory_format(recipe: Recipe) -> torch.memory_format:
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


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
        The average loss and accuracy over the steps of the epoch, all processes together.

    Raises:
        DivergenceError: The loss is not finite, on any process; with ``skip_nonfinite``, in
            any step.
    """
    recipe, model, _, loaders, optimizer, scheduler, processes = training
    model.train()
    if processes.size > 1:
        loaders.train.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    loss_meter, accuracy_meter = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    n_skipped = 0
    for step, batch in enumerate(loaders.train, start=epoch * len(loaders.train)):
        if scheduler is not None:
            scheduler.step_update(num_updates=step)
        buffers = [buffer.clone() for buffer in model.buffers()] if recipe.skip_nonfinite else []
        optimizer.zero_grad()
        loss, accuracy, n_bad = _backward(training, *batch)
        bar.update()
        if n_bad:
            _report_nonfinite(loss, step, epoch, stop=not recipe.skip_nonfinite, bar=bar)
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)  # running statistics have seen what made the loss so
            n_skipped += 1
            continue
        optimizer.step()
        loss_meter.update(loss, len(batch[1]))
        accuracy_meter.update(accuracy, len(batch[1]))
        bar.set_postfix(loss=f"{loss_meter.avg:.3f}", acc=f"{accuracy_meter.avg:.1f}%")
    if n_skipped == len(loaders.train):
        raise DivergenceError(
            f"the loss was not finite in any step of epoch {epoch + 1}, so that there is nothing "
            "to go on with",
            "start again, in another --output or with --fresh, with a lower lr",
        )
    return _averages("train", processes, loss_meter, accuracy_meter)


def _backward(training: Training, images: Tensor, labels: Tensor) -> tuple[float, float, float]:
    """Sum up the gradients of a batch, until the loss is not finite on any process.

    Returns:
        The loss, the accuracy in percent, and on how many processes the loss is not finite.
    """
    recipe, _, spread, _, _, _, processes = training
    size = recipe.micro_batch or len(labels)
    total, accuracy = 0.0, 0.0
    parts = zip(torch.split(images, size), torch.split(labels, size), strict=True)
    for part, targets in parts:
        part = part.to(processes.device, memory_format=_memory_format(recipe))
        targets = targets.to(processes.device)
        share = len(targets) / len(labels)
        outputs = []
        for loss, output in objective(spread, part, targets, recipe):
            total += loss.item() * share
            outputs.append(output)
            (n_bad,) = processes.total([not math.isfinite(total)])
            if n_bad:
                return total, accuracy, n_bad
            (loss * share).backward()  # type: ignore[no-untyped-call]
        accuracy += _accuracy(outputs[0], targets) * share
    return total, accuracy, 0


def objective(
    model: nn.Module, images: Tensor, labels: Tensor, recipe: Recipe
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the parts of the loss that a recipe asks for.

    Adversarial training (Goodfellow et al. 2014, arXiv 1412.6572; as a baseline of Yoshida &
    Miyato 2017) minimises alpha L(x) + (1 - alpha) L(x + eps g / |g|), with g the
    gradient of L at x and |g| its l2 norm, per image, in the units of the model's normalised
    input. The perturbation is held constant, so that no second derivative is needed, and g
    comes with the backward pass of the first part.

    Args:
        model: In training mode.
        images: A batch (n, channels, height, width).
        labels: Its classes (n,).
        recipe: Says how large the perturbation is.

    Yields:
        A part of the loss, to be backpropagated before the next one is asked for, and the
        logits that it is made of; at the unperturbed images first.
    """
    eps, alpha = recipe.adversarial_eps, recipe.adversarial_alpha
    if eps == 0:
        output = model(images)
        yield nn.functional.cross_entropy(output, labels), output
        return
    images = images.detach().requires_grad_()
    output = model(images)
    yield alpha * nn.functional.cross_entropy(output, labels), output
    assert images.grad is not None
    gradient = images.grad.flatten(1).double()  # in float32, squares of small ones are zero
    direction = nn.functional.normalize(gradient, eps=TINY).to(images).view_as(images)
    output = model(images.detach() + eps * direction)
    yield (1 - alpha) * nn.functional.cross_entropy(output, labels), output


def _report_nonfinite(loss: float, step: int, epoch: int, *, stop: bool, bar: "tqdm[Any]") -> None:
    what = f"the loss is {loss} at step {step} (epoch {epoch + 1})"
    if math.isfinite(loss):
        what = f"the loss of another process is not finite at step {step} (epoch {epoch + 1})"
    if stop:
        raise DivergenceError(
            what,
            "pass --skip-nonfinite to go on from the last finished epoch without such "
            "steps, or start again, in another --output or with --fresh, with a lower lr or "
            "warm-up (sched_kwargs warmup_epochs)",
        )
    if not bar.disable:
        bar.write(f"{what}; skipped")


def _averages(kind: str, processes: Processes, *meters: Any) -> dict[str, float]:
    """Return loss and accuracy over all processes."""
    sums = processes.total([value for meter in meters for value in (meter.sum, meter.count)])
    loss, accuracy = (total / count for total, count in zip(sums[::2], sums[1::2], strict=True))
    return {f"{kind}_loss": loss, f"{kind}_accuracy": accuracy}


@torch.no_grad()
def evaluate(training: Training, which: str) -> dict[str, float]:
    """Measure loss and accuracy.

    Args:
        training: From ``build``.
        which: ``"test"`` or ``"train_eval"``, one of its loaders.

    Returns:
        The averages over the images of that loader, named after it; accuracy in percent.
    """
    recipe, model, _, loaders, _, _, processes = training
    loader = getattr(loaders, which)
    model.eval()  # not the DDP around it, which would copy the buffers of rank 0 at every call
    loss_meter, accuracy_meter = timm.utils.AverageMeter(), timm.utils.AverageMeter()
    n_images, position = len(loader.dataset), processes.rank
    for images, labels in loader:
        output = model(images.to(processes.device, memory_format=_memory_format(recipe)))
        # The sampler repeats images so that all processes have as many.
        new = torch.arange(len(labels)) * processes.size + position < n_images
        position += len(labels) * processes.size
        output, labels = output[new], labels[new].to(processes.device)
        if len(labels):
            loss_meter.update(nn.functional.cross_entropy(output, labels).item(), len(labels))
            accuracy_meter.update(_accuracy(output, labels), len(labels))
    return _averages(which, processes, loss_meter, accuracy_meter)


def _accuracy(output: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy of a batch in percent."""
    return float(timm.utils.accuracy(output.detach(), labels)[0])


def _summary(row: dict[str, Any], epochs: int) -> str:
    return (
        f"epoch {row['epoch'] + 1:3d}/{epochs}  train loss {row['train_loss']:.4f} acc "
        f"{row['train_accuracy']:6.2f} %  test loss {row['test_loss']:.4f} acc "
        f"{row['test_accuracy']:6.2f} %  largest sigma {row['sigma_max']:.2f}"
    )


def _save(training: Training, history: list[dict[str, Any]], path: Path) -> None:
    """Write a checkpoint that timm's ``resume_checkpoint`` reads, all of it or nothing.

    timm's own saver unlinks the old file before it renames the new one; a run killed
    between the two would have no checkpoint.
    """
    weights, states = whole(training.model.state_dict()), whole(training.optimizer.state_dict())
    if not training.processes.is_primary:
        return
    checkpoint = {
        "epoch": history[-1]["epoch"],
        "version": 2,
        "arch": training.recipe.model,
        "state_dict": weights,
        "optimizer": states,
        "recipe": dataclasses.asdict(training.recipe),
        "history": history,
    }
    unfinished = path.with_suffix(".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as either
        if unfinished.is_file():
            unfinished.unlink()
        kept = "the one before it is intact" if path.exists() else "there is none yet"
        raise RecipeError(
            f"expected to write a checkpoint to {path}: {error}; {kept}: make room and run the "
            "same command again"
        ) from error


def _resume(training: Training, path: Path) -> list[dict[str, Any]]:
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
    current = dataclasses.asdict(training.recipe)
    differing = differences(saved, current, PLACE | {"skip_nonfinite"})  # says how to go on
    if differing:
        raise RecipeError(
            f"{path} belongs to another recipe ({'; '.join(differing)}): pass another --output, "
            "or --fresh to replace it"
        )
    try:
        if training.processes.sharded:
            load_sharded(training.model, training.optimizer, checkpoint)
        else:
            timm.models.resume_checkpoint(
                training.model, str(path), training.optimizer, log_info=False
            )
    except (RuntimeError, ValueError, LookupError) as error:
        raise RecipeError(_broken(path, str(error))) from error
    return list(history)


def _broken(path: Path, what: str) -> str:
    return (
        f"expected a checkpoint of a recipe in {path}, found a truncated or foreign file "
        f"({what}): restore it, or pass --fresh to start over"
    )


def _spectra(training: Training) -> report.Spectra:
    """Return the singular values of all weights as matrices, or as was chosen."""
    if training.recipe.choose is None:
        return spectra(training.model)
    training.model.eval()  # a pass that changes no statistics, for convolutions as operators
    images, _ = next(iter(training.loaders.test))
    training.model(images[:1].to(training.processes.device))
    return spectra(training.optimizer)


def _write_report(
    training: Training,
    history: list[dict[str, Any]],
    start: report.Spectra,
    output: Path,
) -> None:
    recipe, end = training.recipe, _spectra(training)
    text = report.audit_table(start, end, training.optimizer.spectral_norms())
    if recipe.choose is not None:
        text = f"{text}\n\n{audit(training.optimizer)}"
    if not training.processes.is_primary:
        return
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
