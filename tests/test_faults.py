"""What goes wrong on real machines costs a recipe at most the epoch under way."""

import csv
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from recipes import train
from recipes.recipe import Recipe, RecipeError, read
from recipes.train import CHECKPOINT, run

ROOT = Path(__file__).parent.parent
TOY = {"epochs": 3, "subset": 64, "batch_size": 32}
OPTIONS = ["--epochs", "3", "--subset", "64", "--batch-size", "32"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def toy(**entries):
    return Recipe(**{**read("digits"), **TOY, **entries})


def start(output, *options, limit=None):
    """Start the recipe as a user would; ``limit`` is the largest file it can write."""

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells ignore it in the background
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # As many threads as this process: sums are split, and rounded, by thread.
    threads = str(torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-m", "recipes.train", "digits", *options, "--output", output],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
    )


def written(output):
    path = Path(output, CHECKPOINT)
    return path.stat().st_mtime_ns if path.exists() else 0


def saved_epoch(output):
    path = Path(output, CHECKPOINT)
    return torch.load(path)["epoch"] if path.exists() else -1


def wait_for_checkpoint(process, output, limit=120):
    """Return when a checkpoint newer than those there is complete, or the process ended."""
    before, deadline = written(output), time.monotonic() + limit
    while process.poll() is None and written(output) == before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def finish(process, limit=300):
    _, stderr = process.communicate(timeout=limit)
    return process.returncode, stderr


def rows(output):
    with Path(output, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same(a, b):
    weights = [torch.load(Path(output, CHECKPOINT), weights_only=True) for output in (a, b)]
    for name, tensor in weights[0]["state_dict"].items():
        assert torch.equal(tensor, weights[1]["state_dict"][name]), name
    assert rows(a) == rows(b)


# --- kill -9, Ctrl-C ---


@pytest.mark.slow
def test_a_run_killed_as_soon_as_it_has_saved_resumes_to_the_same_weights():
    run(toy(), Path("whole"))
    for _ in range(2):
        process = start("killed", *OPTIONS)
        wait_for_checkpoint(process, "killed")
        process.send_signal(signal.SIGKILL)
        assert finish(process)[0] in (0, -signal.SIGKILL)
    assert finish(start("killed", *OPTIONS))[0] == 0
    assert_same("whole", "killed")


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_resumes_to_the_same_weights():
    options = ["--epochs", "30", "--subset", "640", "--model", "test_vit"]
    run(toy(epochs=30, subset=640, batch_size=64, model="test_vit"), Path("whole"))
    moments = random.Random(0)
    kills = 0
    while kills < 20:
        before = saved_epoch("killed")
        process = start("killed", *options)
        time.sleep(moments.uniform(2, 12))  # from its imports to several epochs
        process.send_signal(signal.SIGKILL)
        code, stderr = finish(process)
        assert code in (0, -signal.SIGKILL), stderr
        assert saved_epoch("killed") >= before  # nothing is lost once saved
        kills += code != 0
        if code == 0:  # a fast machine: on to the next run
            assert_same("whole", "killed")
            shutil.rmtree("killed")
    assert finish(start("killed", *options), 900)[0] == 0
    assert_same("whole", "killed")


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_resumes_to_the_same_weights():
    run(toy(), Path("whole"))
    process = start("interrupted", *OPTIONS)
    wait_for_checkpoint(process, "interrupted")
    process.send_signal(signal.SIGINT)
    code, stderr = finish(process)
    assert code == 1
    assert stderr.strip().endswith("the same command continues after the last finished epoch")
    assert "Traceback" not in stderr
    assert finish(start("interrupted", *OPTIONS))[0] == 0
    assert_same("whole", "interrupted")


# --- disks ---


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_last_one_intact():
    run(toy(epochs=1), Path("out"))
    path = Path("out", CHECKPOINT)
    before = path.read_bytes()
    options = ["--epochs", "1", *OPTIONS[2:], "--fresh"]
    code, stderr = finish(start("out", *options, limit=len(before) // 2))
    assert code == 1
    assert f"expected to write a checkpoint to out/{CHECKPOINT}" in stderr
    assert "the one before it is intact: make room and run the same command again" in stderr
    assert "Traceback" not in stderr
    assert path.read_bytes() == before
    assert not list(Path("out").glob("*.unfinished"))
    code, stderr = finish(start("new", *options, limit=len(before) // 2))
    assert "there is none yet" in stderr


def test_a_folder_that_cannot_be_written_to_leaves_the_last_one_intact():
    run(toy(epochs=1), Path("out"))
    before = Path("out", CHECKPOINT).read_bytes()
    Path("out", CHECKPOINT).with_suffix(".unfinished").mkdir()  # refuses root as well
    with pytest.raises(RecipeError, match=r"expected to write a checkpoint.*the one before it"):
        run(toy(epochs=1), Path("out"), fresh=True)
    assert Path("out", CHECKPOINT).read_bytes() == before


# --- losses that are not finite ---


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint():
    message = r"the loss is (nan|inf) at step \d+ \(epoch \d\): pass --skip-nonfinite.*lower lr"
    with pytest.raises(RecipeError, match=message):
        run(toy(lr=1e30, sched="none", sched_kwargs={}), Path("out"))


def poisoned(steps, monkeypatch):
    """Make the images of some training steps NaN, counted from 0."""
    create_loaders, count = train.create_loaders, iter(range(1000))

    class Poisoned:
        def __init__(self, loader):
            self.loader = loader

        def __len__(self):
            return len(self.loader)

        def __iter__(self):
            for images, labels in self.loader:
                yield images * (torch.nan if next(count) in steps else 1), labels

    def create(*arguments):
        loaders = create_loaders(*arguments)
        return loaders._replace(train=Poisoned(loaders.train))

    monkeypatch.setattr(train, "create_loaders", create)


def test_steps_with_a_loss_that_is_not_finite_are_skipped_if_asked(monkeypatch, capsys):
    recipe = toy(skip_nonfinite=True)
    poisoned({1, 2}, monkeypatch)
    run(recipe, Path("out"))
    assert "the loss is nan at step 1 (epoch 1); skipped" in "".join(capsys.readouterr())
    assert len(rows("out")) == 3
    state = torch.load(Path("out", CHECKPOINT), weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())
    # 6 steps, of which 2 were not taken: batch norm has seen 4.
    assert state["bn1.num_batches_tracked"] == 4
    assert all(float(row["test_loss"]) < 10 for row in rows("out"))


def test_skipping_every_step_of_an_epoch_stops_the_run(monkeypatch, capsys):
    poisoned({2, 3}, monkeypatch)
    with pytest.raises(RecipeError, match="not finite in any step of epoch 2"):
        run(toy(skip_nonfinite=True), Path("out"))
    assert len(rows("out")) == 1
    printed = "".join(capsys.readouterr())
    for step in (2, 3):
        assert f"the loss is nan at step {step} (epoch 2); skipped" in printed


def test_a_run_stopped_by_a_loss_goes_on_when_asked_to_skip(monkeypatch):
    with monkeypatch.context() as patch:
        poisoned({3}, patch)
        with pytest.raises(RecipeError, match=r"nan at step 3 \(epoch 2\): pass --skip-nonfinite"):
            run(toy(), Path("out"))
    assert len(rows("out")) == 1
    run(toy(skip_nonfinite=True), Path("out"))
    assert len(rows("out")) == 3
