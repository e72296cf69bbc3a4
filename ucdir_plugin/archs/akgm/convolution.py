"""Convolution with a kernel mixed anew at every position: the core of UCDIR's Adaptive Kernel Guidance block.

Paper: A Unified Conditional Framework for Diffusion-based Image Restoration (Zhang et al., NeurIPS 2023), eq. 2.

A group has c = C / N channels. Let A (C, 9 c + 1) be its kernel bases, rows in (c, N) order, biases as last column,
and X (9 c + 1, P) the 3x3 neighbourhoods of P positions, ones as last row. Then

    Z = A X,    y[c] = sum_n mix[n] Z[c, n].

All implementations but the loop never hold the C * N channels of Z, for the backward pass neither: akgm_compiled (C++,
built at first use), akgm_tiled (plain PyTorch on the CPU), akgm_triton (CUDA).
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Optional

import torch
import torch.nn.functional as F

from ucdir_plugin.archs.akgm import compiled as akgm_compiled
from ucdir_plugin.archs.akgm import tiled as akgm_tiled
from ucdir_plugin.compat import get_root_logger

# From this width on the matrix products are nearly all of the cost. To compute one again then costs more than to keep
# all C * N channels, where these are few: training is 1.1 times (C = 256) to 1.5 times (C = 512) faster with the loop
# than with tiles.
LOOP_CHANNELS = 256
LOOP_ELEMENTS = 2**22


def adaptive_kernel_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """k x k convolution whose kernel is, at every position, a mix of N grouped kernel bases (paper, eq. 2).

    y[c] = sum_n mix[n] * (bias[c, n] + weight[c, n] * x[input group of c]), with N groups of C / N channels.

    The arithmetic is that of a plain convolution C -> C. Half precision is computed in float32 on the CPU. Second
    derivatives, torch.func and other sizes than 3x3 go through :func:`adaptive_kernel_conv_loop`.

    Args:
        x: (B, C, H, W), contiguous or channels-last.
        weight: (C * N, C / N, k, k), k odd, row c * N + n for output channel c and basis n.
        bias: (C * N,).
        mix: (B, N, H, W), the multi-source fusion weights M.

    Returns:
        (B, C, H, W), dtype and memory format of x.
    """
    if weight.shape[-1] != 3:
        return adaptive_kernel_conv_loop(x, weight, bias, mix)
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        return _op(x, weight, bias, mix)
    plain = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()  # they must see plain operations
    if plain or not x.numel() or choose(x, mix.shape[1]) is None:
        return adaptive_kernel_conv_loop(x, weight, bias, mix)
    return _AdaptiveKernelConv.apply(x, weight, bias, mix)


def adaptive_kernel_conv_loop(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """:func:`adaptive_kernel_conv` as one plain convolution per group; autograd keeps all C * N channels."""
    bases = mix.shape[1]
    groups = []
    for xg, wg, bg in zip(x.chunk(bases, 1), weight.to(x.dtype).chunk(bases), bias.to(x.dtype).chunk(bases)):
        z = F.conv2d(xg, wg, bg, padding=weight.shape[-1] // 2).unflatten(1, (-1, bases))
        groups.append((z * mix.unsqueeze(1)).sum(2))
    return torch.cat(groups, 1).to(x.dtype)


def adaptive_full_kernel_conv(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> torch.Tensor:
    """The same with kernel bases that are not grouped, each C -> C: the paper's first form, N times the arithmetic.

    y[c] = sum_n mix[n] * (bias[c, n] + weight[c, n] * x). One basis after the other, so that C * N channels are never
    held at a time in inference.

    Args:
        x: (B, C, H, W).
        weight: (C * N, C, k, k), k odd, row c * N + n for output channel c and basis n.
        bias: (C * N,).
        mix: (B, N, H, W).

    Returns:
        (B, C, H, W), dtype of x.
    """
    bases = mix.shape[1]
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y: Optional[torch.Tensor] = None
    for n in range(bases):
        part = F.conv2d(x, weight[n::bases], bias[n::bases], padding=weight.shape[-1] // 2) * mix[:, n : n + 1]
        y = part if y is None else y + part
    return y.to(x.dtype)


def choose(x: torch.Tensor, bases: int) -> Optional[ModuleType]:
    """The module whose ``forward`` and ``backward`` are the fastest for an input; None is the loop."""
    if x.device.type == "cpu":
        if akgm_compiled.available():
            return akgm_compiled
        loop = x.shape[1] >= LOOP_CHANNELS and x.numel() * bases <= LOOP_ELEMENTS
        return None if loop else akgm_tiled
    return _triton(x.device, x.dtype) if x.device.type == "cuda" else None


@functools.cache
def _triton(device: torch.device, dtype: torch.dtype) -> Optional[ModuleType]:
    """akgm_triton if it works on this GPU: it was written without one, so it has to agree with the loop first."""
    if dtype == torch.float64 or os.environ.get("UCDIR_COMPILE") == "0":
        return None
    try:
        from ucdir_plugin.archs.akgm import triton as akgm_triton

        if not akgm_triton.available():
            return None
        reason = _disagreement(akgm_triton, device, dtype)
    except ImportError:
        return None
    except Exception as error:  # whatever it is: there is another way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if reason is None:
        return akgm_triton
    get_root_logger().warning(f"AKGM by plain convolutions, which needs more memory: Triton's fails here ({reason})")
    return None


def _disagreement(module: ModuleType, device: torch.device, dtype: torch.dtype) -> Optional[str]:
    """Where an implementation differs from the loop on a small input, by more than its rounding."""
    stream = torch.Generator().manual_seed(0)
    shapes = ((2, 32, 9, 11), (32 * 8, 4, 3, 3), (32 * 8,), (2, 8, 9, 11), (2, 32, 9, 11))
    *inputs, grad_y = (torch.randn(shape, generator=stream).to(device, dtype) for shape in shapes)
    exact = [t.double().requires_grad_() for t in inputs]
    y = adaptive_kernel_conv_loop(*exact)
    expected = (y, *torch.autograd.grad(y, exact, grad_y.double()))
    found = (module.forward(*inputs), *module.backward(grad_y, *inputs, (True,) * 4))
    for name, a, b in zip(("the output", "grad x", "grad weight", "grad bias", "grad mix"), found, expected):
        error = float((a - b).abs().max() / b.abs().max())
        if not error < 4 * torch.finfo(dtype).eps ** 0.5:  # TF32 and half precision round by a part in 1000 and 100
            return f"{name} is wrong by a part of {error:.1g}"
    return None


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    module = choose(x, mix.shape[1]) or akgm_tiled
    return module.forward(*_cast(x, weight, bias, mix)).to(x.dtype)


def _backward(grad_y, needs, *inputs):
    module = choose(inputs[0], inputs[3].shape[1]) or akgm_tiled
    grads = module.backward(*_cast(grad_y, *inputs), needs)
    return tuple(g.to(t.dtype) if need else None for g, t, need in zip(grads, inputs, needs))


def _cast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Single or double precision on the CPU, which computes slowly in less."""
    if tensors[0].device.type != "cpu":
        return list(tensors)
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return [t.to(dtype) for t in tensors]


class _AdaptiveKernelConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, mix):
        ctx.save_for_backward(x, weight, bias, mix)
        return _forward(x, weight, bias, mix)

    @staticmethod
    def backward(ctx, grad_y):
        needs = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return _backward(grad_y, needs, *ctx.saved_tensors)
        # create_graph: new nodes, so that there is no way from one input to another through the graph
        inputs = [t.view_as(t) for t in ctx.saved_tensors]
        wanted = [t for t, need in zip(inputs, needs) if need]
        grads = iter(torch.autograd.grad(adaptive_kernel_conv_loop(*inputs), wanted, grad_y, create_graph=True))
        return tuple(next(grads) if need else None for need in needs)


# For torch.compile: operations that it does not look into.


@torch.library.custom_op("ucdir_plugin::adaptive_kernel_conv", mutates_args=())
def _op(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    return _forward(x, weight, bias, mix)


@torch.library.custom_op("ucdir_plugin::adaptive_kernel_conv_backward", mutates_args=())
def _op_backward(
    grad_y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _backward(grad_y, (True,) * 4, x, weight, bias, mix)


@_op.register_fake
def _(x, weight, bias, mix):
    return torch.empty_like(x)


@_op_backward.register_fake
def _(grad_y, x, weight, bias, mix):
    return tuple(torch.empty_like(t) for t in (x, weight, bias, mix))


_op.register_autograd(
    lambda ctx, grad_y: _op_backward(grad_y, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
