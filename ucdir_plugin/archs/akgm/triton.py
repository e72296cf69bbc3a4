"""The adaptive kernel convolution of akgm.py for CUDA: Triton kernels, forward and backward.

Names as in akgm.py: a group has c = C / N channels, A (C N, 9 c + 1) are the kernel bases of all groups, biases as last
column, X are the 3x3 neighbourhoods of the positions, ones as last row. For one group

    Z = A X,    y[c] = sum_n mix[n] Z[c, n]    (paper, eq. 2),    grad_Z[c, n] = mix[n] grad_y[c].

Every program gathers a tile of X or builds one of grad_Z, multiplies it, and sums in registers: C N channels of no
tensor are ever in global memory. Columns of A are in (tap, channel) order: of a channels-last x, they are runs.

Every result is deterministic, bit for bit for given shapes, strides and dtypes on one kind of GPU: no atomics; where a
sum is split over programs, each writes its own part, and the number of parts depends on the shapes alone.

Never run on a GPU: correct through the interpreter, not timed. Tiles are reasoned, not measured. The compiler's output
for sm_80, 90, 100 and 120 was seen for some shapes (C = 12 to 512, all dtypes): at most 28 bytes of registers spilled.

Where there is no Triton, importing this module is an ImportError; ``import ucdir_plugin`` does not import it.
"""

from __future__ import annotations

import contextlib
from typing import Dict, Optional, Tuple

import torch
import triton
import triton.language as tl

# Programs that keep a large GPU busy: below this, tiles get smaller and sums are split.
PROGRAMS = 512

# Bases of a tile; more are summed in turn.
TILE_BASES = 16


def available() -> bool:
    """Whether the kernels can run here: on a GPU that Triton supports, or because its interpreter is on."""
    if not isinstance(_forward, triton.JITFunction):  # TRITON_INTERPRET=1 when this module was imported
        return True
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Eq. 2. Tensors may have any strides; sums are in float32, products in the dtype of x (TF32: see _precision).

    Args:
        x: (B, C, H, W), float32, float16 or bfloat16.
        weight: (C * N, C / N, 3, 3), row c * N + n for output channel c and basis n.
        bias: (C * N,).
        mix: (B, N, H, W).

    Returns:
        (B, C, H, W), dtype and memory format of x.

    Raises:
        TypeError: x is of another dtype.
        ValueError: B * H * W is 2**31 or nearly so.
    """
    sizes, const = _configuration(x, mix)
    tiles, chunks = _tiles(sizes[0], const)
    y = torch.empty_like(x)
    args = (x, _matrix(weight, bias, x, const), mix, y, *x.stride(), *mix.stride(), *y.stride(), *sizes)
    _launch(_forward, tiles * const["N"] * chunks, args, const)
    return y


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    mix: torch.Tensor,
    needs: Tuple[bool, bool, bool, bool],
) -> Tuple[Optional[torch.Tensor], ...]:
    """Gradients of x, weight, bias and mix, each in the dtype of its tensor; None where ``needs`` is False.

    grad_y: (B, C, H, W), any strides and float dtype. grad_Z is rounded to the dtype of x: float16 needs a scaled loss.
    """
    sizes, const = _configuration(x, mix)
    a = _matrix(weight, bias, x, const)
    grad_x, grad_weight, grad_bias, grad_mix = None, None, None, None
    if needs[0]:
        grad_x = _backward_x(grad_y, x, a, mix, sizes, const)
    if needs[1] or needs[2]:
        grad_a = _backward_a(grad_y, x, a, mix, sizes, const)
        columns = 9 * const["c"]
        if needs[1]:
            grad_weight = grad_a[:, :columns].view(len(a), 3, 3, -1).permute(0, 3, 1, 2).to(weight.dtype).contiguous()
        if needs[2]:
            grad_bias = grad_a[:, columns].to(bias.dtype).contiguous()
    if needs[3]:
        grad_mix = _backward_mix(grad_y, x, a, mix, sizes, const)
    return grad_x, grad_weight, grad_bias, grad_mix


def _backward_x(grad_y, x, a, mix, sizes, const):
    tx = min(32, max(16, triton.next_power_of_2(const["c"])))  # float32 would spill with 64, and with more rows
    parts = const["N"] * triton.cdiv(const["c"], tx)
    const = {**const, "TX": tx, "TP": _tile_positions(sizes[0], parts)}
    if x.dtype == torch.float32:
        const["TC"] = max(16 // const["TN"], min(const["TC"], 32 // const["TN"]))
    tiles, _ = _tiles(sizes[0], const)
    grad_x = torch.empty_like(x)
    args = (grad_y, a, mix, grad_x, *grad_y.stride(), *mix.stride(), *grad_x.stride(), *sizes)
    _launch(_grad_x, tiles * parts, args, const)
    return grad_x


def _backward_a(grad_y, x, a, mix, sizes, const):
    const = {**const, "TP": 32, "TK": min(64, triton.next_power_of_2(const["K"]))}
    tiles, chunks = _tiles(sizes[0], const)
    blocks = const["N"] * chunks * triton.cdiv(const["N"], const["TN"]) * triton.cdiv(const["K"], const["TK"])
    splits = max(1, min(PROGRAMS // blocks, tiles // 8))  # at least eight steps for each
    parts = torch.empty((splits, *a.shape), dtype=torch.float32, device=a.device)
    args = (grad_y, x, mix, parts, *grad_y.stride(), *x.stride(), *mix.stride(), parts.stride(0), splits, *sizes)
    _launch(_grad_a, splits * blocks, args, const)
    return parts[0] if splits == 1 else parts.sum(0)


def _backward_mix(grad_y, x, a, mix, sizes, const):
    tiles, chunks = _tiles(sizes[0], const)
    splits = max(1, min(PROGRAMS // max(1, tiles), const["N"] * chunks))
    grad_mix = torch.empty_like(mix, dtype=torch.float32)
    parts = grad_mix[None] if splits == 1 else grad_mix.new_empty(splits, *mix.shape)
    args = (grad_y, x, a, parts, *grad_y.stride(), *x.stride(), *parts.stride(), splits, *sizes)
    _launch(_grad_mix, tiles * splits, args, const)
    if splits > 1:
        torch.sum(parts, 0, out=grad_mix)
    return grad_mix.to(mix.dtype)


def _configuration(x: torch.Tensor, mix: torch.Tensor) -> Tuple[Tuple[int, int, int], Dict]:
    """((positions, H, W), compile-time constants: sizes, tiles of powers of two, precision)."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"Triton's adaptive kernel convolution is for float32, float16 and bfloat16, not {x.dtype}")
    batch, channels, height, width = x.shape
    positions = batch * height * width
    if positions >= 2**31 - 2**16:  # positions are int32, offsets int64
        raise ValueError(f"{positions} positions are too many")
    bases = mix.shape[1]
    c = channels // bases
    half = x.dtype != torch.float32
    # A tile of Z has TP positions and TC * TN rows: at most 64 floats a thread. tl.dot wants at least 16 of everything.
    tn = min(triton.next_power_of_2(bases), TILE_BASES)
    tc = max(min(triton.next_power_of_2(c), (128 if half else 64) // tn), 16 // tn)
    tk = 32 if half and c >= 16 else 16
    tp = _tile_positions(positions, bases * triton.cdiv(c, tc))
    dot = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[x.dtype]
    if dot == tl.bfloat16 and not isinstance(_forward, triton.JITFunction):
        dot = tl.float32  # the interpreter would multiply the bits of bfloat16 as integers
    const = {"c": c, "N": bases, "K": triton.cdiv(9 * c + 1, tk) * tk, "TP": tp, "TC": tc, "TN": tn, "TK": tk}
    return (positions, height, width), {**const, "DOT": dot, "PRECISION": _precision()}


def _tile_positions(positions: int, parts: int) -> int:
    """Positions of a tile when each has programs for so many parts of the channels."""
    size = 128
    while size > 32 and triton.cdiv(positions, size) * parts < PROGRAMS:
        size //= 2
    return size


def _precision() -> str:
    """Precision of float32 products: exact, unless torch's switch for CUDA matrix products allows TF32."""
    switch = torch.backends.cuda.matmul
    # From torch 2.9 on the old name raises an error once the new one was set.
    tf32 = switch.fp32_precision == "tf32" if hasattr(switch, "fp32_precision") else switch.allow_tf32
    return "tf32" if tf32 else "ieee"


def _tiles(positions: int, const: Dict) -> Tuple[int, int]:
    """Tiles of positions, tiles of one group's output channels."""
    return triton.cdiv(positions, const["TP"]), triton.cdiv(const["c"], const["TC"])


def _matrix(weight: torch.Tensor, bias: torch.Tensor, x: torch.Tensor, const: Dict) -> torch.Tensor:
    """A (C * N, K), K >= 9 c + 1: columns (tap, channel), bias, zeros."""
    columns = 9 * const["c"]
    a = x.new_zeros(len(weight), const["K"])
    a[:, :columns].view(len(weight), 3, 3, -1).copy_(weight.permute(0, 2, 3, 1))
    a[:, columns] = bias
    return a


def _warps(const: Dict) -> int:
    """Warps of a program: as many as keep its tile of Z in registers; float32 without TF32 needs most for operands."""
    return 8 if const["TC"] * const["TN"] > (16 if const["DOT"] == tl.float32 else 64) else 4


def _launch(kernel, programs: int, args: tuple, const: Dict) -> None:
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        if programs:
            kernel[(programs,)](*args, **const, num_warps=_warps(const), num_stages=2)


# In the kernels: x_b, x_c, x_h, x_w are the strides of x, those of the others likewise; c and upper case are known at
# compile time. Offsets are int64: a large image has 2**31 elements. TP, TC, TN, TK, TX are the sizes of tiles.


@triton.jit
def _locate(p, positions, height, width):
    """Image, row and column of positions p (P,), and bits of the neighbours (3 * i + j) that are inside the image."""
    w = p % width
    h = p // width % height
    b = p // width // height
    rows = 0o070 + tl.where(h > 0, 0o007, 0) + tl.where(h < height - 1, 0o700, 0)
    columns = 0o222 + tl.where(w > 0, 0o111, 0) + tl.where(w < width - 1, 0o444, 0)
    inside = tl.where(p < positions, rows & columns, 0)
    return b.to(tl.int64), h.to(tl.int64), w.to(tl.int64), inside


@triton.jit
def _windows(x, inside, g, k, x_c, x_h, x_w, c: tl.constexpr):
    """Rows k of X of group g, transposed: (P, TK). x are pointers (P,) to channel 0."""
    tap = tl.minimum(k // c, 9).to(tl.int64)  # 9: ones, and beyond them padding that meets zeros of A
    offset = (g * c + k % c).to(tl.int64) * x_c + (tap // 3 - 1) * x_h + (tap % 3 - 1) * x_w
    mask = (inside[:, None] >> tap[None, :].to(tl.int32)) & 1
    values = tl.load(x[:, None] + offset[None, :], mask=mask != 0, other=0.0)
    return tl.where(tap[None, :] == 9, 1.0, values.to(tl.float32)).to(values.dtype)


@triton.jit
def _rows(g, c0, n0, c: tl.constexpr, N: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr):
    """Rows of A of a tile of output channels of group g and bases, (TC * TN,), and which of them exist."""
    row = tl.arange(0, TC * TN)
    i = c0 + row // TN
    n = n0 + row % TN
    return ((g * c + i) * N + n).to(tl.int64), (i < c) & (n < N)


@triton.jit
def _z(
    x, inside, a, g, c0, n0, x_c, x_h, x_w,
    c: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of Z = A X: (TP, TC, TN)."""
    row, exists = _rows(g, c0, n0, c, N, TC, TN)
    z = tl.zeros((TP, TC * TN), dtype=tl.float32)
    for k0 in range(0, K, TK):
        k = k0 + tl.arange(0, TK)
        columns = _windows(x, inside, g, k, x_c, x_h, x_w, c)
        kernels = tl.load(a + row[None, :] * K + k[:, None], mask=exists[None, :], other=0.0)
        z = tl.dot(columns.to(DOT), kernels.to(DOT), z, input_precision=PRECISION)
    return tl.reshape(z, (TP, TC, TN))


@triton.jit
def _forward(
    x, a, mix, y, x_b, x_c, x_h, x_w, m_b, m_n, m_h, m_w, y_b, y_c, y_h, y_w, positions, height, width,
    c: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of TP positions and TC channels of one group; neighbouring programs have the same positions."""
    chunks: tl.constexpr = (c + TC - 1) // TC
    part = tl.program_id(0) % (N * chunks)
    g = part // chunks
    c0 = part % chunks * TC
    p = tl.program_id(0) // (N * chunks) * TP + tl.arange(0, TP)
    b, h, w, inside = _locate(p, positions, height, width)
    exists = (p < positions)[:, None]
    x += b * x_b + h * x_h + w * x_w
    mix += b * m_b + h * m_h + w * m_w
    y += b * y_b + h * y_h + w * y_w
    result = tl.zeros((TP, TC), dtype=tl.float32)
    for n0 in range(0, N, TN):
        n = n0 + tl.arange(0, TN)[None, :]
        m = tl.load(mix[:, None] + n.to(tl.int64) * m_n, mask=exists & (n < N), other=0.0).to(tl.float32)
        z = _z(x, inside, a, g, c0, n0, x_c, x_h, x_w, c, N, K, TP, TC, TN, TK, DOT, PRECISION)
        result += tl.sum(z * m[:, None, :], 2)
    i = c0 + tl.arange(0, TC)[None, :]
    tl.store(y[:, None] + (g * c + i).to(tl.int64) * y_c, result.to(y.dtype.element_ty), mask=exists & (i < c))


@triton.jit
def _grad_mix(
    gy, x, a, gm, y_b, y_c, y_h, y_w, x_b, x_c, x_h, x_w, m_s, m_b, m_n, m_h, m_w, splits, positions, height, width,
    c: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_mix[n] = sum_c grad_y[c] Z[c, n] of TP positions, over every splits-th tile of channels."""
    chunks: tl.constexpr = (c + TC - 1) // TC
    split = tl.program_id(0) % splits
    p = tl.program_id(0) // splits * TP + tl.arange(0, TP)
    b, h, w, inside = _locate(p, positions, height, width)
    exists = (p < positions)[:, None]
    gy += b * y_b + h * y_h + w * y_w
    x += b * x_b + h * x_h + w * x_w
    gm += split.to(tl.int64) * m_s + b * m_b + h * m_h + w * m_w
    for n0 in range(0, N, TN):
        result = tl.zeros((TP, TN), dtype=tl.float32)
        for part in range(split, N * chunks, splits):
            g = part // chunks
            c0 = part % chunks * TC
            i = c0 + tl.arange(0, TC)[None, :]
            channel = (g * c + i).to(tl.int64)
            grad = tl.load(gy[:, None] + channel * y_c, mask=exists & (i < c), other=0.0).to(tl.float32)
            z = _z(x, inside, a, g, c0, n0, x_c, x_h, x_w, c, N, K, TP, TC, TN, TK, DOT, PRECISION)
            result += tl.sum(z * grad[:, :, None], 1)
        n = n0 + tl.arange(0, TN)[None, :]
        tl.store(gm[:, None] + n.to(tl.int64) * m_n, result, mask=exists & (n < N))


@triton.jit
def _grad_x(
    gy, a, mix, gx, y_b, y_c, y_h, y_w, m_b, m_n, m_h, m_w, x_b, x_c, x_h, x_w, positions, height, width,
    c: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TP: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr,
    TK: tl.constexpr, TX: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_x, the sum over taps of A^T grad_Z at the opposite neighbour, of TP positions and TX channels of a group."""
    chunks: tl.constexpr = (c + TX - 1) // TX
    part = tl.program_id(0) % (N * chunks)
    g = part // chunks
    j = part % chunks * TX + tl.arange(0, TX)[None, :]
    p = tl.program_id(0) // (N * chunks) * TP + tl.arange(0, TP)
    b, h, w, inside = _locate(p, positions, height, width)
    gx += b * x_b + h * x_h + w * x_w
    result = tl.zeros((TP, TX), dtype=tl.float32)
    for tap in range(9):
        exists = ((inside >> (8 - tap)) & 1)[:, None] != 0
        row = h + (1 - tap // 3)
        column = w + (1 - tap % 3)
        gy_there = gy + b * y_b + row * y_h + column * y_w
        mix_there = mix + b * m_b + row * m_h + column * m_w
        for c0 in range(0, c, TC):
            i = c0 + tl.arange(0, TC)[None, :]
            grad = tl.load(gy_there[:, None] + (g * c + i).to(tl.int64) * y_c, mask=exists & (i < c), other=0.0)
            for n0 in range(0, N, TN):
                n = n0 + tl.arange(0, TN)[None, :]
                m = tl.load(mix_there[:, None] + n.to(tl.int64) * m_n, mask=exists & (n < N), other=0.0)
                grad_z = grad.to(tl.float32)[:, :, None] * m.to(tl.float32)[:, None, :]
                grad_z = tl.reshape(grad_z, (TP, TC * TN)).to(a.dtype.element_ty)
                rows, found = _rows(g, c0, n0, c, N, TC, TN)
                kernels = tl.load(a + rows[:, None] * K + (tap * c + j), mask=found[:, None] & (j < c), other=0.0)
                result = tl.dot(grad_z.to(DOT), kernels.to(DOT), result, input_precision=PRECISION)
    to = gx[:, None] + (g * c + j).to(tl.int64) * x_c
    tl.store(to, result.to(gx.dtype.element_ty), mask=(p < positions)[:, None] & (j < c))


@triton.jit
def _grad_a(
    gy, x, mix, ga, y_b, y_c, y_h, y_w, x_b, x_c, x_h, x_w, m_b, m_n, m_h, m_w, a_s, splits, positions, height, width,
    c: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    TP: tl.constexpr, TC: tl.constexpr, TN: tl.constexpr, TK: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_A = grad_Z X^T of TC * TN rows and TK columns, over every splits-th tile of positions."""
    chunks: tl.constexpr = (c + TC - 1) // TC
    basis_tiles: tl.constexpr = (N + TN - 1) // TN
    column_tiles: tl.constexpr = (K + TK - 1) // TK
    block = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    k = block % column_tiles * TK + tl.arange(0, TK)
    n0 = block // column_tiles % basis_tiles * TN
    c0 = block // (column_tiles * basis_tiles) % chunks * TC
    g = block // (column_tiles * basis_tiles * chunks)
    i = c0 + tl.arange(0, TC)[:, None]
    n = n0 + tl.arange(0, TN)[:, None]
    gy += (g * c + i).to(tl.int64) * y_c
    mix += n.to(tl.int64) * m_n
    result = tl.zeros((TC * TN, TK), dtype=tl.float32)
    for p0 in range(split * TP, positions, splits * TP):
        p = p0 + tl.arange(0, TP)
        b, h, w, inside = _locate(p, positions, height, width)
        exists = (p < positions)[None, :]
        grad = tl.load(gy + (b * y_b + h * y_h + w * y_w)[None, :], mask=exists & (i < c), other=0.0)
        m = tl.load(mix + (b * m_b + h * m_h + w * m_w)[None, :], mask=exists & (n < N), other=0.0)
        grad_z = grad.to(tl.float32)[:, None, :] * m.to(tl.float32)[None, :, :]
        grad_z = tl.reshape(grad_z, (TC * TN, TP)).to(x.dtype.element_ty)
        columns = _windows(x + b * x_b + h * x_h + w * x_w, inside, g, k, x_c, x_h, x_w, c)
        result = tl.dot(grad_z.to(DOT), columns.to(DOT), result, input_precision=PRECISION)
    row, found = _rows(g, c0, n0, c, N, TC, TN)
    to = ga + split.to(tl.int64) * a_s + row[:, None] * K + k[None, :]
    tl.store(to, result, mask=found[:, None] & (k < K)[None, :])
