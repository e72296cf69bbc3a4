"""ADM: OpenAI's diffusion U-Net, the prior of BIR-D.

Paper: Diffusion Models Beat GANs on Image Synthesis (Dhariwal and Nichol, NeurIPS 2021), https://arxiv.org/abs/2105.05233
"""

from __future__ import annotations

import math
from typing import Literal, Optional, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ucdir_plugin.archs.padding import pad_to_multiple
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import UserError, at_least_one

CLASSES = 1000
"""Of ImageNet, for ``class_cond``."""

BODIES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DEFAULT_MULTS = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
}


class GroupNorm32(nn.GroupNorm):
    """32 groups, computed in float32 whatever the body's type: (B, C, ...) -> the same, in the input's type."""

    def __init__(self, channels: int):
        super().__init__(32, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.float()).to(x.dtype)


def timestep_embedding(timesteps: torch.Tensor, dim: int) -> torch.Tensor:
    """Sinusoidal embedding of time steps 0 .. 999, whole or not: (B,) -> (B, dim), cosines before sines."""
    half = dim // 2
    rates = torch.exp(-math.log(1e4) * torch.arange(half, dtype=torch.float32, device=timesteps.device) / half)
    angles = timesteps.float().unsqueeze(1) * rates
    return F.pad(torch.cat((angles.cos(), angles.sin()), 1), (0, dim % 2))


class Upsample(nn.Module):
    """Twice the size by repetition, then a 3x3 convolution if ``conv``."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Half the size by a strided 3x3 convolution if ``conv``, else by the mean of 2x2."""

    def __init__(self, channels: int, conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if conv else nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


def _zeroed(layer: nn.Module) -> nn.Module:
    """The branch starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Residual block with the time embedding added, or as scale and shift of the second norm; may change the size.

    Args:
        resample: what a block with ``resblock_updown`` does to both branches before its first convolution.

    Shape:
        x (B, channels, H, W), emb (B, emb_dim) -> (B, out_channels, H', W').
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        emb_dim: int,
        dropout: float,
        scale_shift: bool,
        resample: Optional[nn.Module] = None,
    ):
        super().__init__()
        self.scale_shift = scale_shift
        # Names as in the public checkpoints.
        self.in_layers = nn.Sequential(
            GroupNorm32(channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels * (2 if scale_shift else 1)))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        self.skip_connection = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        h = self.in_layers[2](self.resample(self.in_layers[:2](x)))
        emb = self.emb_layers(emb).to(h.dtype)[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(self.resample(x)) + h


class AttentionBlock(nn.Module):
    """Residual self-attention over all positions: (B, C, H, W) -> (B, C, H, W).

    Args:
        new_order: q, k and v are split before the heads; else, as in the public 256x256 checkpoint, after them.
    """

    def __init__(self, channels: int, heads: int, new_order: bool):
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, height, width = x.shape
        qkv = self.qkv(self.norm(x).flatten(2))
        if self.new_order:
            qkv = qkv.view(b, 3, self.heads, c // self.heads, -1)
        else:
            qkv = qkv.view(b, self.heads, 3, c // self.heads, -1).transpose(1, 2)
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)
        h = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(b, c, -1)
        return x + self.proj_out(h).view(b, c, height, width)


class Stage(nn.Sequential):
    """Layers one after the other; the residual blocks among them get the embedding."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


@register("arch")
class ADMUNet(nn.Module):
    """OpenAI's diffusion U-Net ("ADM"); the defaults are the public unconditional 256x256 ImageNet model (552.8 M).

    The keys of its state dict are those of ``256x256_diffusion_uncond.pt``.

    Args:
        image_size: of the training. Other sizes work too; the paper's attention has learned this one.
        in_channels, out_channels: of images; ``learn_sigma`` doubles what comes out.
        num_channels: width of the first level, a multiple of 32.
        num_res_blocks: per level on the way down; one more on the way up.
        channel_mult: width of each level as a multiple of ``num_channels``. Default: the release's for ``image_size``.
        attention_resolutions: sizes of the feature maps that get attention, as of an image of ``image_size``.
        num_heads, num_heads_upsample: attention heads on the way down and up (-1: as down), ...
        num_head_channels: ... unless the channels of each head are given (not -1).
        use_scale_shift_norm: the embedding scales and shifts the second norm of a block; else it is added.
        resblock_updown: residual blocks change the size; else single layers, with a convolution if ``conv_resample``.
        use_new_attention_order: see :class:`AttentionBlock`.
        learn_sigma: also predict the variance: v in [-1, 1] for log variance f log(beta) + (1 - f) log(beta~), with
            f = (v + 1) / 2 (Improved DDPM, arXiv 2102.09672, eq. 15).
        class_cond: the time embedding gets one of 1000 classes added.
        dropout: in the residual blocks.
        use_checkpoint: compute each block again in the backward pass instead of keeping what is in it.
        body: type of all convolutions but the last; norms, embeddings and head stay in float32. fp16 is for CUDA.

    Shape:
        x (B, in_channels, H, W) in [-1, 1] plus noise, timesteps (B,) in 0 .. T - 1, y (B,) class numbers with
        ``class_cond`` -> (B, out_channels or 2 out_channels, H, W): eps, then v. Any size (padded at right and bottom).
    """

    value_range = (-1.0, 1.0)

    def __init__(
        self,
        image_size: int = 256,
        in_channels: int = 3,
        out_channels: int = 3,
        num_channels: int = 256,
        num_res_blocks: int = 2,
        channel_mult: Optional[Sequence[float]] = None,
        attention_resolutions: Sequence[int] = (32, 16, 8),
        num_heads: int = 4,
        num_head_channels: int = 64,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = True,
        resblock_updown: bool = True,
        use_new_attention_order: bool = False,
        learn_sigma: bool = True,
        class_cond: bool = False,
        dropout: float = 0.0,
        conv_resample: bool = True,
        use_checkpoint: bool = False,
        body: Literal["fp32", "fp16", "bf16"] = "fp32",
    ):
        super().__init__()
        at_least_one(num_channels=num_channels, num_res_blocks=num_res_blocks, num_heads=num_heads)
        if channel_mult is None:
            if image_size not in DEFAULT_MULTS:
                raise UserError(f"there is no usual channel_mult for image_size {image_size}: give one, such as [1, 2]")
            channel_mult = DEFAULT_MULTS[image_size]
        if body not in BODIES:
            raise UserError(f"body {body!r} is not known: take {', '.join(BODIES)}")
        widths = [int(mult * num_channels) for mult in channel_mult]
        for width in widths or [0]:
            if width % 32 or not width:
                raise UserError(f"a width of {width} channels is no multiple of 32, the groups of the norms")
        for size in attention_resolutions:
            at_least_one(attention_resolutions=size)
        strides = {image_size // size for size in attention_resolutions}
        self.levels, self.use_checkpoint, self.learn_sigma = len(widths), use_checkpoint, learn_sigma
        self.image_size, self.num_channels, self.in_channels = image_size, num_channels, in_channels
        self.out_channels = out_channels
        emb_dim = 4 * num_channels

        def block(channels: int, out: int, resample: Optional[nn.Module] = None) -> ResBlock:
            return ResBlock(channels, out, emb_dim, dropout, use_scale_shift_norm, resample)

        def attention(channels: int, heads: int) -> AttentionBlock:
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            if heads < 1 or channels % heads or (num_head_channels != -1 and channels % num_head_channels):
                raise UserError(
                    f"attention over {channels} channels cannot have {heads} heads of equal size:"
                    " change num_heads or num_head_channels"
                )
            return AttentionBlock(channels, heads, use_new_attention_order)

        self.time_embed = nn.Sequential(nn.Linear(num_channels, emb_dim), nn.SiLU(), nn.Linear(emb_dim, emb_dim))
        if class_cond:
            self.label_emb = nn.Embedding(CLASSES, emb_dim)
        channels, last = widths[0], len(widths) - 1
        skips = [channels]
        downs = [Stage(nn.Conv2d(in_channels, channels, 3, padding=1))]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [block(channels, width)]
                if 2**level in strides:
                    layers.append(attention(width, num_heads))
                downs.append(Stage(*layers))
                channels = width
                skips.append(channels)
            if level < last:
                smaller = Downsample(channels, conv_resample and not resblock_updown)
                downs.append(Stage(block(channels, channels, smaller) if resblock_updown else smaller))
                skips.append(channels)
        self.input_blocks = nn.ModuleList(downs)
        self.middle_block = Stage(block(channels, channels), attention(channels, num_heads), block(channels, channels))
        ups = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [block(channels + skips.pop(), width)]
                channels = width
                if 2**level in strides:
                    layers.append(attention(width, num_heads if num_heads_upsample == -1 else num_heads_upsample))
                if level and i == num_res_blocks:
                    larger = Upsample(channels, conv_resample and not resblock_updown)
                    layers.append(block(channels, channels, larger) if resblock_updown else larger)
                ups.append(Stage(*layers))
        self.output_blocks = nn.ModuleList(ups)
        out = out_channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(GroupNorm32(channels), nn.SiLU(), _zeroed(nn.Conv2d(channels, out, 3, padding=1)))
        self.body = BODIES[body]
        for part in (self.input_blocks, self.middle_block, self.output_blocks):
            for layer in part.modules():
                if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
                    layer.to(self.body)

    @property
    def stride(self) -> int:
        """Patches that start at its multiples see the image as the whole does."""
        return 2 ** (self.levels - 1)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, y: Optional[torch.Tensor] = None) -> torch.Tensor:
        emb = self.time_embed(timestep_embedding(timesteps, self.num_channels))
        if hasattr(self, "label_emb"):
            if y is None:
                raise UserError("this prior is conditional on classes (class_cond): give one for each image")
            emb = emb + self.label_emb(y)
        height, width = x.shape[-2:]
        h = pad_to_multiple(x, self.stride).to(self.body)
        skips = []
        for stage in self.input_blocks:
            h = self._run(stage, h, emb)
            skips.append(h)
        h = self._run(self.middle_block, h, emb)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat((h, skips.pop()), 1), emb)
        return self.out(h.to(x.dtype))[..., :height, :width]

    def _run(self, stage: nn.Module, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(stage, h, emb, use_reentrant=False)
        return stage(h, emb)
