"""Singular value decompositions of the degradations that have an easy one, for DDRM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence, Tuple

import torch

from ucdir_plugin.diffusion.bird.degradation import Degradation
from ucdir_plugin.diffusion.bird.operators import Operator
from ucdir_plugin.diffusion.noise import normal
from ucdir_plugin.utils.errors import UserError


@dataclass(frozen=True)
class Decomposition:
    """A = U S V^T; images (1, C, H, W), what A gives (1, m), coordinates (1, n) with n at least as many as pixels.

    Attributes:
        values: S, (1, n), not negative; 0 where A sees nothing.
        image: V, coordinates -> image.
        coordinates: V^T, image -> coordinates; V V^T = 1.
        given: U, coordinates -> what A gives.
        seen: U^T, its adjoint.
    """

    values: torch.Tensor
    image: Callable[[torch.Tensor], torch.Tensor]
    coordinates: Callable[[torch.Tensor], torch.Tensor]
    given: Callable[[torch.Tensor], torch.Tensor]
    seen: Callable[[torch.Tensor], torch.Tensor]


def decompose(physics: Any, observed: Sequence[Tuple[torch.Tensor, Degradation]], like: torch.Tensor) -> Decomposition:
    """Decompose a degradation whose rows are orthogonal (holes, means of blocks or channels), or a separable blur.

    Args:
        physics: a linear operator of deepinv, of :func:`ucdir_plugin.restoration.deepinv_solver.physics_of`.
        observed: what it was made of.
        like: the scene, (1, C, H, W).

    Raises:
        UserError: for a degradation of another kind.
    """
    rows = _orthogonal_rows(physics, like)
    if rows is not None:
        return rows
    (_, degradation), several = observed[0], len(observed) > 1
    factors = _separable(degradation.kernel) if degradation.kernel.shape[2] == 1 else None
    blur = type(degradation.operator) is Operator and degradation.padding in ("valid", "zeros")
    if several or not blur or factors is None:
        raise UserError(
            "DDRM needs singular vectors: holes, means of blocks or channels, or one blur that is separable, as a"
            " Gaussian is; take ddnm, dps or diffpir"
        )
    return _separable_blur(*factors, degradation, like)


def _orthogonal_rows(physics: Any, like: torch.Tensor) -> Decomposition | None:
    """Of an A whose A A^T is diagonal; the coordinates are its rows, and the image without what they see."""
    count = physics.A(like).shape[1]
    square = physics.A(physics.A_adjoint(like.new_ones(1, count)))
    probe = normal((1, count), "rows").to(like)
    if not torch.allclose(physics.A(physics.A_adjoint(probe)), square * probe, rtol=1e-3, atol=1e-5):
        return None
    values = square.clamp(min=0).sqrt()
    inverse = torch.where(values > 0, 1 / values.clamp(min=1e-12), torch.zeros_like(values))

    def rows(x: torch.Tensor) -> torch.Tensor:
        return physics.A(x) * inverse

    def back(v: torch.Tensor) -> torch.Tensor:
        return physics.A_adjoint(v * inverse)

    def unseen(x: torch.Tensor) -> torch.Tensor:
        return x - back(rows(x))

    def image(c: torch.Tensor) -> torch.Tensor:
        return back(c[:, :count]) + unseen(c[:, count:].view(like.shape))

    def coordinates(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows(x), unseen(x).flatten(1)], 1)

    def seen(y: torch.Tensor) -> torch.Tensor:
        return torch.cat([y, y.new_zeros(1, like.numel())], 1)

    def given(c: torch.Tensor) -> torch.Tensor:
        return c[:, :count]

    values = torch.cat([values, values.new_zeros(1, like.numel())], 1)
    return Decomposition(values, image, coordinates, given, seen)


def _separable(kernel: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor] | None:
    """The column and the row whose product a kernel (1, C, 1, k, k) is, the same for all channels; else None."""
    plane = kernel[0, 0, 0].double()
    u, s, v = torch.linalg.svd(plane)
    rank_one = float(s[1:].sum()) < 1e-4 * float(s[0])
    if not rank_one or not torch.allclose(kernel.double(), plane.expand(kernel.shape), atol=1e-6):
        return None
    return u[:, 0] * s[0].sqrt(), v[0] * s[0].sqrt()


def _matrix(taps: torch.Tensor, size: int, padding: str) -> torch.Tensor:
    """A correlation with ``taps`` along one side of ``size`` pixels: (h, size)."""
    half = len(taps) // 2
    out = size - 2 * half if padding == "valid" else size
    matrix = taps.new_zeros(out, size + (0 if padding == "valid" else 2 * half))
    for row in range(out):
        matrix[row, row : row + len(taps)] = taps
    return matrix if padding == "valid" else matrix[:, half : half + size]


def _separable_blur(
    column: torch.Tensor, row: torch.Tensor, degradation: Degradation, like: torch.Tensor
) -> Decomposition:
    _, channels, height, width = like.shape
    sides = []
    for taps, size in ((column, height), (row, width)):
        u, s, vt = torch.linalg.svd(_matrix(taps, size, degradation.padding))
        full = s.new_zeros(size)
        full[: len(s)] = s
        sides.append((u.to(like), full.to(like), vt.to(like)))
    (u1, s1, v1), (u2, s2, v2) = sides
    values = torch.outer(s1, s2).expand(1, channels, -1, -1).flatten(1)

    def image(c: torch.Tensor) -> torch.Tensor:
        return v1.T @ c.view(like.shape) @ v2

    def coordinates(x: torch.Tensor) -> torch.Tensor:
        return (v1 @ x @ v2.T).flatten(1)

    def seen(y: torch.Tensor) -> torch.Tensor:
        c = y.new_zeros(like.shape)
        c[..., : len(u1), : len(u2)] = u1.T @ y.view(1, channels, len(u1), len(u2)) @ u2
        return c.flatten(1)

    def given(c: torch.Tensor) -> torch.Tensor:
        return (u1 @ c.view(like.shape)[..., : len(u1), : len(u2)] @ u2.T).flatten(1)

    return Decomposition(values, image, coordinates, given, seen)
