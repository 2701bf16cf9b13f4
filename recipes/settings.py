"""The settings of SNROptimizer that the benchmark and the frontier compare."""

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

ECONOMICAL = "1 vector, every 4th step"
DEFAULT = "3 vectors, tolerance 0.0005 (default)"
SETTINGS: dict[str, dict[str, Any]] = {
    ECONOMICAL: {"n_vectors": 1, "n_power_iterations": 0.125},
    "1 vector": {"n_vectors": 1},
    "1 vector, full iteration": {"n_vectors": 1, "n_power_iterations": 1},
    "2 vectors": {"n_vectors": 2, "tolerance": math.inf},
    "2 vectors, full iteration": {
        "n_vectors": 2,
        "n_power_iterations": 1,
        "tolerance": math.inf,
    },
    "3 vectors": {"n_vectors": 3, "tolerance": math.inf},
    "4 vectors": {"n_vectors": 4, "tolerance": math.inf},
    "8 vectors": {"n_vectors": 8, "tolerance": math.inf},
    "16 vectors": {"n_vectors": 16, "tolerance": math.inf},
    DEFAULT: {},
    "4 vectors, tolerance 0.001": {"n_vectors": 4, "tolerance": 1e-3},
}


class Idle(Optimizer):
    """An optimizer that leaves its parameters alone, to see what surrounds it."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do nothing."""
