"""Images for a recipe: the digits that ship with scikit-learn, torchvision's, or a folder's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm.data
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset

from recipes.processes import ALONE, Processes
from recipes.recipe import Recipe, RecipeError, check_known

TORCHVISION = ("cifar10", "cifar100")


class Loaders(NamedTuple):
    """Loaders of (images, labels) batches."""

    train: DataLoader[Any]
    test: DataLoader[Any]


class Datasets(NamedTuple):
    """Data sets with settable transforms, and the number of classes."""

    train: Any
    test: Any
    n_classes: int


class Digits(Dataset[tuple[Any, int]]):
    """Handwritten digits, 8 x 8 pixels, from scikit-learn's wheel (UCI, 1797 images).

    Args:
        split: ``"train"`` (1437 images) or ``"test"`` (360), stratified, always the same.
    """

    def __init__(self, split: str) -> None:
        digits = load_digits()
        halves = train_test_split(
            digits.images, digits.target, test_size=0.2, random_state=0, stratify=digits.target
        )
        first = 0 if split == "train" else 1
        grey = (halves[first] * (255 / 16)).astype(np.uint8)
        self.images = [Image.fromarray(image).convert("RGB") for image in grey]
        self.labels: list[int] = halves[first + 2].tolist()
        self.classes = [str(name) for name in digits.target_names]
        self.transform: Callable[[Any], Any] = lambda image: image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.images[index]), self.labels[index]


def create_datasets(recipe: Recipe) -> Datasets:
    """Open the data of a recipe.

    Args:
        recipe: Says which data, where they are and whether to download them.

    Returns:
        The data sets, still without transforms.

    Raises:
        RecipeError: The data are unknown, missing, or disagree about the classes.
    """
    name, separator, folder = recipe.data.partition(":")
    if separator:
        check_known("kind of data", name, ["folder"])
        train, test = _folder(folder, "train"), _folder(folder, "test")
    else:
        check_known("data set", name, ["digits", *TORCHVISION, "folder:DIR"])
        splits = Digits("train"), Digits("test")
        train, test = splits if name == "digits" else _torchvision(name, recipe)
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise RecipeError(
            f"expected train/ and test/ to hold the same classes, found {differing} in only one"
        )
    return Datasets(train, test, len(train.classes))


def create_loaders(
    recipe: Recipe,
    datasets: Datasets,
    config: dict[str, Any],
    processes: Processes = ALONE,
) -> Loaders:
    """Create the loaders of a recipe.

    Several processes share each batch of the recipe out. Their order is drawn by the seed and
    by ``loader.sampler.set_epoch``.

    Args:
        recipe: Says batch size, subset and training transforms.
        datasets: From ``create_datasets``; gets its transforms here.
        config: Input size, mean and so on, from ``timm.data.resolve_data_config``.
        processes: Which share of the images to load.

    Returns:
        The loaders. Order (of a single process) and augmentation are drawn from the global
        random streams. Test images are repeated at the end until all processes have as many.

    Raises:
        RecipeError: There is no full batch, it cannot be shared out, or a transform is unknown.
    """
    kept = ("input_size", "mean", "std", "interpolation")
    config = {key: config[key] for key in kept}
    transform = timm.data.create_transform
    train, test, _ = datasets
    try:
        train.transform = transform(**(config | recipe.transform_kwargs), is_training=True)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"refused transform_kwargs: {error}") from None
    test.transform = transform(**config, crop_pct=1.0)
    if recipe.subset is not None:
        generator = torch.Generator().manual_seed(recipe.seed)
        chosen = torch.randperm(len(train), generator=generator)[: recipe.subset]
        train = Subset(train, chosen.tolist())
    if len(train) < recipe.batch_size:
        raise RecipeError(
            f"expected at least one batch of {recipe.batch_size} training images, found "
            f"{len(train)} images in {recipe.data!r}: lower batch_size"
        )
    rank, size, *_ = processes
    if recipe.batch_size % size:
        raise RecipeError(
            f"expected a batch_size that {size} processes can share evenly, found "
            f"{recipe.batch_size}"
        )
    options: dict[str, Any] = {
        "batch_size": recipe.batch_size // size,
        "num_workers": recipe.workers,
    }
    if size == 1:
        return Loaders(
            DataLoader(train, shuffle=True, drop_last=True, **options), DataLoader(test, **options)
        )
    order: DistributedSampler[Any] = DistributedSampler(
        train, size, rank, seed=recipe.seed, drop_last=True
    )
    share: DistributedSampler[Any] = DistributedSampler(test, size, rank, shuffle=False)
    return Loaders(
        DataLoader(train, sampler=order, drop_last=True, **options),
        DataLoader(test, sampler=share, **options),
    )


def _torchvision(name: str, recipe: Recipe) -> tuple[Any, Any]:
    options = {"root": recipe.data_dir, "download": recipe.download}
    try:
        return (
            timm.data.create_dataset(f"torch/{name}", split="train", **options),
            timm.data.create_dataset(f"torch/{name}", split="validation", **options),
        )
    except (RuntimeError, OSError) as error:  # missing or corrupted, or no network
        raise RecipeError(
            f"expected {name} in the folder {recipe.data_dir!r}: {error}; pass --download to "
            "fetch it, or --data-dir to say where it is"
        ) from None


def _folder(folder: str, split: str) -> Any:
    path = Path(folder) / split
    if not path.is_dir():
        raise RecipeError(
            f"expected {folder!r} to hold train/ and test/ with a folder of images for each "
            f"class, found no {path}"
        )
    try:
        return timm.data.create_dataset("torch/image_folder", root=str(path), search_split=False)
    except FileNotFoundError as error:
        raise RecipeError(
            f"expected a folder of images for each class in {path}: {error}"
        ) from None
