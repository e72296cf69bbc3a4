"""UCDIR's networks: the denoiser with Adaptive Kernel Guidance blocks, and its pair with an initial predictor.

Paper: A Unified Conditional Framework for Diffusion-based Image Restoration (Zhang et al., NeurIPS 2023), section 3.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Callable, Dict, Iterator, Literal, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ucdir_plugin.archs.akgm import adaptive_kernel_conv
from ucdir_plugin.archs.padding import network_stride, pad_for, pad_to_multiple
from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.schedule import diffuse
from ucdir_plugin.errors import UserError, at_least_one, did_you_mean
from ucdir_plugin.registry import build_arch, register


class NoiseLevelEncoding(nn.Module):
    """Sinusoidal encoding of a continuous noise level (WaveGrad): (B,) in (0, 1] -> (B, dim)."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        half = self.dim // 2
        exponent = torch.arange(half, dtype=noise_level.dtype, device=noise_level.device) / half
        angles = noise_level.view(-1, 1) * torch.exp(-math.log(1e4) * exponent)
        return torch.cat((angles.sin(), angles.cos()), -1)


class SimpleGate(nn.Module):
    """Product of the two halves of the channels (NAFNet)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, 1)
        return a * b


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm of each position over its channels (NAFNet): (B, C, H, W) -> the same, channels-last in memory."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # of channels-last, a view


Norm = Literal["layernorm", "layernorm2d"]

NORMS: Dict[str, Callable[[int], nn.Module]] = {
    "layernorm": lambda channels: nn.GroupNorm(1, channels),  # the release: statistics over channels and positions
    "layernorm2d": LayerNorm2d,
}


def make_norm(name: Norm, channels: int) -> nn.Module:
    """A normalisation of (B, channels, H, W), by its name in the options.

    Raises:
        UserError: for an unknown name.
    """
    if name not in NORMS:
        raise UserError(f"there is no norm {name!r}; {did_you_mean(name, NORMS)}")
    return NORMS[name](channels)


class AKGBlock(nn.Module):
    """Adaptive Kernel Guidance block: norm, 3x3 conv, Swish, norm, AKGM, Swish, plus shortcut (paper, figure 1 right).

    Args:
        channels, out_channels: widths; ``out_channels`` must be a multiple of ``num_bases``.
        emb_dim: width of the scalar condition's embedding.
        guide_channel: channels of the spatial guide.
        num_bases: kernel bases N.
        norm: as of :class:`UCDIRDenoiser`.

    Shape:
        x (B, channels, H, W), emb (B, emb_dim), features (B, num_bases, H, W) of :meth:`guide_features`
        -> (B, out_channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int,
        guide_channel: int = 3,
        num_bases: int = 8,
        norm: Norm = "layernorm",
    ):
        super().__init__()
        # Names as in the released checkpoint.
        self.noise_func = nn.Sequential(nn.Linear(emb_dim, num_bases), nn.SiLU(), nn.Linear(num_bases, num_bases))
        self.norm1 = make_norm(norm, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels)
        self.conv2 = nn.Sequential(
            nn.Conv2d(guide_channel, 2 * num_bases, 1), SimpleGate(), nn.Conv2d(num_bases, num_bases, 3, padding=1)
        )
        self.spdyconv = nn.Conv2d(out_channels, out_channels * num_bases, 3, padding=1, groups=num_bases)
        self.res_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def guide_features(self, guide: torch.Tensor) -> torch.Tensor:
        """What the block takes from the guide (paper, figure 1: G): (B, guide_channel, H, W) -> (B, num_bases, H, W).

        Of the guide alone, so that it stays the same in all sampling steps.
        """
        return self.conv2(guide)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        h = self.norm2(_silu(self.conv1(self.norm1(x))))
        mix = features * self.noise_func(emb).view(len(x), -1, 1, 1)
        h = adaptive_kernel_conv(h, self.spdyconv.weight, self.spdyconv.bias, mix)
        return _silu(h).add_(self.res_conv(x))


def _silu(x: torch.Tensor) -> torch.Tensor:
    """In place where no gradient needs x: fresh memory costs as much as the function."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def _fast_layout(x: torch.Tensor) -> torch.Tensor:
    """Channels-last on the CPU, where convolutions are then up to twice as fast; all layers keep it."""
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


def resize(guide: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear resize, corners not aligned; the guide itself where the size fits."""
    if tuple(guide.shape[-2:]) == tuple(size):
        return guide
    return F.interpolate(guide, size=tuple(size), mode="bilinear", align_corners=False)


class SelfAttention(nn.Module):
    """Residual self-attention with one head over all positions: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, norm: Norm = "layernorm"):
        super().__init__()
        self.norm = make_norm(norm, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        # Without the copy, torch leaves its memory-saving kernel for one that holds all (H W)^2 weights.
        q, k, v = self.qkv(self.norm(x)).view(b, 3, 1, c, h * w).transpose(-1, -2).contiguous().unbind(1)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-1, -2).reshape(b, c, h, w)).add_(x)


class _Level(nn.Module):
    """An AKG block with attention behind it where the level has it."""

    def __init__(self, channels: int, out_channels: int, attention: bool, norm: Norm, **block):
        super().__init__()
        self.res_block = AKGBlock(channels, out_channels, norm=norm, **block)
        self.attn = SelfAttention(out_channels, norm) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.attn(self.res_block(x, emb, features))


class _Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class _Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


@register("arch")
class UCDIRDenoiser(nn.Module):
    """UCDIR's U-Net of Adaptive Kernel Guidance blocks; the defaults are the released SID model (97.35 M parameters).

    As UCDIR's denoiser it takes concat(lq, x_t), the noise level and the guide. Called with the image alone, under
    BasicSR's SRModel, it is the paper's regression baseline: the same network, one pass, the image as its own guide,
    the noise level of a clean image (1). Use ``in_channel: 3`` for that.

    Args:
        in_channel, out_channel: input and output channels.
        guide_channel: channels of the spatial guide.
        inner_channel: width of the first level, and of the noise level's embedding.
        channel_mults: width of each level as a multiple of ``inner_channel``.
        res_blocks: blocks per level on the way down; one more on the way up.
        attn_res: nominal resolutions with attention; level i has ``image_size / 2 ** i``.
        image_size: nominal size, only used with ``attn_res``.
        mid_attn: attention in the first middle block.
        norm: ``layernorm`` is GroupNorm with one group, with statistics over the whole image, as released;
            ``layernorm2d`` normalises each position over its channels. With it, ``attn_res: []`` and
            ``mid_attn: false`` the network is local: patches give exactly the whole (see :attr:`receptive_field`).
        num_bases: kernel bases N of each AKGM; all widths must be multiples of it.
        dropout: in the final head.
        residual: add the first ``out_channel`` input channels to the output, for the regression baseline; not in the
            release.
        released_padding: pad to multiples of 32 and aligned sizes by a whole 32, bit-faithful to the release.
        use_checkpoint: compute each block again in the backward pass instead of keeping what is in it: about half
            the memory for a fifth more time (docs/speed.md).

    Shape:
        x (B, in_channel, H, W), noise_level (B,) in (0, 1], guide (B, guide_channel, H, W) or what
        :meth:`guide_features` makes of it -> (B, out_channel, H, W); any size. Range: [-1, 1] images in, noise out.
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        in_channel: int = 6,
        out_channel: int = 3,
        guide_channel: int = 3,
        inner_channel: int = 64,
        channel_mults: Sequence[int] = (1, 2, 4, 8, 8),
        res_blocks: int = 2,
        attn_res: Sequence[int] = (16,),
        image_size: int = 128,
        mid_attn: bool = True,
        norm: Norm = "layernorm",
        num_bases: int = 8,
        dropout: float = 0.1,
        residual: bool = False,
        released_padding: bool = False,
        use_checkpoint: bool = False,
    ):
        super().__init__()
        at_least_one(inner_channel=inner_channel, res_blocks=res_blocks, num_bases=num_bases)
        at_least_one(channel_mults=min(channel_mults, default=0))
        for mult in channel_mults:
            if inner_channel * mult % num_bases:
                raise UserError(f"a width of {inner_channel * mult} channels is no multiple of num_bases {num_bases}")
        if inner_channel % 2:
            raise UserError(f"inner_channel must be even, got {inner_channel}")
        self.levels, self.res_blocks = len(channel_mults), res_blocks
        self.out_channel, self.residual = out_channel, residual
        self.released_padding, self.use_checkpoint = released_padding, use_checkpoint
        self.noise_level_mlp = nn.Sequential(
            NoiseLevelEncoding(inner_channel),
            nn.Linear(inner_channel, inner_channel * 4),
            nn.SiLU(),
            nn.Linear(inner_channel * 4, inner_channel),
        )
        block = {"emb_dim": inner_channel, "guide_channel": guide_channel, "num_bases": num_bases, "norm": norm}
        last = len(channel_mults) - 1
        channels = inner_channel
        skips = [channels]
        downs: list[nn.Module] = [nn.Conv2d(in_channel, inner_channel, 3, padding=1)]
        for i, mult in enumerate(channel_mults):
            attention = image_size // 2**i in attn_res
            for _ in range(res_blocks):
                downs.append(_Level(channels, inner_channel * mult, attention, **block))
                channels = inner_channel * mult
                skips.append(channels)
            if i < last:
                downs.append(_Downsample(channels))
                skips.append(channels)
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(
            [_Level(channels, channels, mid_attn, **block), _Level(channels, channels, False, **block)]
        )
        ups: list[nn.Module] = []
        for i, mult in reversed(list(enumerate(channel_mults))):
            attention = image_size // 2**i in attn_res
            for _ in range(res_blocks + 1):
                ups.append(_Level(channels + skips.pop(), inner_channel * mult, attention, **block))
                channels = inner_channel * mult
            if i > 0:
                ups.append(_Upsample(channels))
        self.ups = nn.ModuleList(ups)
        self.final_conv = nn.Sequential(
            make_norm(norm, channels), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(channels, out_channel, 3, padding=1)
        )
        if residual:  # start from the input itself
            nn.init.zeros_(self.final_conv[3].weight)
            nn.init.zeros_(self.final_conv[3].bias)

    @property
    def stride(self) -> int:
        """Patches that start at its multiples see the image as the whole does."""
        return network_stride(self.levels, self.released_padding)

    @property
    def receptive_field(self) -> Optional[int]:
        """How far a result looks, in pixels of x and of the guide; None if it knows the whole image.

        410 for the depth of the released model, were it local. The first time, it takes a second to measure.
        """
        if any(isinstance(module, (nn.GroupNorm, SelfAttention)) for module in self.modules()):
            return None
        return _receptive_field(self.levels, self.res_blocks)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        return pad_to_multiple(x, self.stride, always=self.released_padding)

    def _layers(self) -> Iterator[nn.Module]:
        yield from itertools.chain(self.downs, self.mid, self.ups)

    def guide_features(self, guide: torch.Tensor) -> list[torch.Tensor]:
        """What all blocks take from the guide, in their order, for use in its place.

        Of the guide alone: in sampling it can be computed once for an image instead of in every step.

        Args:
            guide: (B, guide_channel, H, W), of the size of x.
        """
        guide = self._pad(guide)
        height, width = guide.shape[-2:]
        features, pyramid, level = [], {0: guide}, 0
        for layer in self._layers():
            if isinstance(layer, _Level):
                if level not in pyramid:
                    pyramid[level] = resize(guide, (height >> level, width >> level))
                features.append(layer.res_block.guide_features(pyramid[level]))
            else:
                level += isinstance(layer, _Downsample) - isinstance(layer, _Upsample)
        return features

    def forward(
        self,
        x: torch.Tensor,
        noise_level: Optional[torch.Tensor] = None,
        guide: Union[torch.Tensor, Sequence[torch.Tensor], None] = None,
    ) -> torch.Tensor:
        if noise_level is None:
            noise_level = x.new_ones(len(x))
        if guide is None:
            guide = x
        features = iter(self.guide_features(guide) if isinstance(guide, torch.Tensor) else guide)
        height, width = x.shape[-2:]
        image = x
        x = _fast_layout(self._pad(x))
        emb = self.noise_level_mlp(noise_level)
        skips = []
        for layer in self.downs:
            x = self._run(layer, x, emb, features)
            skips.append(x)
        for layer in self.mid:
            x = self._run(layer, x, emb, features)
        for layer in self.ups:
            if isinstance(layer, _Level):
                x = torch.cat((x, skips.pop()), 1)
            x = self._run(layer, x, emb, features)
        x = self.final_conv(x)[..., :height, :width]
        return x + image[:, : self.out_channel] if self.residual else x

    def _run(
        self, layer: nn.Module, x: torch.Tensor, emb: torch.Tensor, features: Iterator[torch.Tensor]
    ) -> torch.Tensor:
        if not isinstance(layer, _Level):
            return layer(x)
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, x, emb, next(features), use_reentrant=False)
        return layer(x, emb, next(features))


@functools.cache
def _receptive_field(levels: int, res_blocks: int) -> Optional[int]:
    with torch.random.fork_rng(devices=[]):
        net = UCDIRDenoiser(  # it does not depend on the widths
            in_channel=1,
            out_channel=1,
            guide_channel=1,
            inner_channel=2,
            channel_mults=(1,) * levels,
            res_blocks=res_blocks,
            attn_res=(),
            mid_attn=False,
            norm="layernorm2d",
            num_bases=1,
        ).eval()
    # At most 2 pixels of its level for a block, of which a level has 2 res_blocks + 1 and the middle 2; 1 for the
    # convolution between levels on either way.
    bound = 2**levels * (4 * res_blocks + 8)
    return tiling.receptive_field(lambda x: net(x[:, :1], guide=x[:, 1:]), 2, net.stride, limit=bound, start=bound)


@register("arch")
class UCDIR(nn.Module):
    """UCDIR: an initial predictor and a denoiser of the residual that the prediction guides (paper, figure 1 left).

    All images are in [-1, 1]. State dict keys start with ``denoise_fn.`` and ``predictor.``, as in the release.

    Args:
        denoiser: ``{type: UCDIRDenoiser, ...}``, or any registered arch called as ``net(x, noise_level, guide)``.
        predictor: ``{type: SIDUNet, ...}``, or any registered arch that keeps the image size.
        predictor_range: the value range that the predictor works in; it is converted to and from [-1, 1].
            Default: what the arch declares as ``value_range``, else BasicSR's [0, 1].
    """

    def __init__(self, denoiser: dict, predictor: dict, predictor_range: Optional[Tuple[float, float]] = None):
        super().__init__()
        self.denoise_fn = build_arch(denoiser, "denoiser")
        self.predictor = build_arch(predictor, "predictor")
        if predictor_range is None:
            predictor_range = getattr(self.predictor, "value_range", (0.0, 1.0))
        self.predictor_range = (float(predictor_range[0]), float(predictor_range[1]))

    def predict(self, lq: torch.Tensor) -> torch.Tensor:
        """Initial prediction u(x): (B, 3, H, W) in [-1, 1] -> the same.

        Raises:
            UserError: if the predictor changes the image size.
        """
        low, high = self.predictor_range
        height, width = lq.shape[-2:]
        padded = pad_for(self.predictor, lq)
        if (low, high) == (-1.0, 1.0):
            initial = self.predictor(padded)
        else:
            initial = (self.predictor((padded + 1) / 2 * (high - low) + low) - low) / (high - low) * 2 - 1
        if initial.shape[-2:] != padded.shape[-2:]:
            raise UserError(
                f"predictor {type(self.predictor).__name__} turns {tuple(padded.shape[-2:])} into"
                f" {tuple(initial.shape[-2:])}: take one that keeps the image size (scale 1)"
            )
        return initial[..., :height, :width]

    def compile_networks(self) -> None:
        """torch.compile both networks in place, so that the keys of the weights stay."""
        self.denoise_fn.compile()
        self.predictor.compile()

    def prepare(self, initial: torch.Tensor) -> Any:
        """The guide as :meth:`denoise` takes it, with all computed that does not change between sampling steps."""
        guide_features = getattr(self.denoise_fn, "guide_features", None)
        return initial if guide_features is None else guide_features(initial)

    def denoise(self, x_t: torch.Tensor, level: torch.Tensor, lq: torch.Tensor, guide: Any) -> torch.Tensor:
        """Predicted noise in the noisy residual ``x_t`` (B, 3, H, W) at noise level ``level`` (B,).

        ``guide`` is the initial prediction, (B, 3, H, W) in [-1, 1], or what :meth:`prepare` made of it.
        """
        return self.denoise_fn(torch.cat((lq, x_t), 1), level, guide)

    def forward(
        self, lq: torch.Tensor, hr: torch.Tensor, level: torch.Tensor, noise: torch.Tensor
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The two predictions of a training step (eq. 1), in one call so that DistributedDataParallel sees both.

        Args:
            lq, hr: degraded and true images, (B, 3, H, W) in [-1, 1].
            level: noise level sqrt(alpha_bar) of each image, (B,).
            noise: standard normal, (B, 3, H, W).

        Returns:
            predicted noise, initial prediction.
        """
        initial = self.predict(lq)
        x_t = diffuse(hr - initial, level, noise)
        return self.denoise(x_t, level, lq, initial), initial
