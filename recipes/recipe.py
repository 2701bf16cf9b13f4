"""A recipe: one YAML file that says what to train, every entry of it a command-line option."""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import timm
import timm.optim
import timm.utils
import yaml

FOLDER = Path(__file__).parent
"""Where the recipes that can be called by name lie."""


class RecipeError(ValueError):
    """Something in a recipe, its data or its checkpoint is not as expected."""


@dataclass(frozen=True)
class Recipe:
    """The entries of a recipe file, and of the command line under the same names.

    The ``*_kwargs`` are passed on to the function named in their comment.
    """

    model: str = "test_resnet"
    model_kwargs: dict[str, Any] = field(default_factory=dict)  # timm.create_model
    img_size: int = 32

    data: str = "digits"  # digits, cifar10, cifar100, or folder:DIR with train/ and test/
    data_dir: str = "data"  # where cifar10 and cifar100 lie, or are downloaded to
    download: bool = False
    subset: int | None = None  # train on this many images, drawn once by the seed
    transform_kwargs: dict[str, Any] = field(default_factory=dict)  # timm.data.create_loader
    batch_size: int = 64
    workers: int = 0

    opt: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 0.0
    opt_kwargs: dict[str, Any] = field(default_factory=dict)  # timm.optim.create_optimizer_v2

    snr_lambda: float = 0.01
    snr_kwargs: dict[str, Any] = field(default_factory=dict)  # snr_hooks.SNROptimizer

    sched: str = "cosine"
    sched_kwargs: dict[str, Any] = field(default_factory=dict)  # timm create_scheduler_v2
    epochs: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what can be told to be wrong without building anything."""
        for name in ("epochs", "batch_size", "img_size"):
            if getattr(self, name) < 1:
                raise RecipeError(f"expected {name} to be at least 1, found {getattr(self, name)}")
        if self.subset is not None and self.subset < self.batch_size:
            raise RecipeError(
                f"expected subset to hold at least one batch of {self.batch_size}, found "
                f"{self.subset}: lower batch_size or raise subset"
            )
        check_known("model", self.model.partition(".")[0], timm.list_models())
        check_known("optimizer", self.opt, timm.optim.list_optimizers())


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise RecipeError with the nearest names if a name is not among the known ones."""
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or sorted(known)[:5]
        raise RecipeError(f"unknown {what} {name!r}; nearest: {', '.join(near)}")


def read(name: str) -> dict[str, Any]:
    """Read a recipe file.

    Args:
        name: A recipe of this folder by its name, or the path of a YAML file.

    Returns:
        Its entries, checked.

    Raises:
        RecipeError: There is no such recipe, or the file is not one.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        if path.parent == FOLDER:
            check_known("recipe", name, (known.stem for known in FOLDER.glob("*.yaml")))
        raise RecipeError(f"expected a recipe file, found none at {path}")
    try:
        entries = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(entries, dict):
        raise RecipeError(f"expected {path} to map keys to values, found {entries!r}")
    known = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    for key in entries:
        check_known(f"key in {path}", str(key), known)
    return {key: _typed(known[key], value, path) for key, value in entries.items()}


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """Turn a command line into a recipe and the options of the run.

    Args:
        arguments: The command line; None for that of the process.

    Returns:
        The recipe, with every entry that the command line overrides, and a namespace
        with ``output`` (where the run is written) and ``fresh`` (whether to start over).

    Raises:
        RecipeError: An entry is unknown or out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train",
        description="Train a timm model with spectral norm regularization.",
        epilog="The same command continues an interrupted run.",
        argument_default=argparse.SUPPRESS,
    )
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    parser.add_argument("recipe", help=f"name of a recipe ({names}), or path of a YAML file")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for the run (default runs/<recipe>)"
    )
    parser.add_argument(
        "--fresh", action="store_true", default=False, help="start over instead of continuing"
    )
    group = parser.add_argument_group("entries of the recipe")
    for entry in dataclasses.fields(Recipe):
        group.add_argument(f"--{entry.name.replace('_', '-')}", **_option(entry))
    options = vars(parser.parse_args(arguments))
    run = argparse.Namespace(**{key: options.pop(key) for key in ("recipe", "output", "fresh")})
    run.output = run.output or Path("runs") / Path(run.recipe).stem
    entries = read(run.recipe)
    for key, value in options.items():
        entries[key] = {**entries.get(key, {}), **value} if isinstance(value, dict) else value
    return Recipe(**entries), run


def _option(entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return the argparse options of one entry."""
    kind = _kind(entry)
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is dict:
        return {"nargs": "*", "action": timm.utils.ParseKwargs, "metavar": "KEY=VALUE"}
    return {"type": kind, "metavar": kind.__name__.upper()}


def _typed(entry: dataclasses.Field[Any], value: Any, path: Path) -> Any:
    """Convert an entry of a YAML file; YAML reads 1e-3, for one, as a string."""
    kind = _kind(entry)
    if value is None and entry.default is None:
        return None
    try:
        if kind in (bool, dict) and not isinstance(value, kind):
            raise TypeError
        typed = kind(value)
        if kind is int and typed != float(value):
            raise ValueError
    except (TypeError, ValueError):
        message = f"expected {entry.name} in {path} to be {kind.__name__}, found {value!r}"
        raise RecipeError(message) from None
    return typed


def _kind(entry: dataclasses.Field[Any]) -> Any:
    """Return the class of an entry's values: that of ``dict[str, Any]`` is dict."""
    kind = next((a for a in get_args(entry.type) if a is not type(None)), entry.type)
    return get_origin(entry.type) if get_origin(entry.type) is dict else kind
