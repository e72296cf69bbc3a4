"""UCDIR's networks: the denoiser with Adaptive Kernel Guidance blocks, and its pair with an initial predictor.

Paper: A Unified Conditional Framework for Diffusion-based Image Restoration (Zhang et al., NeurIPS 2023), section 3.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, Dict, Iterator, Optional, Sequence, Tuple, Union, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ucdir_plugin.archs.padding import network_stride, pad_for, pad_to_multiple
from ucdir_plugin.archs.ucdir_blocks import (
    ACTIVATIONS,
    HEAD_CHANNELS,
    Activation,
    ConditionEmbedding,
    Downsample,
    Guidance,
    Integration,
    Level,
    NoiseLevelEncoding,
    Norm,
    SelfAttention,
    Upsample,
    check_name,
    fast_layout,
    make_norm,
    resize,
)
from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.conditions import Condition, declare
from ucdir_plugin.diffusion.schedule import diffuse
from ucdir_plugin.registry import build_arch, register
from ucdir_plugin.utils.errors import UserError, at_least_one


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
            ``layernorm2d`` normalises each position over its channels. With it (or ``none``), ``attn_res: []`` and
            ``mid_attn: false`` the network is local: patches give exactly the whole (see :attr:`receptive_field`).
            ``groupnorm`` has 32 groups (the largest common divisor with the width, if that is less).
        num_bases: kernel bases N of each AKGM; all widths must be multiples of it. For the other integrations the
            channels of the guide's features.
        kernel_size: of the kernel bases, odd; other sizes than 3 are slower and need more memory.
        grouped_bases: each kernel basis sees the channels of its own group (as released); false:
            all channels, the form from which the paper starts, at N times the parameters and arithmetic.
        activation: ``swish`` or ``relu``, of the blocks and the head (not of the embeddings of scalars).
        guidance: where the spatial guide comes from: the ``initial`` prediction; the ``degraded`` image; ``internal``,
            each block's own feature map; ``none``: the scalars alone, M = S.
        integration: what M, the product of the guide's features G and the scalars' S, does in a block: ``akgm``
            mixes kernel bases (paper, eq. 2). The others lead M through a 1x1 convolution to a plain second
            convolution: ``addition`` to its input h, ``concatenation`` beside h (as many channels as h), ``adain``
            as scale and shift, h * (1 + scale) + shift.
        dropout: in the final head.
        residual: add the first ``out_channel`` input channels to the output, for the regression baseline; not in the
            release.
        released_padding: pad to multiples of 32 and aligned sizes by a whole 32, bit-faithful to the release.
        conditions: auxiliary scalars beside the noise level (:mod:`ucdir_plugin.diffusion.conditions`); embedded
            with it and so injected into every block.
        use_checkpoint: compute each block again in the backward pass instead of keeping what is in it: about half
            the memory for a fifth more time (docs/speed.md).

    Shape:
        x (B, in_channel, H, W), noise_level (B,) in (0, 1], guide (B, guide_channel, H, W) or what
        :meth:`guide_features` makes of it, condition (B, number of conditions) of
        :func:`ucdir_plugin.diffusion.conditions.encode` (None: all are left out) -> (B, out_channel, H, W); any size.
        Range: [-1, 1] images in, noise out.
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
        kernel_size: int = 3,
        grouped_bases: bool = True,
        activation: Activation = "swish",
        guidance: Guidance = "initial",
        integration: Integration = "akgm",
        dropout: float = 0.1,
        residual: bool = False,
        released_padding: bool = False,
        use_checkpoint: bool = False,
        conditions: Optional[Dict[str, Any]] = None,
    ):
        super().__init__()
        at_least_one(inner_channel=inner_channel, res_blocks=res_blocks, num_bases=num_bases, kernel_size=kernel_size)
        at_least_one(channel_mults=min(channel_mults, default=0))
        if integration != "akgm" and not grouped_bases:
            raise UserError(f"grouped_bases has no meaning for integration {integration}; remove it")
        check_name("activation", activation, ACTIVATIONS)
        check_name("guidance", guidance, get_args(Guidance))
        check_name("integration", integration, get_args(Integration))
        if kernel_size % 2 == 0:
            raise UserError(f"kernel_size must be odd, got {kernel_size}")
        for mult in channel_mults:
            if integration == "akgm" and inner_channel * mult % num_bases:
                raise UserError(f"a width of {inner_channel * mult} channels is no multiple of num_bases {num_bases}")
        if inner_channel % 2:
            raise UserError(f"inner_channel must be even, got {inner_channel}")
        self.levels, self.res_blocks = len(channel_mults), res_blocks
        self.out_channel, self.residual = out_channel, residual
        self.released_padding, self.use_checkpoint = released_padding, use_checkpoint
        self.guidance = guidance
        self.shape_of_block = {"guidance": guidance, "integration": integration, "kernel_size": kernel_size}
        self.noise_level_mlp = nn.Sequential(
            NoiseLevelEncoding(inner_channel),
            nn.Linear(inner_channel, inner_channel * 4),
            nn.SiLU(),
            nn.Linear(inner_channel * 4, inner_channel),
        )
        block = {
            "emb_dim": inner_channel,
            "guide_channel": guide_channel,
            "num_bases": num_bases,
            "norm": norm,
            "activation": activation,
            "grouped_bases": grouped_bases,
            **self.shape_of_block,
        }
        last = len(channel_mults) - 1
        channels = inner_channel
        skips = [channels]
        downs: list[nn.Module] = [nn.Conv2d(in_channel, inner_channel, 3, padding=1)]
        for i, mult in enumerate(channel_mults):
            attention = image_size // 2**i in attn_res
            for _ in range(res_blocks):
                downs.append(Level(channels, inner_channel * mult, attention, **block))
                channels = inner_channel * mult
                skips.append(channels)
            if i < last:
                downs.append(Downsample(channels))
                skips.append(channels)
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(
            [Level(channels, channels, mid_attn, **block), Level(channels, channels, False, **block)]
        )
        ups: list[nn.Module] = []
        for i, mult in reversed(list(enumerate(channel_mults))):
            attention = image_size // 2**i in attn_res
            for _ in range(res_blocks + 1):
                ups.append(Level(channels + skips.pop(), inner_channel * mult, attention, **block))
                channels = inner_channel * mult
            if i > 0:
                ups.append(Upsample(channels))
        self.ups = nn.ModuleList(ups)
        self.final_conv = nn.Sequential(
            make_norm(norm, channels),
            HEAD_CHANNELS[activation](),
            nn.Dropout(dropout),
            nn.Conv2d(channels, out_channel, 3, padding=1),
        )
        if residual:  # start from the input itself
            nn.init.zeros_(self.final_conv[3].weight)
            nn.init.zeros_(self.final_conv[3].bias)
        self.conditions = declare(conditions)
        if self.conditions:
            self.condition_embedding = ConditionEmbedding(self.conditions, inner_channel)

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
        return _receptive_field(self.levels, self.res_blocks, **self.shape_of_block)

    def _pad(self, x: torch.Tensor) -> torch.Tensor:
        return pad_to_multiple(x, self.stride, always=self.released_padding)

    def _layers(self) -> Iterator[nn.Module]:
        yield from itertools.chain(self.downs, self.mid, self.ups)

    def guide_features(self, guide: torch.Tensor) -> list[torch.Tensor]:
        """What all blocks take from the guide, in their order, for use in its place.

        Of the guide alone: in sampling it can be computed once for an image instead of in every step. Empty where the
        guidance is ``internal`` or ``none``.

        Args:
            guide: (B, guide_channel, H, W), of the size of x.
        """
        if self.guidance in ("internal", "none"):
            return []
        guide = self._pad(guide)
        height, width = guide.shape[-2:]
        features, pyramid, level = [], {0: guide}, 0
        for layer in self._layers():
            if isinstance(layer, Level):
                if level not in pyramid:
                    pyramid[level] = resize(guide, (height >> level, width >> level))
                features.append(layer.res_block.guide_features(pyramid[level]))
            else:
                level += isinstance(layer, Downsample) - isinstance(layer, Upsample)
        return features

    def forward(
        self,
        x: torch.Tensor,
        noise_level: Optional[torch.Tensor] = None,
        guide: Union[torch.Tensor, Sequence[torch.Tensor], None] = None,
        condition: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        if noise_level is None:
            noise_level = x.new_ones(len(x))
        if guide is None:
            guide = x
        features = iter(self.guide_features(guide) if isinstance(guide, torch.Tensor) else guide)
        height, width = x.shape[-2:]
        image = x
        x = fast_layout(self._pad(x))
        emb = self.noise_level_mlp(noise_level)
        if condition is not None:
            emb = emb + self.condition_embedding(condition)
        skips = []
        for layer in self.downs:
            x = self._run(layer, x, emb, features)
            skips.append(x)
        for layer in self.mid:
            x = self._run(layer, x, emb, features)
        for layer in self.ups:
            if isinstance(layer, Level):
                x = torch.cat((x, skips.pop()), 1)
            x = self._run(layer, x, emb, features)
        x = self.final_conv(x)[..., :height, :width]
        return x + image[:, : self.out_channel] if self.residual else x

    def _run(
        self, layer: nn.Module, x: torch.Tensor, emb: torch.Tensor, features: Iterator[torch.Tensor]
    ) -> torch.Tensor:
        if not isinstance(layer, Level):
            return layer(x)
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, x, emb, next(features, None), use_reentrant=False)
        return layer(x, emb, next(features, None))


@functools.cache
def _receptive_field(
    levels: int, res_blocks: int, guidance: Guidance, integration: Integration, kernel_size: int
) -> Optional[int]:
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
            kernel_size=kernel_size,
            guidance=guidance,
            integration=integration,
        ).eval()
    # Pixels of its level for a block, of which a level has 2 res_blocks + 1 and the middle 2; 1 for the convolution
    # between levels on either way. Of the guide's features, another convolution, only AKGM takes each at its place.
    reach = 1 + kernel_size // 2 + (integration != "akgm")
    bound = 2**levels * (reach * (2 * res_blocks + 2) + 4)
    return tiling.receptive_field(lambda x: net(x[:, :1], guide=x[:, 1:]), 2, net.stride, limit=bound, start=bound)


@register("arch")
class UCDIR(nn.Module):
    """UCDIR: an initial predictor and a denoiser of the residual that the prediction guides (paper, figure 1 left).

    All images are in [-1, 1]. State dict keys start with ``denoise_fn.`` and ``predictor.``, as in the release.

    Args:
        denoiser: ``{type: UCDIRDenoiser, ...}``, or any registered arch called as ``net(x, noise_level, guide)``; with
            ``conditions`` that it declares, as ``net(x, noise_level, guide, condition)``.
        predictor: ``{type: SIDUNet, ...}``, or any registered arch that keeps the image size; None (``~``): none, the
            initial prediction is 0 and the denoiser learns the image itself (SR3).
        predictor_range: the value range that the predictor works in; it is converted to and from [-1, 1].
            Default: what the arch declares as ``value_range``, else BasicSR's [0, 1].
        residual_scale: what the residual is multiplied by before it is diffused. The paper's is 1; 1 / (standard
            deviation of the residual) gives it the variance of the noise, so that more of the schedule's levels
            teach something (sigma_data of EDM, arXiv 2206.00364; measured in docs/study.md).

    Raises:
        UserError: for guidance by the prediction without a predictor, or a scale that is not positive and finite.
    """

    def __init__(
        self,
        denoiser: dict,
        predictor: Optional[dict],
        predictor_range: Optional[Tuple[float, float]] = None,
        residual_scale: float = 1.0,
    ):
        super().__init__()
        if not 0 < residual_scale < math.inf:
            raise UserError(f"residual_scale: {residual_scale} is not a positive number; 1 is the paper's")
        self.residual_scale = float(residual_scale)
        self.denoise_fn = build_arch(denoiser, "denoiser")
        self.predictor = None if predictor is None else build_arch(predictor, "predictor")
        if predictor is None and self.guidance == "initial":
            raise UserError(
                "predictor: without one there is no initial prediction: set the denoiser's guidance to none"
            )
        if predictor_range is None:
            predictor_range = getattr(self.predictor, "value_range", (0.0, 1.0))
        self.predictor_range = (float(predictor_range[0]), float(predictor_range[1]))

    @property
    def conditions(self) -> Tuple[Condition, ...]:
        """Auxiliary scalar conditions that the denoiser declares."""
        return getattr(self.denoise_fn, "conditions", ())

    @property
    def guidance(self) -> str:
        """What :meth:`guide` chooses; the initial prediction for a denoiser that does not say."""
        return getattr(self.denoise_fn, "guidance", "initial")

    def guide(self, lq: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
        """The image that guides the denoiser: the initial prediction, or the degraded image."""
        return lq if self.guidance == "degraded" else initial

    def predict(self, lq: torch.Tensor) -> torch.Tensor:
        """Initial prediction u(x): (B, 3, H, W) in [-1, 1] -> the same; 0 without a predictor.

        Raises:
            UserError: if the predictor changes the image size.
        """
        if self.predictor is None:
            return torch.zeros_like(lq)
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
        if self.predictor is not None:
            self.predictor.compile()

    def prepare(self, guide: torch.Tensor) -> Any:
        """The guide as :meth:`denoise` takes it, with all computed that does not change between sampling steps."""
        guide_features = getattr(self.denoise_fn, "guide_features", None)
        return guide if guide_features is None else guide_features(guide)

    def denoise(
        self,
        x_t: torch.Tensor,
        level: torch.Tensor,
        lq: torch.Tensor,
        guide: Any,
        condition: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        """Predicted noise in the noisy residual ``x_t`` (B, 3, H, W), scaled, at noise level ``level`` (B,).

        ``guide`` is that of :meth:`guide`, (B, 3, H, W) in [-1, 1], or what :meth:`prepare` made of it; ``condition``
        (B, number of conditions), None without any.
        """
        return self.denoise_fn(torch.cat((lq, x_t), 1), level, guide, *(() if condition is None else (condition,)))

    def forward(
        self,
        lq: torch.Tensor,
        hr: torch.Tensor,
        level: torch.Tensor,
        noise: torch.Tensor,
        condition: Optional[torch.Tensor] = None,
    ) -> Tuple[torch.Tensor, torch.Tensor]:
        """The two predictions of a training step (eq. 1), in one call so that DistributedDataParallel sees both.

        Args:
            lq, hr: degraded and true images, (B, 3, H, W) in [-1, 1].
            level: noise level sqrt(alpha_bar) of each image, (B,).
            noise: standard normal, (B, 3, H, W).
            condition: as of :meth:`denoise`.

        Returns:
            predicted noise, initial prediction.
        """
        initial = self.predict(lq)
        x_t = diffuse(self.residual_scale * (hr - initial), level, noise)
        return self.denoise(x_t, level, lq, self.guide(lq, initial), condition), initial
