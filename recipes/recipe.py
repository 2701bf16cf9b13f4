"""A recipe: one YAML file that says what to train, every entry of it a command-line option."""

import argparse
import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

import timm
import timm.optim
import timm.utils
import yaml

import recipes.networks  # noqa: F401  registers them with timm

FOLDER = Path(__file__).parent
"""Where the recipes that can be called by name lie."""


class RecipeError(ValueError):
    """Something in a recipe, its data or its checkpoint is not as expected."""

    def __init__(self, message: str) -> None:
        # A DataLoader raises what happened in a worker anew, with all of the traceback.
        super().__init__(message.rpartition("recipes.recipe.RecipeError: ")[2].strip())


def _entry(default: Any, description: str) -> Any:
    """Declare an entry with what ``--help`` says of it."""
    metadata = {"help": description}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Recipe:
    """The entries of a recipe file, and of the command line under the same names."""

    model: str = _entry("test_resnet", "name of a timm model")
    model_kwargs: dict[str, Any] = _entry({}, "more for timm.create_model")
    img_size: int = _entry(32, "height and width of the images in pixels")
    channels_last: bool = _entry(False, "keep images and weights with the channels last")

    data: str = _entry("digits", "digits, cifar10, cifar100, stl10, or folder:DIR (train/, test/)")
    data_dir: str = _entry("data", "folder that holds torchvision's data sets, or will")
    download: bool = _entry(False, "fetch a data set of torchvision if it is missing")
    subset: int | None = _entry(None, "train on this many images, drawn once by the seed")
    test_subset: int | None = _entry(None, "test on this many images, drawn once by the seed")
    validation: float = _entry(0.0, "part of the training images to test on, in place of test/")
    transform_kwargs: dict[str, Any] = _entry({}, "training images: timm.data.create_transform")
    batch_size: int = _entry(64, "images a step")
    micro_batch: int | None = _entry(None, "images a pass at most; a batch is summed up of such")
    workers: int = _entry(0, "processes that load images")

    opt: str = _entry("sgd", "name of a timm optimizer (timm's sgd is Nesterov's)")
    lr: float = _entry(0.1, "learning rate at its peak")
    momentum: float = _entry(0.9, "momentum, for optimizers that have one")
    weight_decay: float = _entry(0.0, "weight decay, beside the spectral penalty")
    opt_kwargs: dict[str, Any] = _entry({}, "more for timm.optim.create_optimizer_v2")

    adversarial_eps: float = _entry(0.0, "l2 norm of adversarial perturbations; 0 for none")
    adversarial_alpha: float = _entry(0.5, "share of the loss at the unperturbed images")

    snr_lambda: float = _entry(0.01, "strength of the spectral penalty; 0 switches it off")
    choose: Any = _entry(None, "view or family by name, or choices by pattern, as YAML")
    decoupled: bool = _entry(False, "subtract the term at the step, not through the gradient")
    snr_kwargs: dict[str, Any] = _entry({}, "more for snr_hooks.SNROptimizer")

    sched: str = _entry("cosine", "name of a timm schedule, stepped at every update")
    sched_kwargs: dict[str, Any] = _entry({}, "more for timm.scheduler.create_scheduler_v2")
    epochs: int = _entry(20, "passes over the training images")
    seed: int = _entry(0, "of weights, order, augmentation and subset")
    skip_nonfinite: bool = _entry(False, "skip steps whose loss is NaN or infinite, and say so")

    def __post_init__(self) -> None:
        """Refuse what can be told to be wrong without building anything."""
        least = {"epochs": 1, "batch_size": 1, "img_size": 1, "workers": 0, "seed": 0}
        least |= {"micro_batch": 1, "test_subset": 1, "adversarial_eps": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:
                raise RecipeError(f"expected {name} to be at least {bound}, found {value}")
        if not 0 <= self.validation < 1:
            raise RecipeError(f"expected validation to be in [0, 1), found {self.validation}")
        if not 0 < self.adversarial_alpha <= 1:  # at 0, no gradient would say where to perturb
            found = self.adversarial_alpha
            raise RecipeError(f"expected adversarial_alpha to be in (0, 1], found {found}")
        if self.subset is not None and self.subset < self.batch_size:
            raise RecipeError(
                f"expected subset to hold at least one batch of {self.batch_size}, found "
                f"{self.subset}: lower batch_size or raise subset"
            )
        if ":" not in self.model:  # hf-hub:... and local-dir:... are timm's to resolve
            check_known("model", self.model.partition(".")[0], timm.list_models())
        check_known("optimizer", self.opt, timm.optim.list_optimizers())


PLACE = {"data_dir", "download", "workers"}
"""Entries that say where and how images are loaded, and do not touch the result."""


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], free: set[str]) -> list[str]:
    """Say in which entries two recipes differ.

    Args:
        saved: One recipe as a mapping, from a file.
        current: The other one.
        free: Entries that may differ.

    Returns:
        A sentence for each of the others that does.
    """
    return [
        f"{key} is {saved.get(key)!r} there and {current.get(key)!r} here"
        for key in sorted(saved.keys() | current.keys())
        if key not in free and saved.get(key) != current.get(key)
    ]


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
    return typed(*load("recipe", name, FOLDER))


def load(what: str, name: str, folder: Path) -> tuple[Any, str]:
    """Read a YAML file.

    Args:
        what: What it holds, for messages.
        name: A file of the folder by its name, or the path of a YAML file.
        folder: Where files that can be called by name lie.

    Returns:
        Its content and its path.

    Raises:
        RecipeError: There is no such file, or it is not YAML.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.is_file():
        if path.parent == folder:
            check_known(what, name, (known.stem for known in folder.glob("*.yaml")))
        raise RecipeError(f"expected a file that holds the {what}, found none at {path}")
    try:
        return yaml.load(path.read_text(), _Loader), str(path)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {error}") from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key!r} is given more than once\n{node.start_mark}")
        return super().construct_mapping(node, deep)


def typed(entries: Any, place: str) -> dict[str, Any]:
    """Check entries of a recipe that were read from a file.

    Args:
        entries: A mapping of entries to values.
        place: Where it was read, for messages.

    Returns:
        The same with values of the right types.

    Raises:
        RecipeError: An entry is unknown, or a value is not of its type.
    """
    if not isinstance(entries, dict):
        raise RecipeError(f"expected {place} to map keys to values, found {entries!r}")
    known = {entry.name: entry for entry in dataclasses.fields(Recipe)}
    for key in entries:
        check_known(f"key in {place}", str(key), known)
    return {key: _typed(known[key], value, place) for key, value in entries.items()}


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Lay entries over one another; mappings such as ``model_kwargs`` are joined."""
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            below = result.get(key)
            if isinstance(value, dict) and isinstance(below, dict):
                value = {**below, **value}
            result[key] = value
    return result


def parse(arguments: Sequence[str] | None) -> tuple[Recipe, argparse.Namespace]:
    """Turn a command line into a recipe and the options of the run.

    Args:
        arguments: The command line; None for that of the process.

    Returns:
        The recipe, with every entry that the command line overrides, and a namespace
        with ``output`` (where the run is written), ``fresh`` (whether to start over) and
        ``fsdp`` (whether to shard the model over processes).

    Raises:
        RecipeError: An entry is unknown or out of range.
    """
    parser = argparse.ArgumentParser(
        prog="python -m recipes.train",
        description="Train a timm model with spectral norm regularization.",
        epilog="The same command continues an interrupted run.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    names = ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))
    parser.add_argument("recipe", help=f"name of a recipe ({names}), or path of a YAML file")
    parser.add_argument(
        "--output", type=Path, default=None, help="folder for the run (default runs/<recipe>)"
    )
    parser.add_argument(
        "--fresh", action="store_true", default=False, help="start over instead of continuing"
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        default=False,
        help="under torchrun: each process holds a part of every weight, not all weights",
    )
    group = parser.add_argument_group("entries of the recipe")
    for entry in dataclasses.fields(Recipe):
        group.add_argument(f"--{entry.name.replace('_', '-')}", **_option(entry))
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        check_known("option", unknown[0], flags)
        raise RecipeError(f"expected no more arguments, found {' '.join(unknown)!r}")
    options = vars(known)
    kept = ("recipe", "output", "fresh", "fsdp")
    run = argparse.Namespace(**{key: options.pop(key) for key in kept})
    run.output = run.output or Path("runs") / Path(run.recipe).stem
    return Recipe(**merged(read(run.recipe), options)), run


def _option(entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """Return the argparse options of one entry."""
    kind, description = _kind(entry), {"help": entry.metadata["help"]}
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction} | description
    if kind is Any:
        return {"type": _yaml, "metavar": "YAML"} | description
    if kind is dict:
        return {"nargs": "*", "action": _KeyValues, "metavar": "KEY=VALUE"} | description
    return {"type": kind, "metavar": kind.__name__.upper()} | description


def _yaml(text: str) -> Any:
    """Read one value of the command line as YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"expected YAML, found {text!r}: {error}") from error


class _KeyValues(timm.utils.ParseKwargs):  # type: ignore[misc]
    """timm's parser of KEY=VALUE, with a message for what is not of that form."""

    def __call__(
        self, parser: Any, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        for value in values:
            if "=" not in value:
                raise RecipeError(f"expected KEY=VALUE after {option_string}, found {value!r}")
        super().__call__(parser, namespace, values, option_string)


def _typed(entry: dataclasses.Field[Any], value: Any, place: str) -> Any:
    """Convert an entry of a YAML file; YAML reads 1e-3, for one, as a string."""
    kind = _kind(entry)
    if kind is Any or (value is None and entry.default is None):
        return value
    try:
        if kind in (bool, dict) and not isinstance(value, kind):
            raise TypeError
        typed = kind(value)
        if kind is int and typed != float(value):
            raise ValueError
    except (TypeError, ValueError):
        message = f"expected {entry.name} in {place} to be {kind.__name__}, found {value!r}"
        raise RecipeError(message) from None
    return typed


def _kind(entry: dataclasses.Field[Any]) -> Any:
    """Return the class of an entry's values: that of ``dict[str, Any]`` is dict."""
    kind = next((a for a in get_args(entry.type) if a is not type(None)), entry.type)
    return get_origin(entry.type) if get_origin(entry.type) is dict else kind
