"""Adaptive kernel convolution in plain PyTorch on the CPU: tiles that stay in the cache. Notation: see akgm.py.

Z of a whole image is N times as large as x, and nearly all the time would go into moving it. So the work is cut into
tiles of some rows (or small images) and some groups, whose X and Z stay in the cache, and the backward pass computes
them again instead of keeping them.
"""

from __future__ import annotations

import math
from typing import Iterator, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

# Elements of X and Z together, and positions, of one tile (unless a single row has more). Measured, 2**18 to 2**21 and
# 512 to 8192 on two AVX-512 cores: small tiles lose more to calls than they gain in the cache; above this it is flat.
TILE_ELEMENTS = 2**20
TILE_POSITIONS = 8192


class _Tiling:
    """The tiles of one call: strips of positions, for each strip chunks of groups; and the memory for X and Z."""

    def __init__(self, x: torch.Tensor, bases: int):
        self.batch, channels, self.height, width = x.shape
        self.bases = bases
        elements = channels + 9 * channels // bases + 1  # of Z and X, for one position and group
        positions = min(TILE_POSITIONS, TILE_ELEMENTS // elements)
        self.rows = max(1, min(self.height, positions // width))
        self.images = max(1, min(self.batch, positions // (self.height * width)))
        positions = self.images * self.rows * width
        self.chunk = math.ceil(bases / max(1, math.ceil(bases * elements * positions / TILE_ELEMENTS)))
        self.scratch = x.new_empty(self.chunk * elements * positions)

    def strips(self) -> Iterator[Tuple[slice, int, int]]:
        """Images, first row and end row of each strip."""
        for image in range(0, self.batch, self.images):
            for top in range(0, self.height, self.rows):
                yield slice(image, image + self.images), top, min(top + self.rows, self.height)

    def pad(self, x: torch.Tensor, top: int, bottom: int) -> torch.Tensor:
        """The rows of a strip with a border of one: of the image inside, of zeros around it."""
        rows = x[:, :, max(top - 1, 0) : bottom + 1]
        return F.pad(rows, (1, 1, int(top == 0), int(bottom == self.height)))

    def groups(self, x: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """(b, C, h, w) -> chunks of (N, C / N, b, h, w), views."""
        return x.transpose(0, 1).unflatten(0, (self.bases, -1)).split(self.chunk)

    def windows(self, padded: torch.Tensor) -> Tuple[torch.Tensor, ...]:
        """(b, C, h + 2, w + 2) -> chunks of (N, C / N, 3, 3, b, h, w), views."""
        height, width = padded.shape[2] - 2, padded.shape[3] - 2
        return tuple(g.unfold(3, height, 1).unfold(4, width, 1).movedim(2, 4) for g in self.groups(padded))

    def matrices(self, windows: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Memory for X (g, 9 c + 1, P) and Z (g, C, P) of the tile that has these windows."""
        groups, per_group = windows.shape[:2]
        positions = windows.shape[-3:].numel()
        rows = 9 * per_group + 1, self.bases * per_group
        x, z = self.scratch[: groups * sum(rows) * positions].split([groups * r * positions for r in rows])
        return x.view(groups, rows[0], positions), z.view(groups, rows[1], positions)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Compute :func:`ucdir_plugin.archs.akgm.convolution.adaptive_kernel_conv`, in float32 or float64."""
    layout = memory_format(x)
    x, kernels, mix = _operands(x, weight, bias, mix)
    tiling = _Tiling(x, len(kernels))
    y = torch.empty_like(x)
    for images, top, bottom in tiling.strips():
        windows = tiling.windows(tiling.pad(x[images], top, bottom))
        m = mix[images, :, top:bottom].transpose(0, 1)
        outs = tiling.groups(y[images, :, top:bottom])
        for a, window, out in zip(kernels.split(tiling.chunk), windows, outs):
            columns, z = tiling.matrices(window)
            _im2col(columns, window)
            z.baddbmm_(a, columns, beta=0)
            torch.sum(z.view(len(a), -1, *m.shape).mul_(m), 2, out=out)
    return y.contiguous(memory_format=layout)


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mix: torch.Tensor,
    needs: Sequence[bool],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients of x, weight, bias and mix; those that ``needs`` leaves out may be None."""
    need_x, need_weight, need_bias, need_mix = needs
    need_kernels = need_weight or need_bias
    weight_shape, layouts = weight.shape, (memory_format(x), memory_format(mix))
    x, kernels, mix = _operands(x, weight, bias, mix)
    grad_y = grad_y.contiguous()
    tiling = _Tiling(x, len(kernels))
    grad_x, grad_mix = torch.zeros_like(x), torch.zeros_like(mix)
    grad_kernels = x.new_zeros(kernels.mT.shape)  # transposed: X gz^T is faster than gz X^T
    for images, top, bottom in tiling.strips():
        padded = tiling.pad(x[images], top, bottom)
        grad_padded = torch.zeros_like(padded)
        m, grad_m = (t[images, :, top:bottom].transpose(0, 1) for t in (mix, grad_mix))
        for a, grad_a, window, grad_window, gy in zip(
            kernels.split(tiling.chunk),
            grad_kernels.split(tiling.chunk),
            tiling.windows(padded),
            tiling.windows(grad_padded),
            tiling.groups(grad_y[images, :, top:bottom]),
        ):
            gy = gy.unsqueeze(2)
            columns, z = tiling.matrices(window)
            z_per_basis = z.view(len(a), -1, *m.shape)
            if need_kernels or need_mix:
                _im2col(columns, window)
            if need_mix:
                z.baddbmm_(a, columns, beta=0)
                grad_m.add_(z_per_basis.mul_(gy).sum((0, 1)))
            torch.mul(gy, m, out=z_per_basis)  # from here on, z is the gradient of Z
            if need_kernels:
                grad_a.baddbmm_(columns, z.mT)
            if need_x:  # and columns becomes that of X
                columns.baddbmm_(a.mT, z, beta=0)
                _col2im(grad_window, columns)
        first, last = max(top - 1, 0), min(bottom + 1, tiling.height)
        grad_x[images, :, first:last] += grad_padded[:, :, first - top + 1 : last - top + 1, 1:-1]
    grad_kernels = grad_kernels.mT.flatten(0, 1)
    grad_weight = grad_kernels[:, :-1].contiguous().view(weight_shape)
    grad_x, grad_mix = (t.contiguous(memory_format=f) for t, f in zip((grad_x, grad_mix), layouts))
    return grad_x, grad_weight, grad_kernels[:, -1].contiguous(), grad_mix


def memory_format(x: torch.Tensor) -> torch.memory_format:
    """Channels-last or contiguous, whichever x is in (contiguous if both or neither)."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, A of all groups (N, C, 9 c + 1) and mix, contiguous."""
    kernels = torch.cat((weight.flatten(1), bias.unsqueeze(1)), 1)
    return x.contiguous(), kernels.view(mix.shape[1], x.shape[1], -1), mix.contiguous()


def _im2col(columns: torch.Tensor, windows: torch.Tensor) -> None:
    columns[:, :-1].view(windows.shape).copy_(windows)
    columns[:, -1].fill_(1)


def _col2im(windows: torch.Tensor, columns: torch.Tensor) -> None:
    columns = columns[:, :-1].view(windows.shape)
    for i in range(3):
        for j in range(3):
            windows[:, :, i, j].add_(columns[:, :, i, j])
