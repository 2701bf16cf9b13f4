"""The processes of a run: this one alone, or all that torchrun has started."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import timm.utils
import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


class Processes(NamedTuple):
    """Which process this is, of how many, and how the model is spread over them.

    Attributes:
        rank: Number of this process; 0 writes and shows progress.
        size: How many there are.
        device: Where this one computes.
        sharded: Whether each holds a part of every weight (FSDP2) or all weights (DDP).
    """

    rank: int = 0
    size: int = 1
    device: torch.device = torch.device("cpu")
    sharded: bool = False

    @property
    def is_primary(self) -> bool:
        """Whether this is the process that writes and shows progress."""
        return self.rank == 0

    def spread(self, model: nn.Module) -> nn.Module:
        """Make a model train on all processes together.

        Args:
            model: The model, with the same weights everywhere. If it is to be sharded, its
                parameters are replaced: build the optimizer afterwards.

        Returns:
            The module to call.
        """
        if self.sharded:
            for child in model.children():
                if any(True for _ in child.parameters()):
                    fully_shard(child)
            fully_shard(model)
            return model
        if self.size == 1:
            return model
        return DistributedDataParallel(model)

    def average_batch_norms(self, model: nn.Module) -> None:
        """Give all processes the mean of their running statistics."""
        if self.size > 1:
            timm.utils.distribute_bn(model, self.size, reduce=True)

    def total(self, values: Sequence[float]) -> list[float]:
        """Add numbers up over all processes, which must all call this."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(sums)
        return list(sums.tolist())


ALONE = Processes()
"""This process on the CPU."""


@contextmanager
def started(*, sharded: bool = False) -> Iterator[Processes]:
    """Join the other processes if torchrun has started several.

    Args:
        sharded: Whether the model is to be sharded. With a single process it is as well, if
            torchrun has started it.

    Yields:
        What this process is.
    """
    cuda = torch.cuda.is_available()
    found = SimpleNamespace(device="cuda" if cuda else "cpu")
    timm.utils.init_distributed_device(found)
    alone = not torch.distributed.is_initialized()
    if alone and sharded:
        if "RANK" not in os.environ:
            raise ValueError("expected processes started by torchrun to shard the model over")
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
        alone = False
    yield Processes(found.rank, found.world_size, torch.device(found.device), sharded)
    if not alone:  # not after an error, when others may not answer any more
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def whole(state: Any) -> Any:
    """Return a state dict with sharded tensors gathered; all processes must call this."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def load_sharded(
    model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Mapping[str, Any]
) -> None:
    """Load whole state dicts, which every process has read, into a sharded model.

    Args:
        model: The model.
        optimizer: Its optimizer.
        checkpoint: Holds ``state_dict`` and ``optimizer``.
    """
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, checkpoint["state_dict"], options=options)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        index: {key: _like(parameters[index], value) for key, value in entries.items()}
        for index, entries in checkpoint["optimizer"]["state"].items()
    }
    optimizer.load_state_dict({**checkpoint["optimizer"], "state": states})


def _like(parameter: Tensor, value: Any) -> Any:
    """Shard what an optimizer keeps of a parameter as the parameter is."""
    if (
        isinstance(parameter, DTensor)
        and isinstance(value, Tensor)
        and value.shape == parameter.shape
    ):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value
