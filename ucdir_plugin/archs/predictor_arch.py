"""The initial predictor of UCDIR: the U-Net of "Learning to See in the Dark" (Chen et al., CVPR 2018)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

from ucdir_plugin.archs.padding import network_stride, pad_to_multiple
from ucdir_plugin.diffusion import tiling
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import UserError, at_least_one


@register("arch")
class SIDUNet(nn.Module):
    """Plain U-Net: pairs of 3x3 convolutions, max-pooling, 2x2 transposed convolutions, LeakyReLU 0.2, 1x1 head.

    The released predictor is ``SIDUNet()`` (7.76 M parameters, 12 GMACs at 256x256).

    Args:
        in_channel, out_channel: image channels.
        width: channels of the first level; each further level doubles them.
        levels: resolutions, so that the total stride is 2 ** (levels - 1).
        residual: add the input to the output (in_channel = out_channel), which trains faster; not in the release.
        released_padding: pad to multiples of 32 and aligned sizes by a whole 32, bit-faithful to the release.

    Shape:
        (B, in_channel, H, W) -> (B, out_channel, H, W), any size; range as trained ([-1, 1] within UCDIR).
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        in_channel: int = 3,
        out_channel: int = 3,
        width: int = 32,
        levels: int = 5,
        residual: bool = False,
        released_padding: bool = False,
    ):
        super().__init__()
        at_least_one(width=width, levels=levels)
        if residual and in_channel != out_channel:
            raise UserError("residual: true needs in_channel = out_channel")
        self.levels, self.residual, self.released_padding = levels, residual, released_padding
        # Module names follow the released checkpoint: conv1_1 .. conv5_2 down, upv6, conv6_1 .. up, conv10_1 the head.
        channels = in_channel
        for i in range(1, levels + 1):
            out = width * 2 ** (i - 1)
            self._add_pair(i, channels, out)
            channels = out
        for i in range(levels + 1, 2 * levels):
            self.add_module(f"upv{i}", nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
            self._add_pair(i, channels, channels // 2)
            channels //= 2
        head = nn.Conv2d(channels, out_channel, 1)
        if residual:  # start from the input itself
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.add_module(f"conv{2 * levels}_1", head)

    @property
    def stride(self) -> int:
        """Patches that start at its multiples see the image as the whole does."""
        return network_stride(self.levels, self.released_padding)

    @property
    def receptive_field(self) -> int:
        """How far an output pixel looks, in pixels: 94 for five levels."""
        return _receptive_field(self.levels)

    def _add_pair(self, i: int, channels: int, out: int) -> None:
        self.add_module(f"conv{i}_1", nn.Conv2d(channels, out, 3, padding=1))
        self.add_module(f"conv{i}_2", nn.Conv2d(out, out, 3, padding=1))

    def _pair(self, i: int, x: torch.Tensor) -> torch.Tensor:
        for j in (1, 2):
            x = F.leaky_relu(getattr(self, f"conv{i}_{j}")(x), 0.2)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, w = x.shape[-2:]
        padded = pad_to_multiple(x, self.stride, always=self.released_padding)
        skips = [self._pair(1, padded)]
        for i in range(2, self.levels + 1):
            skips.append(self._pair(i, F.max_pool2d(skips[-1], 2)))
        y = skips.pop()
        for i in range(self.levels + 1, 2 * self.levels):
            y = self._pair(i, torch.cat((getattr(self, f"upv{i}")(y), skips.pop()), 1))
        y = getattr(self, f"conv{2 * self.levels}_1")(y)[..., :h, :w]
        return x + y if self.residual else y


@functools.cache
def _receptive_field(levels: int) -> int:
    with torch.random.fork_rng(devices=[]):
        net = SIDUNet(width=1, levels=levels).eval()  # it does not depend on the width
    return tiling.receptive_field(net, 3, net.stride)
