"""The paper's experiment: ``python -m recipes.compare digits``.

An experiment crosses networks, batches and methods. For every cell the learning rate is chosen
among the same ones, by the accuracy on a part of the training images that is held out for that.
With the chosen one each seed is then trained on all training images and measured on the test
images. Every finished training is a file, so that the same command goes on where an earlier one
stopped. At the end stand tables, figures and a report in one HTML file.
"""

import argparse
import dataclasses
import functools
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from recipes import train
from recipes.comparison import Comparison
from recipes.comparison_report import write_report
from recipes.data import Datasets, create_datasets
from recipes.experiment import FOLDER, Cell, Experiment, Run, read_experiment
from recipes.measures import best_accuracy, hessian_eigenvalue, sensitivity
from recipes.recipe import PLACE, Recipe, RecipeError, differences
from recipes.report import write_json
from snr_hooks import spectra

EXPLODED = 10
"""A loss so many times that of guessing, at the end, counts as diverged."""

DIGITS = 5
"""Significant digits of singular values in a run's file."""


_work_done: "SimpleQueue[int] | None" = None
"""In a process that trains: where it says how far it is."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; on bad input, exit with a message in place of a traceback."""
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    parser = argparse.ArgumentParser(
        prog="python -m recipes.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("experiment", help=f"name of an experiment ({names}), or a YAML file")
    parser.add_argument("--output", type=Path, help="default: runs/compare/<experiment>")
    parser.add_argument("--data", help="in place of the experiment's")
    parser.add_argument("--data-dir", help="in place of the experiment's")
    parser.add_argument("--download", action="store_true", help="fetch the data if missing")
    parser.add_argument(
        "--report", action="store_true", help="train nothing, report what is finished"
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (default 1)")
    options = parser.parse_args(arguments)
    given = {"data": options.data, "data_dir": options.data_dir}
    given |= {"download": options.download or None}
    try:
        experiment = read_experiment(options.experiment)
        for entries in experiment.cells.values():
            entries.update({key: value for key, value in given.items() if value is not None})
        output = options.output or Path("runs/compare") / experiment.name
        if options.report:
            report(experiment, output)
        else:
            compare(experiment, output, options.jobs)
    except RecipeError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues after the last finished training")


def compare(experiment: Experiment, output: Path, jobs: int = 1) -> Comparison:
    """Run what is missing of an experiment and write the report.

    Args:
        experiment: From ``read_experiment``.
        output: Folder for the files of the trainings and the report.
        jobs: How many trainings at a time.

    Returns:
        The results.

    Raises:
        RecipeError: A recipe cannot be built, or the folder holds another experiment.
    """
    if jobs < 1:
        raise RecipeError(f"expected at least 1 job, found {jobs}")
    selection = experiment.selection()
    _datasets.cache_clear()  # files may have changed since an earlier call
    for run in selection:
        if run.recipe.lr == experiment.learning_rates[0]:
            _rehearse(run)
    try:
        output.mkdir(parents=True, exist_ok=True)
        _finish(selection, experiment, output, jobs, "choosing lr")
        runs = experiment.runs(finished(experiment, output).chosen())
        _finish(runs, experiment, output, jobs, "comparing")
        return report(experiment, output)
    except OSError as error:
        raise RecipeError(f"expected to write to the folder {output}: {error}") from None


def report(experiment: Experiment, output: Path) -> Comparison:
    """Write the report of what is finished of an experiment.

    Args:
        experiment: From ``read_experiment``.
        output: Folder that holds the files of the trainings.

    Returns:
        The results.

    Raises:
        RecipeError: Nothing is finished, or what ``finished`` refuses.
    """
    comparison = finished(experiment, output)
    if not comparison.selected:
        raise RecipeError(f"expected finished trainings in the folder {output}, found none")
    write_report(comparison, output)
    return comparison


def _rehearse(run: Run) -> None:
    """Build what a run needs and measure on two images, to fail before any training."""
    try:
        training = train.build(run.recipe, datasets=_datasets(*_data(run.recipe)))
        images = Subset(training.loaders.train_eval.dataset, range(2))
        hessian_eigenvalue(training.model, DataLoader(images, 2), max_restarts=1)
    except RecipeError as error:
        raise RecipeError(f"{', '.join(run.cell)}: {error}") from None


def finished(experiment: Experiment, output: Path) -> Comparison:
    """Read what is finished of an experiment.

    Args:
        experiment: From ``read_experiment``.
        output: Folder that holds the files of the trainings.

    Returns:
        The results so far; those on the test set of cells whose learning rate is chosen.

    Raises:
        RecipeError: The folder holds another experiment, or a damaged file.
    """
    selected = [_load(run, experiment, output) for run in experiment.selection()]
    comparison = Comparison(experiment, [result for result in selected if result], [])
    runs = experiment.runs(comparison.chosen())
    results = [_load(run, experiment, output) for run in runs]
    return dataclasses.replace(comparison, results=[result for result in results if result])


def _finish(
    runs: Sequence[Run], experiment: Experiment, output: Path, jobs: int, title: str
) -> None:
    """Train what has no file yet."""
    missing = [run for run in runs if _load(run, experiment, output) is None]
    total, to_do = (sum(_work(run.recipe) for run in some) for some in (runs, missing))
    with tqdm(
        desc=title,
        total=total,
        initial=total - to_do,
        unit="epoch",
        mininterval=0.1 if sys.stderr.isatty() else 10,
    ) as bar:
        for run, result in _results(missing, experiment.hessian_images, jobs, bar):
            path = _path(run, output)
            path.parent.mkdir(exist_ok=True)
            write_json(path, result)
            bar.set_postfix_str(f"{run.name}: {_outcome(result)}")


def _work(recipe: Recipe) -> int:
    """Return roughly how long a training takes, in epochs without perturbed images."""
    return recipe.epochs * (2 if recipe.adversarial_eps else 1)


def _outcome(result: dict[str, Any]) -> str:
    if result["diverged"]:
        return "diverged"
    return f"{best_accuracy(result['history']):.1f} %"


def _results(
    runs: Sequence[Run], hessian_images: int, jobs: int, bar: "tqdm[Any]"
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Yield each run with its result as it finishes; move the bar on with every epoch."""
    if jobs == 1:
        for run in runs:
            bar.set_postfix_str(run.name)
            yield run, trial(run, hessian_images, bar.update)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads
    threads = max(1, (os.cpu_count() or 1) // jobs)
    work: SimpleQueue[int] = context.SimpleQueue()
    with ProcessPoolExecutor(jobs, context, initializer=_start, initargs=(threads, work)) as pool:
        futures = {pool.submit(_trial, run, hessian_images): run for run in runs}
        try:
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                while not work.empty():
                    bar.update(work.get())
                for future in done:
                    yield futures[future], future.result()
        except BrokenProcessPool:
            raise RecipeError(
                "a process that trains was killed, perhaps for its memory: the same command "
                "continues, and fewer --jobs need less"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start(threads: int, work: "SimpleQueue[int]") -> None:
    """Prepare a process that trains, and end it with the one that started it."""
    global _work_done
    torch.set_num_threads(threads)
    _work_done = work
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _trial(run: Run, hessian_images: int) -> dict[str, Any]:
    """Train and measure in a process that ``_start`` has prepared."""
    assert _work_done is not None
    return trial(run, hessian_images, _work_done.put)


def trial(
    run: Run, hessian_images: int, advance: Callable[[int], object] = lambda _: None
) -> dict[str, Any]:
    """Train and measure.

    Args:
        run: What to train; without measurements other than accuracy if it chooses a learning
            rate.
        hessian_images: Over how many training images the Hessian is averaged at most.
        advance: Is called with the amount of work that has been done.

    Returns:
        The result, as it is written to the run's file.
    """
    recipe, start = run.recipe, time.monotonic()
    datasets = _datasets(*_data(recipe))
    training = train.build(recipe, datasets=datasets)
    result: dict[str, Any] = {
        "cell": run.cell._asdict(),
        "recipe": dataclasses.asdict(recipe),
        "diverged": None,
        "history": [],
        "n_train": len(training.loaders.train.dataset),  # type: ignore[arg-type]
        "n_test": len(training.loaders.test.dataset),  # type: ignore[arg-type]
        "n_steps": recipe.epochs * len(training.loaders.train),
        "n_parameters": sum(p.numel() for p in training.model.parameters()),
        "machine": f"{training.processes.device.type}, torch {torch.__version__}",
    }
    try:
        with tqdm(disable=True) as bar:
            for row in train.train(training, bar):
                if not recipe.validation:
                    row |= train.evaluate(training, "train_eval")
                result["history"].append(row)
                advance(_work(recipe) // recipe.epochs)
                _check_finite(row)
        _check_trained(row, datasets.n_classes)
        if not recipe.validation:
            result |= _measure(training, hessian_images)
    except train.DivergenceError as error:
        result["diverged"] = error.what
        advance(_work(recipe) // recipe.epochs * (recipe.epochs - len(result["history"])))
    result["seconds"] = round(time.monotonic() - start, 1)
    return result


def _check_finite(row: dict[str, Any]) -> None:
    """Refuse weights that the last step has broken, which no training loss has seen."""
    for name in ("test_loss", "train_eval_loss"):
        if not math.isfinite(row.get(name, 0)):
            raise train.DivergenceError(f"{name} is {row[name]} after epoch {row['epoch'] + 1}")


def _check_trained(row: dict[str, Any], n_classes: int) -> None:
    """Refuse weights that are finite, but far from anything trained."""
    guessing = math.log(n_classes)
    if row["train_loss"] > EXPLODED * guessing:
        raise train.DivergenceError(
            f"the training loss is {row['train_loss']:.3g} in the last epoch, where guessing has "
            f"{guessing:.3g}"
        )


def _measure(training: train.Training, hessian_images: int) -> dict[str, Any]:
    """Return the measurements that are made once, after training."""
    model, loaders = training.model, training.loaders
    images = loaders.train_eval.dataset
    few = Subset(images, range(min(hessian_images, len(images))))  # type: ignore[arg-type]
    eigenvalue = hessian_eigenvalue(model, DataLoader(few, loaders.train_eval.batch_size))
    return {
        "sensitivity": {
            "train": sensitivity(model, loaders.train_eval),
            "test": sensitivity(model, loaders.test),
        },
        "hessian": eigenvalue._asdict(),
        "spectra": {
            name: [float(f"{value:.{DIGITS}g}") for value in values.tolist()]
            for name, values in spectra(model).items()
        },
    }


def _data(recipe: Recipe) -> tuple[str, str, bool]:
    return recipe.data, recipe.data_dir, recipe.download


@functools.lru_cache(maxsize=1)
def _datasets(data: str, data_dir: str, download: bool) -> Datasets:
    """Open data once for all trainings of a process."""
    return create_datasets(Recipe(data=data, data_dir=data_dir, download=download))


def _path(run: Run, output: Path) -> Path:
    folder = "selection" if run.recipe.validation else "runs"
    return output / folder / f"{run.name}.json"


def _load(run: Run, experiment: Experiment, output: Path) -> dict[str, Any] | None:
    """Read the file of a run; None if there is none yet."""
    path = _path(run, output)
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        saved, _, cell = result["recipe"], result["seconds"], Cell(**result["cell"])
        n_measured = min(result["n_train"], result["n_test"], experiment.hessian_images)
        measured = result["hessian"]["n_images"] if "hessian" in result else n_measured
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RecipeError(
            f"expected the result of a training in {path}, found a damaged file ({error!r}): "
            "remove it, and the same command trains it again"
        ) from None
    current = json.loads(json.dumps(dataclasses.asdict(run.recipe)))
    differing = differences(saved, current, PLACE)
    if cell != run.cell:
        differing.append(f"it is of {', '.join(cell)} there and of {', '.join(run.cell)} here")
    if measured != n_measured:
        differing.append(f"hessian_images is {measured} there and {n_measured} here")
    if differing:
        raise RecipeError(
            f"{path} belongs to another recipe ({'; '.join(differing)}): pass another --output, "
            "or remove what it holds of the other experiment"
        )
    return dict(result)


if __name__ == "__main__":
    main()
