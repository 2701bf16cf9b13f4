"""Settings for the whole suite."""

from pathlib import Path

import pytest
import torch
from _launch import results_of_two_and_four
from hypothesis import settings

# The tensors are small; and where something else uses the cores, threads that wait for each
# other make a suite of minutes take hours.
torch.set_num_threads(1)

# Shared machines make single examples slow now and then, which says nothing about the code;
# derandomized, so that a failure here is a failure everywhere.
settings.register_profile("suite", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded():
    """Layers that a test makes without a seed are the same whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def both(request, tmp_path_factory):
    """What two and four processes found, of the worker that the test module names."""
    return results_of_two_and_four(request.module.WORKER, tmp_path_factory.mktemp("processes"))


@pytest.fixture(params=[2, 4])
def found(request, both):
    return both[request.param]


@pytest.fixture
def two(both):
    return both[2]


@pytest.fixture
def unrendered():
    """Write empty files in place of pictures, which take seconds, until ``undo()`` is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"")
        )
        yield patch
