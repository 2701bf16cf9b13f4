"""Spectral norm regularization (Yoshida and Miyato 2017) for PyTorch.

``SNROptimizer`` wraps any optimizer and adds, by backward hooks and once per optimizer step,
lambda * sigma_1 * u_1 v_1^T to the gradient of each weight matrix of a model: the gradient
of (lambda / 2) * sum of sigma_1^2, with the loss untouched. ``discover`` tells which weights
those are and why others are not; ``audit`` compares the estimated with the exact norms, and
``spectra`` returns all singular values. ``choose``, an argument of all four, says weight by
weight what is penalized: groups, heads, convolutions as operators, other functions of sigma.
``compare`` puts two checkpoints side by side, ``lipschitz`` bounds a sequence of layers.
"""

from snr_hooks.choices import FAMILIES, VIEWS, Choice
from snr_hooks.diagnostics import (
    Audit,
    AuditRow,
    Comparison,
    ComparisonRow,
    audit,
    compare,
    spectra,
    stable_rank,
)
from snr_hooks.discovery import Discovery, Skipped, Target, discover
from snr_hooks.lipschitz import Lipschitz, lipschitz
from snr_hooks.optimizer import SNROptimizer
from snr_hooks.penalties import HALF_SQUARE, SIGMA, Penalty, around, hinge, squared_hinge

__all__ = [
    "FAMILIES",
    "HALF_SQUARE",
    "SIGMA",
    "VIEWS",
    "Audit",
    "AuditRow",
    "Choice",
    "Comparison",
    "ComparisonRow",
    "Discovery",
    "Lipschitz",
    "Penalty",
    "SNROptimizer",
    "Skipped",
    "Target",
    "around",
    "audit",
    "compare",
    "discover",
    "hinge",
    "lipschitz",
    "spectra",
    "squared_hinge",
    "stable_rank",
]
