"""FFDNet: a denoiser that is told the noise level, the prior of BIR-D that needs no download.

Paper: FFDNet: Toward a Fast and Flexible Solution for CNN based Image Denoising (Zhang et al., TIP 2018),
https://arxiv.org/abs/1710.04026
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import at_least_one


@register("arch")
class FFDNet(nn.Module):
    """Convolutions with ReLU on the image at half size; the defaults are the published colour model (0.85 M).

    Args:
        in_channels: of the image.
        width: channels of the convolutions.
        depth: convolutions, the first and the last included.

    Shape:
        x (B, in_channels, H, W) in [0, 1] plus noise, sigma (B,), the noise's standard deviation in [0, 75/255]
        -> (B, in_channels, H, W), the image without noise; any size.
    """

    stride = 2

    def __init__(self, in_channels: int = 3, width: int = 96, depth: int = 12):
        super().__init__()
        at_least_one(in_channels=in_channels, width=width, depth=depth - 1)
        layers: list[nn.Module] = []
        channels = 4 * in_channels + 1  # the noise level is a map of its own
        for _ in range(depth - 1):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
        self.model = nn.Sequential(*layers, nn.Conv2d(channels, 4 * in_channels, 3, padding=1))

    @property
    def receptive_field(self) -> int:
        """How far a result looks, in pixels, where patches start at multiples of the stride."""
        return 2 * sum(isinstance(layer, nn.Conv2d) for layer in self.model)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[-2:]
        h = F.pixel_unshuffle(pad_to_multiple(x, 2), 2)
        level = sigma.to(h.dtype).view(-1, 1, 1, 1).expand(len(h), 1, *h.shape[-2:])
        return F.pixel_shuffle(self.model(torch.cat((h, level), 1)), 2)[..., :height, :width]
