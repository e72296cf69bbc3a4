"""Convolution with a kernel mixed anew at every position: the core of UCDIR's Adaptive Kernel Guidance block.

Paper: A Unified Conditional Framework for Diffusion-based Image Restoration (Zhang et al., NeurIPS 2023), eq. 2.

A group has c = C / N channels. Let A (C, 9 c + 1) be its kernel bases, rows in (c, N) order, biases as last column,
and X (9 c + 1, P) the 3x3 neighbourhoods of P positions, ones as last row. Then

    Z = A X,    y[c] = sum_n mix[n] Z[c, n].

Z of a whole image is N times as large as x, and nearly all the time would go into moving it. So the work is cut into
tiles of some rows (or small images) and some groups, whose X and Z stay in the cache, and the backward pass computes
them again instead of keeping them.
"""

from __future__ import annotations

import math
from typing import Iterator, Tuple

import torch
import torch.nn.functional as F

# Elements of X and Z together, and positions, of one tile (unless a single row has more). Measured, 2**18 to 2**21 and
# 512 to 8192 on two AVX-512 cores: small tiles lose more to calls than they gain in the cache; above this it is flat.
TILE_ELEMENTS = 2**20
TILE_POSITIONS = 8192

# From this width on the matrix products are nearly all of the cost. To compute one again then costs more than to keep
# all C * N channels, where these are few: training is 1.1 times (C = 256) to 1.5 times (C = 512) faster with the loop.
LOOP_CHANNELS = 256
LOOP_ELEMENTS = 2**22


def adaptive_kernel_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """3x3 convolution whose kernel is, at every position, a mix of N grouped kernel bases (paper, eq. 2).

    y[c] = sum_n mix[n] * (bias[c, n] + weight[c, n] * x[input group of c]), with N groups of C / N channels.

    The arithmetic is that of a plain 3x3 convolution C -> C. On the CPU C * N channels are never held at once, not
    even for the backward pass, and half precision is computed in float32. :func:`adaptive_kernel_conv_loop` is taken
    instead for wide and small inputs (C >= 256, at most 2**22 elements in C * N channels), on other devices, and by
    what has to see plain operations (torch.func, torch.compile, tracing).

    Args:
        x: (B, C, H, W).
        weight: (C * N, C / N, 3, 3), row c * N + n for output channel c and basis n.
        bias: (C * N,).
        mix: (B, N, H, W), the multi-source fusion weights M.

    Returns:
        (B, C, H, W), dtype of x.
    """
    if (
        x.device.type != "cpu"
        or (x.shape[1] >= LOOP_CHANNELS and x.numel() * mix.shape[1] <= LOOP_ELEMENTS)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    ):
        return adaptive_kernel_conv_loop(x, weight, bias, mix)
    return _AdaptiveKernelConv.apply(x, weight, bias, mix)


def adaptive_kernel_conv_loop(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """:func:`adaptive_kernel_conv` as one plain convolution per group; autograd keeps all C * N channels."""
    bases = mix.shape[1]
    groups = []
    for xg, wg, bg in zip(x.chunk(bases, 1), weight.to(x.dtype).chunk(bases), bias.to(x.dtype).chunk(bases)):
        z = F.conv2d(xg, wg, bg, padding=1).unflatten(1, (-1, bases))
        groups.append((z * mix.unsqueeze(1)).sum(2))
    return torch.cat(groups, 1).to(x.dtype)


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


class _AdaptiveKernelConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mix):
        ctx.save_for_backward(x, weight, bias, mix)
        dtype = x.dtype
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
        return y.to(dtype)

    @staticmethod
    def backward(ctx, grad_y):
        if torch.is_grad_enabled():  # create_graph
            return _differentiable_backward(ctx, grad_y)
        need_x, need_weight, need_bias, need_mix = ctx.needs_input_grad
        need_kernels = need_weight or need_bias
        weight_shape = ctx.saved_tensors[1].shape
        x, kernels, mix = _operands(*ctx.saved_tensors)
        grad_y = grad_y.to(x.dtype).contiguous()
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
        return grad_x, grad_kernels[:, :-1].reshape(weight_shape), grad_kernels[:, -1], grad_mix


def _differentiable_backward(ctx, grad_y):
    """The gradients with a graph of their own, for second derivatives."""
    needs = ctx.needs_input_grad
    inputs = [t.view_as(t) for t in ctx.saved_tensors]  # new nodes: no way from one input to another through the graph
    wanted = [t for t, need in zip(inputs, needs) if need]
    grads = iter(torch.autograd.grad(adaptive_kernel_conv_loop(*inputs), wanted, grad_y, create_graph=True))
    return tuple(next(grads) if need else None for need in needs)


def _operands(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, A of all groups (N, C, 9 c + 1) and mix; contiguous, in float32 or better."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    kernels = torch.cat((weight.to(dtype).flatten(1), bias.to(dtype).unsqueeze(1)), 1)
    return x.to(dtype).contiguous(), kernels.view(mix.shape[1], x.shape[1], -1), mix.to(dtype).contiguous()


def _im2col(columns: torch.Tensor, windows: torch.Tensor) -> None:
    columns[:, :-1].view(windows.shape).copy_(windows)
    columns[:, -1].fill_(1)


def _col2im(windows: torch.Tensor, columns: torch.Tensor) -> None:
    columns = columns[:, :-1].view(windows.shape)
    for i in range(3):
        for j in range(3):
            windows[:, :, i, j].add_(columns[:, :, i, j])
