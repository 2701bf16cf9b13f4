"""Weights that are split over processes: ``DTensor``, as ``fully_shard`` (FSDP2) makes them.

A weight is never gathered. Every process multiplies with the part that it holds, and the
products, which are a few vectors a weight, are added up over the processes: one collective
for all weights of a step together. From there on all processes hold the same vectors and do
the same work with them.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from snr_hooks._names import is_a

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

_latest: "list[Work]" = []
"""The collectives of the last call of ``add_up`` that took any, finished. gloo's thread drops each
some time after it is done. Were that the last reference, the thread would need the interpreter to
release the tensors, and abort the process if the interpreter is ending meanwhile (pytorch issue
190489).
"""


class Part(NamedTuple):
    """The part of a weight that this process holds: ``[start, stop)`` along one dimension.

    Attributes:
        axis: The dimension that is split.
        start: Where the part begins.
        stop: Where it ends; ``start`` if there are fewer entries than processes.
        group: The processes that hold the other parts.
    """

    axis: int
    start: int
    stop: int
    group: "ProcessGroup"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds; a tensor that is not sharded, as it is."""
    if type(tensor) is nn.Parameter or not is_sharded(tensor):  # most often the former
        return tensor
    part: Tensor = _dtensor(tensor).to_local()
    return part


def whole(tensor: Tensor) -> Tensor:
    """Gather a tensor from all processes, which must all call this; or return it as it is."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = _dtensor(tensor).full_tensor()
    return gathered


def is_fsdp1(model: nn.Module) -> bool:
    """Return whether a model is, contains or is contained in a FullyShardedDataParallel.

    It marks all modules that it manages, as ``fully_shard`` does (both for torch.compile), but
    it makes none of them an FSDPModule.
    """
    managed = fsdp2 = False
    for module in model.modules():
        if is_a(module, "FullyShardedDataParallel"):
            return True
        fsdp2 |= is_a(module, "FSDPModule")
        managed |= getattr(module, "_is_fsdp_managed_module", False) is True
    return managed and not fsdp2


def reshard(model: nn.Module) -> None:
    """Put the sharded parameters, which the optimizer holds, back into a model's modules.

    After a forward pass without backward, as in an evaluation, the root of a model sharded by
    ``fully_shard`` holds whole ones.
    """
    for module in model.modules():
        if is_a(module, "FSDPModule"):
            module.reshard()  # type: ignore[operator]


def part_of(weight: Tensor) -> Part | str:
    """Return which part of a sharded weight this process holds, or why that is no good.

    Args:
        weight: A DTensor. Supported is what ``fully_shard`` makes: split along its first or
            second dimension over one dimension of the mesh, replicated over the others.

    Returns:
        The part, or a reason for not regularizing the weight.
    """
    from torch.distributed.tensor import Shard

    mesh, placements = _dtensor(weight).device_mesh, _dtensor(weight).placements
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    placement = placements[split[0]] if len(split) == 1 else None
    if type(placement) is not Shard or placement.dim > 1:
        return (
            f"sharded as {placements}: only weights that fully_shard (FSDP2) splits along one "
            "dimension, the first or the second, are supported"
        )
    axis, n_parts = placement.dim, mesh.size(split[0])
    step = -(-weight.shape[axis] // n_parts)  # as torch.chunk splits
    start = min(mesh.get_local_rank(split[0]) * step, weight.shape[axis])
    stop = min(start + step, weight.shape[axis])
    return Part(axis, start, stop, mesh.get_group(split[0]))


def add_up(parts: "Iterable[tuple[ProcessGroup, Tensor]]") -> None:
    """Add tensors up over processes, in place; one collective a group of processes and dtype.

    Args:
        parts: Tensors with the processes to add them up over; all of these must call this with
            tensors of the same shapes.
    """
    together: dict[tuple[ProcessGroup, torch.dtype], list[Tensor]] = {}
    for group, tensor in parts:
        together.setdefault((group, tensor.dtype), []).append(tensor)
    if together:
        _latest.clear()
    for (group, _), tensors in together.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        work = torch.distributed.all_reduce(flat, group=group, async_op=True)
        if work is not None:  # as outside of the group
            work.wait()
            _latest.append(work)
        sums = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, total in zip(tensors, sums, strict=True):
            tensor.copy_(total.view(tensor.shape))


def _dtensor(tensor: Tensor) -> Any:
    """Return a tensor as what its type does not say it is."""
    return tensor
