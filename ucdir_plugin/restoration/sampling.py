"""From a UCDIR network and degraded images to restored ones: the one way in which validation and tools sample."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Optional, Tuple

import torch
import torch.nn.functional as F

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.diffusion import samplers, tiling
from ucdir_plugin.diffusion.noise import KeyPart, Noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.schema import sampling_schedule
from ucdir_plugin.restoration.base import Plan, Progress

if TYPE_CHECKING:
    from ucdir_plugin.options.schema import SamplingOptions


class Conditioned:
    """A UCDIR network at work on a batch of images: they are predicted once, and sampled as often as asked.

    With ``tile``, an image that is larger is sampled by inter-step patch splitting (paper, section 3.3), each patch's
    guide features kept from step to step, and from sample to sample, within ``cache_mb``. A predictor that says how
    far it looks (``receptive_field``) is evaluated on patches too, exactly; others run whole.

    Args:
        lq: (B, 3, H, W) in [-1, 1].
        training: the schedule that the network was trained with.
        autocast: in which the networks run.
        empty: allocates tensors of the images' size, called as torch.empty; for instance in a memory-mapped file.
        progress: see :data:`Progress`.
        condition: of each image, as the network takes it (:func:`ucdir_plugin.diffusion.conditions.encode`).

    Attributes:
        initial: the initial prediction, (B, 3, H, W) in [-1, 1].
    """

    @torch.no_grad()
    def __init__(
        self,
        net: UCDIR,
        lq: torch.Tensor,
        training: NoiseSchedule,
        options: SamplingOptions,
        autocast: Callable[[], ContextManager] = nullcontext,
        empty: Callable[..., torch.Tensor] = torch.empty,
        progress: Optional[Progress] = None,
        condition: Optional[torch.Tensor] = None,
    ):
        border, (height, width) = options.border, lq.shape[-2:]
        # At an image's very edge a network that was trained on crops leaves noise in.
        if border:
            lq = F.pad(lq, (border,) * 4, mode="reflect" if border < min(height, width) else "replicate")
        self.net, self.lq, self.options, self.condition = net, lq, options, condition
        self.autocast, self.progress = autocast, progress
        self.schedule = sampling_schedule(training, options)
        self.inner = (..., slice(border, border + height), slice(border, border + width))
        with autocast():
            self._initial = _predict(net, lq, options, empty)
        self.grid = grid_of(net, height, width, options)
        self.denoiser: Optional[samplers.Denoiser] = None
        if self.grid is None:
            self.denoiser = self._whole(lq, self._initial, condition)
        elif options.split == "inter_step":
            self.denoiser = tiling.split(
                self._denoise,
                self.grid,
                (lq, self._initial, condition),
                tile_batch=options.tile_batch,
                merge=options.merge,
                prepare=self._prepare,
                cache_bytes=options.cache_mb * 2**20,
                empty=empty,
            )
        elif len(lq) > 1:
            raise ValueError("split: per_patch samples one image at a time")

    @property
    def initial(self) -> torch.Tensor:
        """The initial prediction, (B, 3, H, W) in [-1, 1]."""
        return self._initial[self.inner]

    @torch.no_grad()
    def sample(
        self, noise: Noise, callback: Optional[samplers.Callback] = None, residual_weight: float = 1.0
    ) -> torch.Tensor:
        """Restored images, (B, 3, H, W) in [-1, 1] up to overshoot, in memory of their own.

        Args:
            noise: all the randomness.
            callback: as of the samplers.
            residual_weight: lambda of initial + lambda * residual: 1 is the sample (perception), 0 the initial
                prediction (fidelity), for which nothing is sampled.
        """
        if residual_weight == 0:
            return self.initial.clone()
        if self.denoiser is not None:
            residual = self._sample(self.denoiser, self.lq.shape, noise, callback)
        else:

            def patch(number: int, lq: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
                whole = self._whole(lq, initial, self.condition)
                return self._sample(whole, lq.shape, noise, callback, "patch", number)

            residual = tiling.per_patch(patch, self.grid, (self.lq, self._initial), merge=self.options.merge)
        weight = residual_weight / self.net.residual_scale
        if weight != 1:
            residual.mul_(weight)
        return residual.add_(self._initial)[self.inner]

    def _sample(
        self,
        denoiser: samplers.Denoiser,
        shape: torch.Size,
        noise: Noise,
        callback: Optional[samplers.Callback],
        *key: KeyPart,
    ) -> torch.Tensor:
        options = self.options
        extra = {} if options.eta is None else {"eta": options.eta}
        return samplers.SAMPLERS[options.sampler].sample(
            denoiser,
            self.schedule,
            lambda draw: noise(shape, draw, *key),
            options.clip_x0 and self.net.residual_scale,
            callback,
            dynamic_threshold=options.dynamic_threshold,
            start=None if options.start_timestep is None else 0.0,
            **extra,
        )

    def _prepare(self, lq: torch.Tensor, initial: torch.Tensor, _condition: Optional[torch.Tensor] = None) -> Any:
        with self.autocast():
            return self.net.prepare(self.net.guide(lq, initial))

    def _denoise(
        self,
        x_t: torch.Tensor,
        level: torch.Tensor,
        lq: torch.Tensor,
        initial: torch.Tensor,
        condition: Optional[torch.Tensor],
        guide: Any,
    ) -> torch.Tensor:
        with self.autocast():
            eps = self.net.denoise(x_t, level, lq, guide, condition).float()
        if self.progress is not None:
            self.progress(len(x_t) * x_t.shape[-2] * x_t.shape[-1])
        return eps

    def _whole(self, lq: torch.Tensor, initial: torch.Tensor, condition: Optional[torch.Tensor]) -> samplers.Denoiser:
        guide = self._prepare(lq, initial)
        return lambda x_t, level: self._denoise(x_t, level, lq, initial, condition, guide)


def restore(
    net: UCDIR,
    lq: torch.Tensor,
    training: NoiseSchedule,
    options: SamplingOptions,
    noise: Noise,
    autocast: Callable[[], ContextManager] = nullcontext,
    callback: Optional[samplers.Callback] = None,
    condition: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """One sample of each image; arguments as of :class:`Conditioned` and its ``sample``.

    Returns:
        initial prediction and restored images, (B, 3, H, W) in [-1, 1] up to overshoot.
    """
    images = Conditioned(net, lq, training, options, autocast, condition=condition)
    return images.initial, images.sample(noise, callback)


def plan(net: UCDIR, height: int, width: int, options: SamplingOptions) -> Plan:
    """What sampling an image of this size once will cost."""
    nfe = samplers.SAMPLERS[options.sampler].nfe(options.steps)
    padded = height + 2 * options.border, width + 2 * options.border
    grid = grid_of(net, height, width, options)
    patches, ratio = (1, 1.0) if grid is None else (len(grid.tiles), grid.computed_ratio)
    return Plan(nfe, patches, ratio, nfe * round(ratio * padded[0] * padded[1]))


def check_tiles(net: UCDIR, options: SamplingOptions) -> None:
    """Find out before hours of training, not at its first validation.

    Raises:
        UserError: if ``tile`` and ``overlap`` do not suit the network's stride.
    """
    if options.tile is not None:
        grid_of(net, 2 * options.tile, 2 * options.tile, options)


def grid_of(net: UCDIR, height: int, width: int, options: SamplingOptions) -> Optional[tiling.Grid]:
    """The patches of an image of this size, over it and its border; None if it is sampled whole."""
    if options.tile is None:
        return None
    stride = getattr(net.denoise_fn, "stride", 1)
    return tiling.grid_of(height, width, options.tile, options.overlap, stride, options.border, options.grid)


def _predict(
    net: UCDIR, lq: torch.Tensor, options: SamplingOptions, empty: Callable[..., torch.Tensor]
) -> torch.Tensor:
    if net.predictor is None:
        return empty(tuple(lq.shape), device=lq.device).zero_()
    radius = getattr(net.predictor, "receptive_field", None)
    if options.tile is None or radius is None or max(lq.shape[-2:]) <= options.tile + 2 * options.border:
        return net.predict(lq).float()
    stride = net.predictor.stride
    least = 2 * radius + 2 * stride  # at which a patch keeps something
    grid = tiling.Grid.aligned(*lq.shape[-2:], max(options.tile, least), radius, stride)
    return tiling.tiled(net.predict, grid, lq, tile_batch=options.tile_batch, empty=empty)
