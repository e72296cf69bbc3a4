"""Padding that lets a strided network take any image size."""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
