"""Which linear maps a module stacks inside one weight.

What is known of modules, by their classes or, for timm's and others', by names and
attributes, because they are no dependencies. ``viewing`` asks; nothing else splits weights.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

from torch import Tensor, nn

from snr_hooks._text import dimensions
from snr_hooks.blocks import BlockView

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LINEAR = (nn.Linear, *CONVOLUTIONS)

_GATES = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


class Place(NamedTuple):
    """Where a parameter is held.

    Attributes:
        module: Its owner.
        attribute: Its name there.
        parents: The modules that the owner is in, the nearest first, with the names under which
            each holds the one before: ``(module, name)``.
    """

    module: nn.Module
    attribute: str
    parents: Sequence[tuple[nn.Module, str]]


class Heads(NamedTuple):
    """How many heads a user says a projection has; None where the module says it."""

    heads: int | None = None
    kv_heads: int | None = None


def maps_in(
    place: Place, weight: Tensor, *, per_head: bool, heads: Heads
) -> dict[str, BlockView] | None:
    """Split a weight into the maps that its module applies.

    Args:
        place: Where it is held.
        weight: The parameter.
        per_head: Whether to split projections of attention into heads.
        heads: Numbers of heads, if the user gives them.

    Returns:
        Views by a suffix for the name, ``""`` for one that has all of the weight; None if it
        is one map.

    Raises:
        ValueError: A number of heads does not divide the rows or columns.
    """
    module, attribute, _ = place
    if isinstance(module, CONVOLUTIONS) and attribute == "weight" and module.groups > 1:
        return {"": _groups(module, weight)}
    for kind, gates in _GATES.items():
        if isinstance(module, kind) and attribute.startswith(("weight_ih", "weight_hh")):
            return {"": _rows(weight, (gates, len(weight) // gates), unit="gates")}
    if type(module).__name__ == "CondConv2d" and attribute == "weight":
        return {"": _experts(module, weight)}
    projection = _projection(place, heads)
    return None if projection is None else projection.views(weight, per_head=per_head)


def _groups(module: Any, weight: Tensor) -> BlockView:
    first, *rest = weight.shape
    sizes = module.groups, first // module.groups, *rest
    rows = (2,) if isinstance(module, TRANSPOSED) else (1,)
    return BlockView(sizes, rows=rows, pooled=True, unit="groups")


def _experts(module: Any, weight: Tensor) -> BlockView:
    n_experts, outs, groups = len(weight), module.out_channels, module.groups
    if groups == 1:
        return BlockView((n_experts, outs, weight.shape[1] // outs), unit="experts")
    sizes = n_experts, groups, outs // groups, weight.shape[1] // outs
    return BlockView(sizes, blocks=(0, 1), rows=(2,), unit="groups of experts")


def _rows(weight: Tensor, split: tuple[int, ...], **options: Any) -> BlockView:
    return BlockView((*split, *weight.shape[1:]), **options)


# --- attention ---


class Projection(NamedTuple):
    """The maps that a projection of attention stacks.

    Attributes:
        parts: Rows of each part, such as q, k and v; with ``heads_first`` of each head.
        heads: How many heads each part has.
        heads_first: Whether all parts of a head come together; of columns, whether the heads
            are innermost.
        of_columns: Whether it is the columns that are split: an output projection.
        names: What the parts are called.
    """

    parts: tuple[int, ...]
    heads: tuple[int, ...]
    heads_first: bool = False
    of_columns: bool = False
    names: tuple[str, ...] = ("q", "k", "v")

    def views(self, weight: Tensor, *, per_head: bool) -> dict[str, BlockView] | None:
        """Return views by suffix; None if it is one map."""
        self._check(weight)
        if self.of_columns:
            return {"": self._heads_of_columns(weight)} if per_head else None
        if self.heads_first:
            return self._by_head(weight, per_head=per_head)
        if per_head and max(self.heads) > 1 and len(self._head_sizes()) == 1:
            split = sum(self.heads), self._head_sizes().pop()
            return {"": _rows(weight, split, unit="heads")}
        if len(set(self.parts)) == 1:
            if len(self.parts) == 1:
                return None
            unit = f"maps ({' '.join(self.names[: len(self.parts)])})"
            return {"": _rows(weight, (len(self.parts), self.parts[0]), unit=unit)}
        starts = accumulate(self.parts, initial=0)
        return {
            f"[{name}]": _slice(weight, start, size, heads if per_head else 1, name)
            for name, start, size, heads in zip(
                self.names, starts, self.parts, self.heads, strict=False
            )
        }

    def _by_head(self, weight: Tensor, *, per_head: bool) -> dict[str, BlockView]:
        n_heads, size = self.heads[0], sum(self.parts)
        names = self.names[: len(self.parts)]
        if len(set(self.parts)) == 1:
            split = n_heads, len(self.parts), self.parts[0]
            if per_head:
                return {"": _rows(weight, split, blocks=(0, 1), rows=(2,), unit="heads")}
            unit = f"maps ({' '.join(names)})"
            return {"": _rows(weight, split, blocks=(1,), rows=(0, 2), unit=unit)}
        views, start = {}, 0
        for name, part in zip(names, self.parts, strict=True):
            blocks, rows, unit = ((0,), (1,), "heads") if per_head else ((), (0, 1), "map")
            views[f"[{name}]"] = _rows(
                weight,
                (n_heads, size),
                blocks=blocks,
                rows=rows,
                part=(1, start, start + part),
                unit=f"{unit} ({name})",
            )
            start += part
        return views

    def _heads_of_columns(self, weight: Tensor) -> BlockView:
        out, columns, *rest = weight.shape
        n_heads = self.heads[0]
        split = (columns // n_heads, n_heads) if self.heads_first else (n_heads, columns // n_heads)
        blocks = (2,) if self.heads_first else (1,)
        return BlockView((out, *split, *rest), blocks=blocks, rows=(0,), unit="heads")

    def _head_sizes(self) -> set[int]:
        return {part // heads for part, heads in zip(self.parts, self.heads, strict=True)}

    def last(self, n_parts: int) -> "Projection":
        """Return the projection that stacks the last parts only."""
        return self._replace(
            parts=self.parts[-n_parts:], heads=self.heads[-n_parts:], names=self.names[-n_parts:]
        )

    def fits(self, weight: Tensor) -> bool:
        """Return whether the numbers are those of the weight."""
        size = weight.shape[1] if self.of_columns else len(weight)
        by_head = self.heads_first and not self.of_columns
        expected = sum(self.parts) * (self.heads[0] if by_head else 1)
        divided = by_head or all(
            part % heads == 0 for part, heads in zip(self.parts, self.heads, strict=True)
        )
        return size == expected and divided

    def _check(self, weight: Tensor) -> None:
        """Refuse numbers that do not fit the weight."""
        size = weight.shape[1] if self.of_columns else len(weight)
        if not self.fits(weight):
            which = "columns" if self.of_columns else "rows"
            raise ValueError(
                f"expected numbers of heads that divide the {which} of a projection, found "
                f"{'/'.join(map(str, self.heads))} heads for {size} {which} of a "
                f"{dimensions(weight.shape)} weight: give heads (and kv_heads) in choose, or "
                "choose 'matrix' for it"
            )


def _slice(weight: Tensor, start: int, size: int, n_heads: int, name: str) -> BlockView:
    """Return some rows, as one map or in heads."""
    d = size // n_heads
    if n_heads == 1 or start % d or len(weight) % d:  # one map, or heads that no reshape finds
        whole = _rows(weight, (len(weight),), blocks=(), rows=(0,))
        return replace(whole, part=(0, start, start + size), unit=f"map ({name})")
    heads = _rows(weight, (len(weight) // d, d), unit=f"heads ({name})")
    return replace(heads, part=(0, start // d, (start + size) // d))


# What timm and others call projections of attention: how many parts each stacks.
_FUSED = {"qkv": 3, "to_qkv": 3, "qkv_proj": 3, "Wqkv": 3, "kv": 2, "to_kv": 2, "qk": 2}
_SHARED_BY_QUERIES = {"k", "v", "k_proj", "v_proj", "wk", "wv", "to_k", "to_v", "key", "value"}
_SEPARATE = {"q", "q_proj", "wq", "to_q", "query", *_SHARED_BY_QUERIES}
_OUTPUT = {"proj", "out_proj", "o_proj", "to_out", "output", "attn_out_proj"}
_WITHIN = 3  # a projection may be inside a ConvNorm, or a Sequential in one


def _projection(place: Place, heads: Heads) -> Projection | None:
    """Return how a weight of attention is split, None if it is not known to be any."""
    module, attribute, parents = place
    if isinstance(module, nn.MultiheadAttention):
        return _of_torch(module, attribute)
    if attribute != "weight":
        return None
    weight: Any = module.weight
    for owner, name in parents[:_WITHIN]:
        if type(owner).__name__ == "MultiQueryAttention2d" and name in {"key", "value"}:
            return None  # one head, which all queries share
        found = _special(owner, name, weight) or _usual(owner, name, weight, heads)
        if found is not None:
            return found
    return None


def _of_torch(module: nn.MultiheadAttention, attribute: str) -> Projection | None:
    size, n_heads = module.embed_dim, module.num_heads
    if attribute == "in_proj_weight":
        return Projection((size,) * 3, (n_heads,) * 3)
    is_separate = attribute in {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    return Projection((size,), (n_heads,)) if is_separate else None


def _usual(owner: Any, name: str, weight: Tensor, given: Heads) -> Projection | None:
    """Return what names and numbers of heads mean almost everywhere: (parts, heads, d)."""
    n_heads = given.heads or _number(owner, "num_heads", "heads")
    if n_heads is None or name not in {*_FUSED, *_SEPARATE, *_OUTPUT}:
        return None
    kv_heads = given.kv_heads or _number(owner, "num_kv_heads") or n_heads
    rows, columns = weight.shape[:2]
    if name in _OUTPUT:
        found = Projection((columns,), (n_heads,), of_columns=True)
    elif name in _SEPARATE:
        found = Projection((rows,), (kv_heads if name in _SHARED_BY_QUERIES else n_heads,))
    else:
        counts = (n_heads, kv_heads, kv_heads)[-_FUSED[name] :]
        if name == "qk":
            counts = (n_heads, n_heads)
        d = rows // sum(counts)
        names = ("k", "v") if name in {"kv", "to_kv"} else ("q", "k", "v")[: len(counts)]
        heads_first = getattr(owner, "head_first", False) is True
        parts = (d,) * len(counts) if heads_first else tuple(count * d for count in counts)
        found = Projection(parts, counts, heads_first, names=names)
    return found if given.heads or given.kv_heads or found.fits(weight) else None


def _special(owner: Any, name: str, weight: Tensor) -> Projection | None:
    """Return what is otherwise in some modules of timm, by the names of their classes.

    ``tests/test_layouts.py`` takes real modules and checks which rows reach which output.
    """
    kind, rows = type(owner).__name__, len(weight)
    n_heads = _number(owner, "num_heads")
    key, value = _number(owner, "key_dim"), _number(owner, "val_dim")
    if key and value and n_heads and name in {"qkv", "kv"}:  # LeViT, TinyViT, EfficientFormer
        return Projection((key, key, value), (n_heads,) * 3, True).last(_FUSED[name])
    if kind == "CascadedGroupAttention" and key and value and name == "qkvs":
        return Projection((key, key, value), (1,) * 3)
    if kind == "HaloAttn" and name == "kv":
        sizes = owner.dim_head_qk, owner.dim_head_v
        return Projection(sizes, (owner.num_heads,) * 2, True, names=("k", "v"))
    if kind == "BottleneckAttn" and name == "qkv":
        parts = owner.dim_out_qk, owner.dim_out_qk, owner.dim_out_v
        return Projection(parts, (owner.num_heads,) * 3)
    if kind == "LambdaLayer" and name == "qkv":
        parts = owner.num_heads * owner.dim_qk, owner.dim_qk, owner.dim_v
        return Projection(parts, (owner.num_heads, 1, 1))
    if kind == "WindowAttentionGlobal" and name == "qkv" and owner.use_global:
        return Projection((rows // 2,) * 2, (n_heads or 1,) * 2, names=("k", "v"))
    if kind == "ConvAttention" and name == "pwise":  # CPUBone, LowFormer
        return Projection((owner.head_dim,) * 3, (owner.num_heads,) * 3, True)
    if kind == "LiteMLA" and name == "qkv":
        return Projection((owner.dim,) * 3, (rows // (3 * owner.dim),) * 3, True)
    if kind == "ChannelAttentionV2" and name in {"qkv", "proj"}:
        return _usual(owner, name, weight, Heads(owner.groups))
    if kind == "LinearSelfAttention" and name == "qkv_proj":  # MobileViT v2
        return Projection((1, owner.embed_dim, owner.embed_dim), (1,) * 3)
    if kind == "SHSA" and name == "qkv":
        return Projection((owner.qk_dim, owner.qk_dim, owner.pdim), (1,) * 3)
    if kind in {"ParallelScalingBlock", "DiffParallelScalingBlock"} and name == "in_proj":
        heads = (1, *(owner.num_heads,) * 3)
        return Projection(tuple(owner.in_split), heads, names=("mlp", "q", "k", "v"))
    if kind == "GluMlp" and name == "fc1":
        names = ("value", "gate") if owner.gate_last else ("gate", "value")
        return Projection((rows // 2,) * 2, (1, 1), names=names)
    if kind == "Attention" and name == "proj" and owner.__module__ == "timm.models.nest":
        return Projection((weight.shape[1],), (owner.num_heads,), heads_first=True, of_columns=True)
    return None


def _number(owner: Any, *names: str) -> int | None:
    """Return the first of some attributes that is a positive integer."""
    values = (getattr(owner, name, None) for name in names)
    numbers = (value for value in values if type(value) is int and value > 0)
    return next(numbers, None)
