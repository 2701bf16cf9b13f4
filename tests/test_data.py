"""The images of recipes: real on-disk formats, splits, decoding once, and damaged files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes.data import Digits
from recipes.recipe import Recipe, RecipeError, read
from recipes.train import build, main, run

TOY = {"epochs": 2, "subset": 64, "batch_size": 32}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, unrendered):
    """Run in an empty folder, so that nothing lands in the repository."""
    monkeypatch.chdir(tmp_path)


def toy(**entries):
    return Recipe(**{**read("digits"), **TOY, **entries})


def image_folder(root, classes=("a", "b"), splits=("train", "test"), n=8):
    for split in splits:
        for i, name in enumerate(classes):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for j in range(n):
                pixels = np.full((12, 10, 3), 60 * i + j, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{j}.png")


def test_digits_are_split_without_overlap_into_equal_classes():
    train, test = Digits("train"), Digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert len(train.classes) == 10
    counts = np.bincount(test.labels)
    assert counts.min() >= 35
    assert train[0][0].mode == "RGB"


def test_a_folder_of_images():
    image_folder("images")
    recipe = toy(data="folder:images", subset=None, batch_size=4, epochs=1)
    loaders = build(recipe).loaders
    assert len(loaders.train.dataset) == len(loaders.test.dataset) == 16
    run(recipe, Path("out"))
    assert len(Path("out/metrics.csv").read_text().splitlines()) == 2


def write_cifar10(root, n=20):
    """Write random images in the on-disk format of CIFAR-10's python version."""
    folder = Path(root, "cifar-10-batches-py")
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        batch = {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(n)],
        }
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))


def test_cifar10_from_files_in_the_real_format(monkeypatch):
    write_cifar10("data")
    # The files are not those whose checksums torchvision knows.
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    training = build(toy(data="cifar10", subset=None))
    assert len(training.loaders.train.dataset) == 100
    assert training.model.fc.out_features == 10


def test_download_is_passed_to_torchvision(monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        raise RuntimeError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", download)
    with pytest.raises(RecipeError, match="no network in tests"):
        build(toy(data="cifar10", download=True, data_dir="there"))
    assert calls == ["there"]


def test_the_subset_is_drawn_by_the_seed():
    chosen = [build(toy(seed=seed)).loaders.train.dataset.indices for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 64


def test_folders_whose_classes_differ():
    image_folder("images", splits=["train"])
    image_folder("images", classes=("a", "c"), splits=["test"])
    with pytest.raises(RecipeError, match=r"found \['b', 'c'\] in only one"):
        build(toy(data="folder:images"))


def test_folders_without_classes():
    for split in ("train", "test"):
        Path("images", split).mkdir(parents=True)
    with pytest.raises(RecipeError, match="expected a folder of images for each class"):
        build(toy(data="folder:images"))


def test_too_few_images():
    image_folder("images", n=2)
    with pytest.raises(RecipeError, match="at least one batch of 32 training images, found 4"):
        build(toy(data="folder:images", subset=None))


# --- torchvision's other data sets ---


@pytest.fixture
def unknown_checksums(monkeypatch):
    """Let torchvision read files that are not those whose checksums it knows."""
    for name in ("CIFAR10", "STL10"):
        check = f"torchvision.datasets.{name}._check_integrity"
        monkeypatch.setattr(check, lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def test_cifar100_from_files_in_the_real_format(unknown_checksums):
    folder = Path("data/cifar-100-python")
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": [i % 100 for i in range(200)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = {"fine_label_names": [f"class {i}" for i in range(100)]}
    (folder / "meta").write_bytes(pickle.dumps(names))
    training = build(toy(data="cifar100", subset=None))
    assert training.model.fc.out_features == 100
    image, label = training.loaders.test.dataset.dataset[107]
    assert label == 7
    assert np.array_equal(np.asarray(image), pixels[107].reshape(3, 32, 32).transpose(1, 2, 0))


def test_stl10_from_files_in_the_real_format(unknown_checksums):
    folder = Path("data/stl10_binary")
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
    for split in ("train", "test"):
        pixels.tofile(folder / f"{split}_X.bin")
        labels = np.array([i % 10 + 1 for i in range(20)], dtype=np.uint8)  # from 1 on disk
        labels.tofile(folder / f"{split}_y.bin")
    names = "\n".join(f"class {i}" for i in range(10))
    (folder / "class_names.txt").write_text(names)
    recipe = toy(data="stl10", model="nin_cifar", subset=None, batch_size=4, img_size=96)
    training = build(recipe)
    images, _ = next(iter(training.loaders.test))
    assert images.shape == (4, 3, 96, 96)
    assert training.model(images).shape == (4, 10)
    image, label = training.loaders.test.dataset.dataset[13]
    assert label == 3
    # Columns come before rows on disk.
    assert np.array_equal(np.asarray(image), pixels[13].transpose(2, 1, 0))


# --- splits ---


def test_validation_images_come_from_the_training_set_and_are_not_trained_on():
    loaders = build(toy(validation=0.25)).loaders
    train, held_out = loaders.train.dataset, loaders.test.dataset
    assert held_out.dataset is train.dataset  # and not the test set
    assert (len(train), len(held_out)) == (48, 16)
    assert not set(train.indices) & set(held_out.indices)
    assert set(loaders.train_eval.dataset.indices) < set(train.indices)
    together = build(toy()).loaders.train.dataset.indices
    assert set(train.indices) | set(held_out.indices) == set(together)


def test_the_test_subset_is_drawn_by_the_seed():
    chosen = [
        build(toy(seed=seed, test_subset=20)).loaders.test.dataset.indices for seed in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 20


def test_training_images_to_measure_on_are_as_many_as_test_images_and_not_augmented():
    loaders = build(toy(subset=None)).loaders
    measured, test = loaders.train_eval.dataset, loaders.test.dataset
    assert len(measured) == len(test) == 360
    labels = [measured.dataset.labels[index] for index in measured.indices]
    assert np.bincount(labels).min() > 20  # drawn, not the first ones of a sorted folder
    assert measured.transform is test.transform
    assert (measured[0][0] == measured[0][0]).all()
    assert len(build(toy()).loaders.train_eval.dataset) == 64  # there are no more


def test_training_images_to_measure_on_are_drawn_from_a_sorted_folder():
    image_folder("images", classes="abcd", splits=["train"], n=8)
    image_folder("images", classes="abcd", splits=["test"], n=3)
    loaders = build(toy(data="folder:images", subset=None, batch_size=4)).loaders
    assert loaders.train.dataset.indices == list(range(32))
    measured = loaders.train_eval.dataset
    labels = {measured.dataset.targets[index] for index in measured.indices}
    assert len(measured) == 12
    assert labels == {0, 1, 2, 3}


def test_the_held_out_part_is_rounded():
    assert len(build(toy(validation=0.3)).loaders.test.dataset) == 19  # of 19.2
    assert len(build(toy(validation=0.37)).loaders.test.dataset) == 24  # of 23.7


def test_training_images_are_shuffled_anew_in_full_batches():
    loader = build(toy(subset=70, transform_kwargs={"no_aug": True})).loaders.train
    first, second = list(loader), list(loader)
    assert [len(labels) for _, labels in first] == [32, 32]
    assert not torch.equal(first[0][0], second[0][0])


def test_images_to_measure_on_are_neither_cropped_nor_resized():
    for split in ("train", "test"):
        noise(Path("images", split, "a", "0.png"), 32)
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("images/test/a/0.png")
    loaders = build(toy(data="folder:images", subset=None, batch_size=1, img_size=32)).loaders
    found, _ = loaders.test.dataset[0]
    normalize = loaders.test.dataset.transform.transforms[-1]
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    mean, std = (torch.as_tensor(v).view(3, 1, 1) for v in (normalize.mean, normalize.std))
    torch.testing.assert_close(found, (expected - mean) / std)


# --- decoding ---


@pytest.fixture
def opened(monkeypatch):
    """Count how often each file is opened as an image."""
    counts = {}
    open_image = Image.open

    def counting(path, *arguments):
        counts[str(path)] = counts.get(str(path), 0) + 1
        return open_image(path, *arguments)

    monkeypatch.setattr(Image, "open", counting)
    return counts


def noise(path, side):
    pixels = np.random.default_rng(0).integers(0, 256, (side, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.mark.parametrize(("side", "times"), [(96, 1), (97, 2)])
def test_small_images_are_decoded_once(opened, side, times):
    for path in ("images/train/a/0.png", "images/test/a/0.png", "images/test/a/1.png"):
        noise(Path(path), side)
    recipe = toy(data="folder:images", subset=None, batch_size=1, img_size=16)
    loaders = build(recipe).loaders
    kept = loaders.test.dataset.dataset.loader.kept
    assert len(kept) == (2 if side == 96 else 0)  # ahead, so that worker processes share them
    first, second = list(loaders.test), list(loaders.test)
    assert opened["images/test/a/1.png"] == times  # in two passes
    assert (first[1][0] == second[1][0]).all()
    image, _ = loaders.test.dataset.dataset[1]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open("images/test/a/1.png")))


@pytest.mark.parametrize(
    ("content", "side", "workers"),
    [
        (b"", 12, 0),
        (b"no image", 12, 0),
        ("truncated", 12, 0),
        ("truncated", 120, 0),
        (b"", 120, 2),
    ],
)
def test_a_damaged_image_is_named(content, side, workers):
    for split in ("train", "test"):
        for name in "abcdefgh":
            noise(Path("images", split, name, "3.png"), side)
    path = Path("images/train/b/3.png")
    path.write_bytes(path.read_bytes()[:200] if content == "truncated" else content)
    line = "digits --data folder:images --batch-size 4 --img-size 16 --epochs 1 --output out"
    line += f" --workers {workers}"
    with pytest.raises(SystemExit, match=r"^error: expected an image in images/train/b/3\.png: .*"):
        main(line.split())
    assert not Path("out/metrics.csv").exists()
