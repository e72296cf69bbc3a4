"""From a UCDIR network and degraded images to restored ones: the one way in which validation and tools sample."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Callable, ContextManager, Optional, Tuple

import torch
import torch.nn.functional as F

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.diffusion import samplers, tiling
from ucdir_plugin.diffusion.schedule import NoiseSchedule

if TYPE_CHECKING:  # not needed to import the package
    from ucdir_plugin.options import SamplingOptions

Noise = Callable[..., torch.Tensor]
"""(shape of a batch, draw number, further parts of the key) -> standard normal noise."""


def sampling_schedule(training: NoiseSchedule, options: SamplingOptions) -> NoiseSchedule:
    """The levels to sample at: some of the training's (paper), or a new linear schedule (``rescale``, release)."""
    if options.spacing == "rescale":
        return NoiseSchedule.linear(options.steps, training.betas[0], options.rescale_end)
    if options.start_timestep is not None:
        training = training.truncate(options.start_timestep)
    return training.respace(options.steps, "uniform" if options.spacing == "respace" else options.spacing)


@torch.no_grad()
def restore(
    net: UCDIR,
    lq: torch.Tensor,
    training: NoiseSchedule,
    options: SamplingOptions,
    noise: Noise,
    autocast: Callable[[], ContextManager] = nullcontext,
    callback: Optional[samplers.Callback] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Predict, sample the residual, add.

    With ``tile``, an image that is larger is sampled by inter-step patch splitting (paper, section 3.3), each patch's
    guide features kept from step to step within ``cache_mb``. A predictor that says how far it looks
    (``receptive_field``) is evaluated on patches too, exactly; others run whole.

    Args:
        lq: (B, 3, H, W) in [-1, 1].
        training: the schedule that the network was trained with.
        noise: all the randomness.
        autocast: in which the networks run.
        callback: as of the samplers.

    Returns:
        initial prediction and restored images, (B, 3, H, W) in [-1, 1] up to overshoot.
    """
    border, (height, width) = options.border, lq.shape[-2:]
    if border:
        lq = F.pad(lq, (border,) * 4, mode="reflect" if border < min(height, width) else "replicate")
    schedule = sampling_schedule(training, options)
    with autocast():
        initial = _predict(net, lq, options).float()

    def prepare(lq: torch.Tensor, initial: torch.Tensor) -> Any:
        with autocast():
            return net.prepare(initial)

    def denoise(x_t: torch.Tensor, level: torch.Tensor, lq: torch.Tensor, initial: torch.Tensor, guide: Any):
        with autocast():
            return net.denoise(x_t, level, lq, guide).float()

    def sample(denoiser: samplers.Denoiser, shape: torch.Size, *key: Any) -> torch.Tensor:
        extra = {} if options.eta is None else {"eta": options.eta}
        return samplers.SAMPLERS[options.sampler].sample(
            denoiser,
            schedule,
            lambda draw: noise(shape, draw, *key),
            options.clip_x0,
            callback,
            dynamic_threshold=options.dynamic_threshold,
            start=None if options.start_timestep is None else 0.0,
            **extra,
        )

    def whole(lq: torch.Tensor, initial: torch.Tensor) -> samplers.Denoiser:
        guide = prepare(lq, initial)
        return lambda x_t, level: denoise(x_t, level, lq, initial, guide)

    grid = _grid(lq, options, _stride(net))
    if grid is None:
        residual = sample(whole(lq, initial), lq.shape)
    elif options.split == "inter_step":
        patches = tiling.split(
            denoise,
            grid,
            (lq, initial),
            tile_batch=options.tile_batch,
            merge=options.merge,
            prepare=prepare,
            cache_bytes=options.cache_mb * 2**20,
        )
        residual = sample(patches, lq.shape)
    else:

        def patch(number: int, lq: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
            return sample(whole(lq, initial), lq.shape, "patch", number)

        if len(lq) > 1:
            raise ValueError("split: per_patch samples one image at a time")
        residual = tiling.per_patch(patch, grid, (lq, initial), merge=options.merge)
    inner = (..., slice(border, border + height), slice(border, border + width))
    return initial[inner], residual.add_(initial)[inner]


def check_tiles(net: UCDIR, options: SamplingOptions) -> None:
    """Find out before hours of training, not at its first validation.

    Raises:
        UserError: if ``tile`` and ``overlap`` do not suit the network's stride.
    """
    if options.tile is not None:
        _grid(torch.empty(1, 3, 2 * options.tile, 2 * options.tile, device="meta"), options, _stride(net))


def _stride(net: UCDIR) -> int:
    return getattr(net.denoise_fn, "stride", 1)


def _grid(lq: torch.Tensor, options: SamplingOptions, stride: int) -> Optional[tiling.Grid]:
    """The patches of an image that is larger than one."""
    height, width = lq.shape[-2:]
    if options.tile is None or max(height, width) <= options.tile:
        return None
    if options.grid == "released":
        return tiling.Grid.released(height, width, options.tile, options.overlap)
    return tiling.Grid.aligned(height, width, options.tile, options.overlap, stride)


def _predict(net: UCDIR, lq: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    radius = getattr(net.predictor, "receptive_field", None)
    if options.tile is None or radius is None or max(lq.shape[-2:]) <= options.tile:
        return net.predict(lq)
    stride = net.predictor.stride
    least = 2 * radius + 2 * stride  # at which a patch keeps something
    grid = tiling.Grid.aligned(*lq.shape[-2:], max(options.tile, least), radius, stride)
    return tiling.tiled(net.predict, grid, lq, tile_batch=options.tile_batch)
