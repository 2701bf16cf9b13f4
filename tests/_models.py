"""A zoo of small awkward models, by name. Each takes ``model.example`` as input."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """A module with an example input; ``forward`` runs ``body``."""

    def __init__(self, body: nn.Module, *shape: int) -> None:
        super().__init__()
        self.body = body
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("example", torch.randn(*shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def mlp() -> nn.Module:
    return Net(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), 5, 6)


def convolutions() -> nn.Module:
    body = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 12 * 12, 3),
    )
    return Net(body, 4, 2, 8, 8)


def one_and_three_dimensions() -> nn.Module:
    body = nn.Sequential(
        nn.Conv1d(2, 4, 3),
        nn.ConvTranspose1d(4, 3, 3),
        nn.Unflatten(2, (2, 2, 2)),
        nn.Conv3d(3, 2, 2, padding=1),
        nn.ConvTranspose3d(2, 3, 2),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    model = Net(body, 4, 2, 8)
    model(model.example)
    return model


def channels_last() -> nn.Module:
    model = convolutions().to(memory_format=torch.channels_last)
    model.example = model.example.to(memory_format=torch.channels_last)
    return model


class Tied(Net):
    """One weight used twice, under two names."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), 5, 6)
        self.body[2].weight = self.body[0].weight


class TiedEmbedding(nn.Module):
    """A language-model head that shares its weight with an embedding."""

    def __init__(self, *, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=sparse)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.register_buffer("example", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh())


class Reused(Net):
    """One module called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), 5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.body(x).tanh())


class Checkpointed(Net):
    """A tied block under activation checkpointing, so that it is accumulated twice."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__(nn.Linear(6, 6), 5, 6)
        self.first = nn.Linear(6, 6)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.body, x, use_reentrant=self.use_reentrant).tanh()
        return x


def with_unused() -> nn.Module:
    model = mlp()
    model.unused = nn.Linear(3, 3)
    return model


def with_frozen() -> nn.Module:
    model = mlp()
    model.body[0].weight.requires_grad_(False)
    return model


def with_parametrizations() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model.body[0])
    nn.utils.parametrizations.spectral_norm(model.body[2])
    model.plain = nn.Linear(2, 2)
    return model


ZOO: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convolutions": convolutions,
    "one_and_three_dimensions": one_and_three_dimensions,
    "channels_last": channels_last,
    "tied": Tied,
    "tied_embedding": TiedEmbedding,
    "reused": Reused,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "checkpointed_reentrant": lambda: Checkpointed(use_reentrant=True),
    "with_unused": with_unused,
    "with_frozen": with_frozen,
    "with_parametrizations": with_parametrizations,
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a model of the zoo, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name]()
    return model.to(dtype)
