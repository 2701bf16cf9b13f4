"""Independent ways to compute what the package computes: numpy, loops, autograd of a penalty."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from snr_hooks import discover
from snr_hooks.estimators import ExactSVD
from snr_hooks.rows import signs
from snr_hooks.term import SpectralTerm

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def as_matrix(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Output channels as rows, written as an explicit permutation and reshape."""
    axes = list(range(weight.ndim))
    if transposed:
        axes[0], axes[1] = 1, 0
    permuted = weight.permute(axes)
    return permuted.reshape(permuted.shape[0], -1)


def from_matrix(matrix: Tensor, weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Undo ``as_matrix``."""
    if not transposed:
        return matrix.reshape(weight.shape)
    swapped = (weight.shape[1], weight.shape[0], *weight.shape[2:])
    return matrix.reshape(swapped).transpose(0, 1)


def exact_term(weight: Tensor, *, transposed: bool = False) -> tuple[float, Tensor]:
    """sigma_1 and sigma_1 * u_1 v_1^T in the weight's shape, by numpy's SVD in float64."""
    matrix = as_matrix(weight.detach(), transposed=transposed).double().numpy()
    u, sigma, vh = np.linalg.svd(matrix, full_matrices=False)
    term = torch.from_numpy(sigma[0] * np.outer(u[:, 0], vh[0]))
    return float(sigma[0]), from_matrix(term, weight, transposed=transposed)


def is_transposed(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), TRANSPOSED)


def exact_terms(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[float, Tensor]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {
        name: exact_term(parameters[name], transposed=is_transposed(model, name)) for name in names
    }


def penalty(model: nn.Module, strengths: Mapping[str, float]) -> Tensor:
    """sum of (lambda / 2) * sigma_1^2, differentiable by autograd through svdvals."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    total = torch.zeros((), dtype=next(iter(parameters.values())).dtype)
    for name, strength in strengths.items():
        matrix = as_matrix(parameters[name], transposed=is_transposed(model, name))
        total = total + strength / 2 * torch.linalg.svdvals(matrix)[0].square()
    return total


def matrix_with(singular_values: Iterable[float], m: int, n: int, seed: int) -> Tensor:
    """A float64 matrix with the given singular values and random singular vectors."""
    values = torch.tensor(list(singular_values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(m, len(values), generator=generator, dtype=values.dtype))
    right, _ = torch.linalg.qr(torch.randn(n, len(values), generator=generator, dtype=values.dtype))
    return (left * values) @ right.T


class SlowSubspace:
    """Locally optimal subspace iteration of one matrix in float64, with QR and SVD throughout.

    Every step spans the images of the last product and the vectors kept from the step before,
    takes the best unit vector in that span by an SVD, and forgets the rest.
    """

    def __init__(self, right: Tensor, kept_left: Tensor) -> None:
        self.span = right.to(torch.float64, copy=True)
        self.kept = kept_left.to(torch.float64, copy=True)
        self.on_right = True

    def lean(self) -> None:
        """Add to the last of an odd number of images a twentieth of a unit vector of signs."""
        k, n = self.span.shape
        if k % 2 and k > 1:
            direction = signs(1, n)[0].double() / n**0.5
            self.span[k - k // 2 - 1] += direction.bfloat16().double() / 20

    def step(self, matrix: Tensor) -> tuple[float, Tensor, Tensor]:
        map_ = matrix.double() if self.on_right else matrix.double().T
        k = len(self.span)
        # Without it, QR invents directions that nothing determines.
        self.independent = bool(
            torch.linalg.svdvals(self.span / self.span.norm(dim=1)[:, None])[-1] > 0.05
        )
        basis, triangular = torch.linalg.qr(self.span.T)
        basis = basis * triangular.diagonal().sign()  # as Gram-Schmidt has it
        images, sigmas, rotation = torch.linalg.svd(map_ @ basis, full_matrices=False)
        signs_ = torch.where(rotation.sum(1) < 0, -1, 1)
        images, rotation = images * signs_, rotation * signs_[:, None]
        best = (basis @ rotation.T).T
        images = images.T
        new_span = torch.cat([images[: k - k // 2], self.kept])
        self.span, self.kept = new_span, best[: k // 2]
        pair = (images[0], best[0]) if self.on_right else (best[0], images[0])
        self.on_right = not self.on_right
        return float(sigmas[0]), *pair


def penalty_of(matrices, *, top=1, pooled=False, psi=lambda sigma: sigma.square() / 2) -> Tensor:
    """sum of psi over the largest singular values of each matrix, or of all of them together."""
    spectra = [torch.linalg.svdvals(matrix) for matrix in matrices]
    if pooled:
        spectra = [torch.cat(spectra).sort(descending=True).values]
    return sum(psi(spectrum[:top]).sum() for spectrum in spectra)


def products_of(target, matrices, seed: int, k: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """W V and W^T U of each matrix by the target's view, and by plain products."""
    view, weight = target.view, target.parameter.detach()
    *batch, m, n = view.shape(weight)
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(*batch, k, n, generator=generator, dtype=torch.float64)
    u = torch.randn(*batch, k, m, generator=generator, dtype=torch.float64)
    right, left = v.new_empty(*batch, k, m), v.new_empty(*batch, k, n)
    with torch.no_grad():  # as the iteration does
        view.matvec(weight, v, right)()
        view.rmatvec(weight, u, left)()
    stacked = torch.stack(list(matrices)).view(*batch, m, n)
    return [right, left], [v @ stacked.mT, u @ stacked]


def term_of(module, name, choice):
    """The targets of a parameter, and their terms by exact SVD, added to a zero gradient."""
    found = discover(module, choose={name: choice}).targets
    targets = [target for target in found if target.parameter_name == name]
    optimizer = torch.optim.SGD([module.get_parameter(name)], lr=1.0)
    term = SpectralTerm(optimizer, ExactSVD(), 1.0, None)
    term.targets = tuple(targets)
    grad = torch.zeros_like(module.get_parameter(name))
    for target in targets:
        term.add(target, grad)
    return targets, grad
