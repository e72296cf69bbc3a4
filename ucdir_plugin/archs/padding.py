"""Padding that lets a strided network take any image size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def network_stride(levels: int, released_padding: bool) -> int:
    """Total stride of a U-Net, and what it pads its images to multiples of: at least 32 in UCDIR's release."""
    stride = 2 ** (levels - 1)
    return max(stride, 32) if released_padding else stride


def pad_to_multiple(x: torch.Tensor, multiple: int, always: bool = False) -> torch.Tensor:
    """Pad right and bottom to the next multiple, by reflection (where the image is too small, by repeating the edge).

    Args:
        x: (B, C, H, W).
        multiple: the network's total stride.
        always: add a whole ``multiple`` even to an aligned size, as UCDIR's release does.
    """
    h, w = x.shape[-2:]
    pad_h, pad_w = (multiple - n % multiple if always or n % multiple else 0 for n in (h, w))
    if not pad_h and not pad_w:
        return x
    mode = "reflect" if pad_h < h and pad_w < w else "replicate"
    return F.pad(x, (0, pad_w, 0, pad_h), mode=mode)


def size_multiple(net: nn.Module) -> int:
    """What the sides of its images should be a multiple of: a ``stride``, or what archs of BasicSR fail without."""
    own = getattr(net, "stride", None)
    if isinstance(own, int):
        return own
    if type(net).__name__ == "RRDBNet":  # it folds pixels into channels where it enlarges less than four times
        return {1: 4, 2: 2}.get(net.scale, 1)
    windows = [getattr(module, "window_size", 1) for module in net.modules()]  # SwinIR: its model pads, it does not
    return max((size for size in windows if isinstance(size, int)), default=1)


def pad_for(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Pad x for a network that does not pad itself; those with a ``stride`` do."""
    return x if hasattr(net, "stride") else pad_to_multiple(x, size_multiple(net))
