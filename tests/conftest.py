"""Settings for the whole suite."""

from pathlib import Path

import pytest
import torch
from _launch import results
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
def processes_root(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def two(request, processes_root):
    """What each of two processes found, of the worker that the test module names."""
    return results(request.module.WORKER, 2, processes_root)


@pytest.fixture(scope="module")
def four(request, two, processes_root):
    """What each of four processes found, started after the two, whose files they may use."""
    return results(request.module.WORKER, 4, processes_root)


# Four processes on two cores take three times as long as two.
@pytest.fixture(params=["two", pytest.param("four", marks=pytest.mark.slow)])
def found(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def unrendered():
    """Write empty files in place of pictures, which take seconds, until ``undo()`` is called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "matplotlib.figure.Figure.savefig", lambda self, path, **_: Path(path).write_bytes(b"")
        )
        yield patch
