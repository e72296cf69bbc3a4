"""Building blocks of UCDIR's denoiser: embeddings, guidance, AKG blocks, attention (paper, section 3.2)."""

from __future__ import annotations

import math
from typing import Callable, Dict, Iterable, Literal, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ucdir_plugin.archs.akgm.convolution import adaptive_full_kernel_conv, adaptive_kernel_conv
from ucdir_plugin.diffusion.conditions import Condition
from ucdir_plugin.utils.errors import UserError, did_you_mean


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


class ConditionEmbedding(nn.Module):
    """Embedding of auxiliary scalar conditions (paper, section 3.2), to be added to that of the noise level.

    A continuous one is encoded as the noise level is, over its range; a class has a vector of its own. One that is
    left out adds nothing, and all add nothing before they are trained, so that weights without them can be trained on.

    Shape:
        (B, number of conditions), in their units, classes by index, NaN where left out -> (B, dim).
    """

    def __init__(self, conditions: Sequence[Condition], dim: int):
        super().__init__()
        self.conditions = tuple(conditions)
        for condition in self.conditions:
            if condition.classes:
                embedding = last = nn.Embedding(len(condition.classes), dim)
            else:
                last = nn.Linear(dim * 4, dim)
                embedding = nn.Sequential(NoiseLevelEncoding(dim), nn.Linear(dim, dim * 4), nn.SiLU(), last)
                nn.init.zeros_(last.bias)
            nn.init.zeros_(last.weight)
            self.add_module(f"{condition.name}_mlp", embedding)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        total = None
        for condition, column in zip(self.conditions, values.unbind(1)):
            left_out, value = column.isnan(), column.nan_to_num()
            low, high = condition.limits
            value = value.long() if condition.classes else (value - low) / (high - low)
            part = getattr(self, f"{condition.name}_mlp")(value).masked_fill(left_out.unsqueeze(1), 0)
            total = part if total is None else total + part
        return total


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


# The choices of the paper's ablations (Table 4), by their names in the options.
Norm = Literal["layernorm", "layernorm2d", "groupnorm", "none"]
Activation = Literal["swish", "relu"]
Guidance = Literal["initial", "degraded", "internal", "none"]
Integration = Literal["akgm", "addition", "concatenation", "adain"]

NORMS: Dict[str, Callable[[int], nn.Module]] = {
    "layernorm": lambda channels: nn.GroupNorm(1, channels),  # the release: statistics over channels and positions
    "layernorm2d": LayerNorm2d,
    "groupnorm": lambda channels: nn.GroupNorm(math.gcd(32, channels), channels),  # SR3's 32 groups
    "none": lambda channels: nn.Identity(),
}

ACTIVATIONS: Dict[str, Callable[..., torch.Tensor]] = {"swish": F.silu, "relu": F.relu}
HEAD_CHANNELS = {"swish": nn.SiLU, "relu": nn.ReLU}


def check_name(what: str, name: str, known: Iterable[str]) -> None:
    """Refuse an unknown name of an option."""
    if name not in known:
        raise UserError(f"there is no {what} {name!r}; {did_you_mean(name, known)}")


def make_norm(name: Norm, channels: int) -> nn.Module:
    """A normalisation of (B, channels, H, W), by its name in the options.

    Raises:
        UserError: for an unknown name.
    """
    check_name("norm", name, NORMS)
    return NORMS[name](channels)


class AKGBlock(nn.Module):
    """Adaptive Kernel Guidance block: norm, 3x3 conv, Swish, norm, AKGM, Swish, plus shortcut (paper, figure 1 right).

    Args:
        channels, out_channels: widths; ``out_channels`` must be a multiple of ``num_bases`` for AKGM.
        emb_dim: width of the scalar condition's embedding.
        guide_channel: channels of the spatial guide.
        num_bases: kernel bases N.
        norm, activation, guidance, integration, kernel_size, grouped_bases: as of :class:`UCDIRDenoiser`.

    Shape:
        x (B, channels, H, W), emb (B, emb_dim), features (B, num_bases, H, W) of :meth:`guide_features`, None where
        the guidance is ``internal`` or ``none`` -> (B, out_channels, H, W).
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int,
        guide_channel: int = 3,
        num_bases: int = 8,
        norm: Norm = "layernorm",
        activation: Activation = "swish",
        guidance: Guidance = "initial",
        integration: Integration = "akgm",
        kernel_size: int = 3,
        grouped_bases: bool = True,
    ):
        super().__init__()
        self.activation, self.guidance, self.integration = activation, guidance, integration
        self.grouped_bases = grouped_bases
        # Names as in the released checkpoint.
        self.noise_func = nn.Sequential(nn.Linear(emb_dim, num_bases), nn.SiLU(), nn.Linear(num_bases, num_bases))
        self.norm1 = make_norm(norm, channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels)
        if guidance != "none":
            source = out_channels if guidance == "internal" else guide_channel
            self.conv2 = nn.Sequential(
                nn.Conv2d(source, 2 * num_bases, 1), SimpleGate(), nn.Conv2d(num_bases, num_bases, 3, padding=1)
            )
        if integration == "akgm":
            groups = num_bases if grouped_bases else 1
            self.spdyconv = nn.Conv2d(
                out_channels, out_channels * num_bases, kernel_size, padding=kernel_size // 2, groups=groups
            )
        else:
            self.spread = nn.Conv2d(num_bases, out_channels * (2 if integration == "adain" else 1), 1)
            width = out_channels * (2 if integration == "concatenation" else 1)
            self.plainconv = nn.Conv2d(width, out_channels, kernel_size, padding=kernel_size // 2)
        self.res_conv = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def guide_features(self, guide: torch.Tensor) -> torch.Tensor:
        """What the block takes from the guide (paper, figure 1: G): (B, guide_channel, H, W) -> (B, num_bases, H, W).

        Of the guide alone, so that it stays the same in all sampling steps.
        """
        return self.conv2(guide)

    def forward(self, x: torch.Tensor, emb: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        h = self.norm2(_activate(self.conv1(self.norm1(x)), self.activation))
        mix = self.noise_func(emb).view(len(x), -1, 1, 1)
        if self.guidance != "none":
            mix = (self.conv2(h) if self.guidance == "internal" else features) * mix
        h = _activate(self._integrate(h, mix), self.activation)
        if self.activation == "relu" and torch.is_grad_enabled():
            return h + self.res_conv(x)  # its gradient needs its result
        return h.add_(self.res_conv(x))

    def _integrate(self, h: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
        """The second convolution, given what the sources of condition, M (B, num_bases, H or 1, W or 1), say."""
        if self.integration == "akgm":
            mix = mix.expand(-1, -1, *h.shape[-2:])
            mixed_conv = adaptive_kernel_conv if self.grouped_bases else adaptive_full_kernel_conv
            return mixed_conv(h, self.spdyconv.weight, self.spdyconv.bias, mix)
        injected = self.spread(mix)
        if self.integration == "addition":
            return self.plainconv(h + injected)
        if self.integration == "concatenation":
            return self.plainconv(torch.cat((h, injected.expand_as(h)), 1))
        scale, shift = injected.chunk(2, 1)
        return self.plainconv(torch.addcmul(h + shift, h, scale))


def _activate(x: torch.Tensor, name: Activation) -> torch.Tensor:
    """In place where no gradient needs x: fresh memory costs as much as the function."""
    return ACTIVATIONS[name](x, inplace=not torch.is_grad_enabled())


def fast_layout(x: torch.Tensor) -> torch.Tensor:
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


class Level(nn.Module):
    """An AKG block with attention behind it where the level has it."""

    def __init__(self, channels: int, out_channels: int, attention: bool, norm: Norm, **block):
        super().__init__()
        self.res_block = AKGBlock(channels, out_channels, norm=norm, **block)
        self.attn = SelfAttention(out_channels, norm) if attention else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        return self.attn(self.res_block(x, emb, features))


class Downsample(nn.Module):
    """Half the size: a 3x3 convolution of stride 2."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the size: nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
