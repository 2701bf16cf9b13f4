"""Images for a recipe: the digits that ship with scikit-learn, torchvision's, or a folder's."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm.data
import torch
import torchvision.datasets
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.datasets import ImageFolder

from recipes.processes import ALONE, Processes
from recipes.recipe import Recipe, RecipeError, check_known

TORCHVISION: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "cifar10": (torchvision.datasets.CIFAR10, {"train": True}, {"train": False}),
    "cifar100": (torchvision.datasets.CIFAR100, {"train": True}, {"train": False}),
    "stl10": (torchvision.datasets.STL10, {"split": "train"}, {"split": "test"}),
}
"""Classes, and their options for the two splits."""

SMALL = 96
"""Images of at most so many pixels a side are kept in memory."""


class Loaders(NamedTuple):
    """Loaders of (images, labels) batches.

    Attributes:
        train: Training images with their random transforms, in random order, full batches.
        train_eval: As many training images as there are test images, as these are transformed.
        test: All test images, or those held out for validation.
    """

    train: DataLoader[Any]
    train_eval: DataLoader[Any]
    test: DataLoader[Any]


class Datasets(NamedTuple):
    """Data sets of (PIL image, label), and the number of classes."""

    train: Any
    test: Any
    n_classes: int


class Digits(Dataset[tuple[Image.Image, int]]):
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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], self.labels[index]


class Selection(Dataset[tuple[Any, int]]):
    """Some images of a data set, each through a transform.

    Args:
        dataset: Of (PIL image, label).
        indices: Which of them.
        transform: What becomes of an image.
    """

    def __init__(
        self, dataset: Any, indices: Sequence[int], transform: Callable[[Image.Image], Any]
    ) -> None:
        self.dataset, self.indices, self.transform = dataset, list(indices), transform
        if isinstance(dataset, ImageFolder):
            dataset.loader.read([dataset.samples[index][0] for index in self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = self.dataset[self.indices[index]]
        return self.transform(image), label


class Decoder:
    """Decodes image files, small ones only once, and names a file that it cannot decode."""

    def __init__(self) -> None:
        self.kept: dict[str, NDArray[np.uint8]] = {}

    def read(self, paths: Sequence[str]) -> None:
        """Decode files ahead, up to the first large one, so that worker processes share them.

        Args:
            paths: The files.
        """
        for path in paths:
            if max(self(path).size) > SMALL:
                return

    def __call__(self, path: str) -> Image.Image:
        """Decode a file.

        Args:
            path: The file.

        Returns:
            The image in RGB.

        Raises:
            RecipeError: The file is no image, or a damaged one.
        """
        if path in self.kept:
            return Image.fromarray(self.kept[path])
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise RecipeError(
                f"expected an image in {path}: {error}; replace the file or remove it"
            ) from None
        if max(image.size) <= SMALL:
            self.kept[path] = np.asarray(image)
        return image


def create_datasets(recipe: Recipe) -> Datasets:
    """Open the data of a recipe.

    Args:
        recipe: Says which data, where they are and whether to download them.

    Returns:
        The data sets.

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
        recipe: Says batch size, subsets, validation part and training transforms.
        datasets: From ``create_datasets``.
        config: Input size, mean and so on, from ``timm.data.resolve_data_config``.
        processes: Which share of the images to load.

    Returns:
        The loaders. Order (of a single process) and augmentation are drawn from the global
        random streams. Test images are repeated at the end until all processes have as many.

    Raises:
        RecipeError: There is no full batch, it cannot be shared out, a transform is unknown, or
            a small image cannot be decoded.
    """
    rank, size, *_ = processes
    if recipe.batch_size % size:
        raise RecipeError(
            f"expected a batch_size that {size} processes can share evenly, found "
            f"{recipe.batch_size}"
        )
    selections = _select(recipe, datasets, *_transforms(recipe, config))
    train = selections[0]
    if len(train) < recipe.batch_size:
        raise RecipeError(
            f"expected at least one batch of {recipe.batch_size} training images, found "
            f"{len(train)} images of {recipe.data!r} (less what subset and validation leave "
            "out): lower batch_size"
        )
    options: dict[str, Any] = {
        "batch_size": recipe.batch_size // size,
        "num_workers": recipe.workers,
    }
    order: dict[str, Any] = {"shuffle": True}
    if size > 1:
        sampler: DistributedSampler[Any] = DistributedSampler(
            train, size, rank, seed=recipe.seed, drop_last=True
        )
        order = {"sampler": sampler}
    loaders = [DataLoader(train, drop_last=True, **order, **options)]
    if recipe.micro_batch is not None:
        options["batch_size"] = min(options["batch_size"], recipe.micro_batch)
    for selection in selections[1:]:
        share: DistributedSampler[Any] = DistributedSampler(selection, size, rank, shuffle=False)
        loaders.append(DataLoader(selection, sampler=share, **options))
    return Loaders(*loaders)


def _transforms(recipe: Recipe, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the transforms of training and test images."""
    kept = ("input_size", "mean", "std", "interpolation")
    config = {key: config[key] for key in kept}
    transform = timm.data.create_transform
    try:
        train = transform(**(config | recipe.transform_kwargs), is_training=True)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"refused transform_kwargs: {error}") from None
    return train, transform(**config, crop_pct=1.0)


def _select(
    recipe: Recipe, datasets: Datasets, train_transform: Any, test_transform: Any
) -> tuple[Selection, Selection, Selection]:
    """Return the images to train on, some of them to measure on, and those to test on."""
    train, test, _ = datasets
    for key, images in (("subset", train), ("test_subset", test)):
        wanted = getattr(recipe, key)
        if wanted is not None and wanted > len(images):
            raise RecipeError(f"expected {key} to be at most {len(images)}, found {wanted}")
    order = _permutation(len(train), recipe.seed)
    chosen = order[: recipe.subset]
    n_held_out = round(recipe.validation * len(chosen))
    if recipe.validation and not 0 < n_held_out < len(chosen):
        raise RecipeError(
            f"expected validation to leave images on both sides, found {recipe.validation} of "
            f"{len(chosen)} images"
        )
    chosen, held_out = chosen[n_held_out:], chosen[:n_held_out]
    if held_out:
        test, tested = train, held_out
    elif recipe.test_subset is not None:
        tested = _permutation(len(test), recipe.seed)[: recipe.test_subset]
    else:
        tested = list(range(len(test)))
    in_order = chosen if recipe.subset is not None else sorted(chosen)
    return (
        Selection(train, in_order, train_transform),
        Selection(train, chosen[: len(tested)], test_transform),
        Selection(test, tested, test_transform),
    )


def _permutation(n: int, seed: int) -> list[int]:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()


def _torchvision(name: str, recipe: Recipe) -> tuple[Any, Any]:
    create, *splits = TORCHVISION[name]
    options = {"root": recipe.data_dir, "download": recipe.download}
    try:
        train, test = (create(**split, **options) for split in splits)
    except (RuntimeError, OSError) as error:  # missing or corrupted, or no network
        raise RecipeError(
            f"expected {name} in the folder {recipe.data_dir!r}: {error}; pass --download to "
            "fetch it, or --data-dir to say where it is"
        ) from None
    return train, test


def _folder(folder: str, split: str) -> ImageFolder:
    path = Path(folder) / split
    if not path.is_dir():
        raise RecipeError(
            f"expected {folder!r} to hold train/ and test/ with a folder of images for each "
            f"class, found no {path}"
        )
    try:
        return ImageFolder(str(path), loader=Decoder())
    except FileNotFoundError as error:
        raise RecipeError(
            f"expected a folder of images for each class in {path}: {error}"
        ) from None
