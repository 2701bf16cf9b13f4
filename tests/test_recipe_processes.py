"""The training recipe on two processes: one result, one writer, no hang."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from _launch import TESTS, torchrun
from torch.utils.data import DistributedSampler

from recipes import train
from recipes.recipe import RecipeError, parse
from recipes.train import CHECKPOINT, main, run

# Without batch norm, dropout and augmentation, and with the same products in every step, two
# processes do what one does.
TOY = ["digits", "--model", "test_vit", "--subset", "66", "--batch-size", "32"]
TOY += ["--transform-kwargs", "no_aug=True", "--snr-kwargs", "tolerance=1e999"]  # infinite
TWO = [*TOY, "--epochs", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on two processes, data-parallel and sharded."""
    root = tmp_path_factory.mktemp("processes")
    for name, options in {"ddp": [], "fsdp": ["--fsdp"]}.items():
        arguments = ["-m", "recipes.train", *TWO, "--output", root / name, *options]
        finished = torchrun(arguments, 2)
        assert finished.returncode == 0, finished.stderr[-4000:]
        (root / name / "stdout").write_text(finished.stdout)
        (root / name / "stderr").write_text(finished.stderr)
    return root


def checkpoint(path):
    return torch.load(path / CHECKPOINT, weights_only=True)


def rows(path):
    with (path / "metrics.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def assert_close(a, b, tolerance):
    assert rows(a) == [pytest.approx(row, rel=tolerance) for row in rows(b)]
    first, second = checkpoint(a), checkpoint(b)
    torch.testing.assert_close(
        first["state_dict"], second["state_dict"], rtol=tolerance, atol=tolerance
    )
    # Momentum; vectors are sensitive to rounding where sigma_1 and sigma_2 are close.
    torch.testing.assert_close(
        first["optimizer"]["state"], second["optimizer"]["state"], rtol=tolerance, atol=tolerance
    )


class Joined:
    """Batches that hold those of all processes."""

    def __init__(self, loader, recipe, size):
        self.loader, self.size = loader, size
        self.dataset = loader.dataset
        self.shares = [
            DistributedSampler(loader.dataset, size, rank, seed=recipe.seed, drop_last=True)
            for rank in range(size)
        ]
        self.step = recipe.batch_size // size
        self.epoch = 0

    def __len__(self):
        return len(self.shares[0]) // self.step

    def __iter__(self):
        for share in self.shares:
            share.set_epoch(self.epoch)
        self.epoch += 1
        orders = [list(share) for share in self.shares]
        for i in range(len(self)):
            part = slice(i * self.step, (i + 1) * self.step)
            chosen = [self.dataset[index] for order in orders for index in order[part]]
            yield torch.stack([image for image, _ in chosen]), torch.tensor([y for _, y in chosen])


def test_two_processes_train_as_one_does_on_their_joined_batches(folder, tmp_path, monkeypatch):
    create_loaders = train.create_loaders

    def joined(recipe, *arguments):
        loaders = create_loaders(recipe, *arguments)
        return loaders._replace(train=Joined(loaders.train, recipe, 2))

    monkeypatch.setattr(train, "create_loaders", joined)
    run(parse(TWO)[0], tmp_path / "one")
    assert_close(folder / "ddp", tmp_path / "one", 1e-4)
    assert_close(folder / "fsdp", tmp_path / "one", 1e-4)


def test_the_first_process_alone_writes_and_shows_progress(folder):
    for name in ("ddp", "fsdp"):
        files = {path.name for path in (folder / name).iterdir()} - {"stdout", "stderr"}
        pictures = {"curves.png", "spectra.png"}
        assert files == {"recipe.yaml", "metrics.csv", "audit.txt", CHECKPOINT} | pictures
        printed = (folder / name / "stdout").read_text()
        assert printed.count("epoch   1/2") == printed.count("test accuracy") == 1
        assert (folder / name / "stderr").read_text().count("epoch 1/2:   0%") == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"]])
def test_perturbed_images_and_micro_batches_on_two_processes(options, tmp_path, monkeypatch):
    adversarial = [*TWO, "--adversarial-eps", "1", "--epochs", "1"]
    parts = [*adversarial, "--micro-batch", "8", "--output", tmp_path / "two", *options]
    finished = torchrun(["-m", "recipes.train", *parts], 2)
    assert finished.returncode == 0, finished.stderr[-4000:]
    create_loaders = train.create_loaders

    def joined(recipe, *arguments):
        loaders = create_loaders(recipe, *arguments)
        return loaders._replace(train=Joined(loaders.train, recipe, 2))

    monkeypatch.setattr(train, "create_loaders", joined)
    recipe = parse(adversarial)[0]
    run(recipe, tmp_path / "one")
    assert_close(tmp_path / "two", tmp_path / "one", 1e-4)


@pytest.mark.slow
def test_a_checkpoint_continues_on_any_number_of_processes(folder, tmp_path, monkeypatch):
    """From the first epoch of a data-parallel run, sharded on two and plain on one."""
    start = tmp_path / "start"
    write_csv = train.report.write_csv

    def stop_after_the_first(path, history):
        write_csv(path, history)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.report, "write_csv", stop_after_the_first)
    with pytest.raises(SystemExit, match="interrupted"):
        main([*TWO, "--output", str(start)])
    monkeypatch.undo()
    assert len(checkpoint(start)["history"]) == 1
    for name, options in {"fsdp": ["--fsdp"], "ddp": []}.items():
        shutil.copytree(start, tmp_path / name)
        arguments = ["-m", "recipes.train", *TWO, "--output", tmp_path / name, *options]
        finished = torchrun(arguments, 2)
        assert finished.returncode == 0, finished.stderr[-4000:]
        assert "after epoch 1 of 2" in finished.stdout
    assert_close(tmp_path / "fsdp", tmp_path / "ddp", 1e-4)
    main([*TWO, "--output", str(start)])
    assert len(rows(start)) == 2
    main([*TWO, "--output", str(tmp_path / "fsdp")])  # loads what is finished, and reports on it


@pytest.mark.slow
def test_a_process_that_fails_ends_the_job_with_its_error(tmp_path):
    arguments = [TESTS / "_failing_rank.py", *TWO, "--output", tmp_path / "out"]
    finished = torchrun(arguments, 2, timeout=120)
    assert finished.returncode != 0
    assert "error on rank 1: this one has failed" in finished.stderr
    assert len(checkpoint(tmp_path / "out")["history"]) == 1  # and it can go on from there


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_processes(tmp_path):
    bad = [*TWO, "--lr", "1e30", "--sched", "none", "--sched-kwargs"]
    arguments = ["-m", "recipes.train", *bad, "--output", tmp_path / "out"]
    finished = torchrun(arguments, 2, timeout=120)
    assert finished.returncode != 0
    assert "the loss" in finished.stderr
    assert "at step 1 (epoch 1)" in finished.stderr


@pytest.mark.slow
def test_all_processes_skip_a_step_whose_loss_is_not_finite_on_one(tmp_path):
    """Under DDP, with batch norm, whose statistics must not remember the images."""
    arguments = [TESTS / "_poisoned_rank.py", *TWO, "--model", "test_resnet"]
    finished = torchrun([*arguments, "--skip-nonfinite", "--output", tmp_path / "out"], 2, 120)
    assert finished.returncode == 0, finished.stderr[-4000:]
    printed = finished.stdout + finished.stderr
    assert printed.count("the loss of another process is not finite at step 1 (epoch 1)") == 1
    state = checkpoint(tmp_path / "out")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state["bn1.num_batches_tracked"] == 3  # of 4 steps


def test_every_test_image_counts_once_if_they_cannot_be_shared_evenly(monkeypatch):
    """Seven images on two processes, of which one sees one of them twice."""
    counted = []

    def only_here(_, values):
        counted.append(values)
        return values

    monkeypatch.setattr(train.Processes, "total", only_here)
    monkeypatch.setattr(train.Processes, "spread", lambda _, model: model)
    create_datasets = train.create_datasets

    def seven(recipe):
        datasets = create_datasets(recipe)
        del datasets.test.images[7:], datasets.test.labels[7:]
        return datasets

    monkeypatch.setattr(train, "create_datasets", seven)
    for rank in range(2):
        train.evaluate(train.build(parse(TWO)[0], train.Processes(rank, 2)), "test")
    assert [loss_count for _, loss_count, _, _ in counted] == [4, 3]


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    recipe = parse([*TWO, "--batch-size", "33"])[0]
    with pytest.raises(RecipeError, match="batch_size that 2 processes can share evenly, found 33"):
        train.build(recipe, train.Processes(0, 2))


def test_fsdp_without_torchrun_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected --fsdp under torchrun, found a process on its"):
        main([*TWO, "--fsdp", "--output", str(tmp_path / "out")])
    assert not Path(tmp_path / "out").exists()
