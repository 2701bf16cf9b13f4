"""Spectral norm regularization (Yoshida and Miyato 2017) for PyTorch.

``SNROptimizer`` wraps any optimizer and adds, by backward hooks and once per optimizer step,
lambda * sigma_1 * u_1 v_1^T to the gradient of each weight matrix of a model: the gradient
of (lambda / 2) * sum of sigma_1^2, with the loss untouched. ``discover`` tells which weights
those are and why others are not; ``audit`` compares the estimated with the exact norms, and
``spectra`` returns all singular values. ``choose``, an argument of all four, says weight by
weight what is penalized: groups, heads, convolutions as operators, other functions of sigma.
"""

from snr_hooks.choices import FAMILIES, VIEWS, Choice
from snr_hooks.diagnostics import Audit, AuditRow, audit, spectra
from snr_hooks.discovery import Discovery, Skipped, Target, discover
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
    "Discovery",
    "Penalty",
    "SNROptimizer",
    "Skipped",
    "Target",
    "around",
    "audit",
    "discover",
    "hinge",
    "spectra",
    "squared_hinge",
]
