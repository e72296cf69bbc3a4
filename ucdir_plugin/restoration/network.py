"""Restoring images with any registered network: what ``ucdir_plugin.load_model`` and ``ucdir_plugin.restore`` do.

model = ucdir_plugin.load_model("options/demo_ucdir.yml", sampling={"sampler": "dpmpp_2m", "steps": 10})
result = ucdir_plugin.restore("photo.jpg", model)
result.image, result.initial, result.info
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, Mapping, Optional, Tuple

import torch
from torch import nn

from ucdir_plugin import zoo
from ucdir_plugin.archs import UCDIR
from ucdir_plugin.archs.padding import pad_for, size_multiple
from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.conditions import Condition, encode, given
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.restoration import base, sampling
from ucdir_plugin.restoration.base import Drawn, check_samples
from ucdir_plugin.utils import devices, image_reading
from ucdir_plugin.utils.errors import UserError

QUALITY_MARGIN = 5
"""So far a JPEG may be from those of the training without a word."""

ONE_PASS = ("tile", "overlap", "tile_batch", "merge", "amp")
"""The sampling options that mean something for a network without diffusion."""


@dataclass
class NetworkRestorer(base.Restorer):
    """A network with its weights, and how it is used; made by :func:`load_model`.

    Attributes:
        net: in evaluation mode, on ``device``; :class:`UCDIR`, or any network that takes and returns images.
        schedule: of the training; None without diffusion.
        options: sampler, steps, patches; without diffusion, the patches only.
        scale: output size / input size.
        seed: where none is given.
        about: name, weights and their SHA-256, for the record.
        notes: what a model file tells its user, such as its licence.
        jpeg_quality: lowest and highest of the JPEGs that it was trained on; None: on something else, or not known.
    """

    net: nn.Module
    schedule: Optional[NoiseSchedule]
    options: SamplingOptions
    device: torch.device
    scale: int = 1
    seed: int = 0
    about: Dict[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    jpeg_quality: Optional[Tuple[int, int]] = None

    def __post_init__(self) -> None:
        dtype = devices.amp_dtype(self.device, self.options.amp, "dtype")
        self._autocast = lambda: torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        if self.diffusion:
            sampling.check_tiles(self.net, self.options)
        elif self.options.tile is not None:
            self._grid(2 * self.options.tile, 2 * self.options.tile)

    @property
    def diffusion(self) -> bool:
        """Whether the network samples; else it restores in one pass."""
        return isinstance(self.net, UCDIR)

    def _grid(self, height: int, width: int) -> Optional[tiling.Grid]:
        tile = self.options.tile
        if tile is None or max(height, width) <= tile:
            return None
        return tiling.Grid.aligned(height, width, tile, self.options.overlap, size_multiple(self.net))

    def plan(self, height: int, width: int) -> base.Plan:
        """What restoring an image of this size once will cost."""
        if self.diffusion:
            return sampling.plan(self.net, height, width, self.options)
        grid = self._grid(height, width)
        patches, ratio = (1, 1.0) if grid is None else (len(grid.tiles), grid.computed_ratio)
        return base.Plan(1, patches, ratio, round(ratio * height * width))

    @property
    def conditions(self) -> Tuple[Condition, ...]:
        """Auxiliary scalar conditions that the network declares."""
        return self.net.conditions if self.diffusion else ()

    def condition_values(
        self, photo: image_reading.Photo, condition: Optional[Mapping[str, Any]] = None
    ) -> Dict[str, Any]:
        """Values of the conditions for a photo: what the user gives, and else the quality that a JPEG file shows.

        The latter only of a network that was trained on JPEGs, of which the condition ``quality`` is therefore that;
        a quality beyond the condition's range is its end.

        Args:
            photo: as it was read.
            condition: name -> value, as for :meth:`run`.
        """
        shown = {}
        if photo.quality is not None and self._shown is not None:
            low, high = self._shown.limits
            shown = {self._shown.name: min(max(photo.quality, low), high)}
        return {**shown, **(condition or {})}

    @property
    def _shown(self) -> Optional[Condition]:
        """The condition that a file tells, if there is one."""
        found = [c for c in self.conditions if c.name == "quality" and not c.classes and self.jpeg_quality is not None]
        return found[0] if found else None

    def check(self, samples: int, blend: float, condition: Optional[Mapping[str, Any]] = None) -> None:
        """Look at the arguments of :meth:`run` before any image is read.

        Raises:
            UserError: for what this network has no use for, or values out of range. What a file may tell is not
                missing yet.
        """
        shown = {} if self._shown is None else {self._shown.name: self._shown.limits[0]}
        given(self.conditions, {**shown, **(condition or {})})
        check_samples(samples)
        if not 0 <= blend <= 1:
            raise UserError(f"blend must be between 0 (initial prediction) and 1 (sample), got {blend}")
        if self.diffusion and self.net.predictor is None and blend != 1:
            raise UserError("blend has no meaning for a network without an initial predictor; leave it out")
        if not self.diffusion and (samples != 1 or blend != 1):
            what = "samples" if samples != 1 else "blend"
            raise UserError(f"{what} has no meaning for {type(self.net).__name__}, which restores in one pass")

    def run(
        self,
        lq: torch.Tensor,
        key: str,
        *,
        seed: Optional[int] = None,
        samples: int = 1,
        blend: float = 1.0,
        condition: Optional[Mapping[str, Any]] = None,
        empty: Callable[..., torch.Tensor] = torch.empty,
        progress: Optional[base.Progress] = None,
        callback: Optional[Callable[..., None]] = None,
    ) -> Drawn:
        """Restore one image; see :meth:`Restorer.run`. ``callback`` is on the scaled residual (``residual_scale``)."""
        self.check(samples, blend, condition)
        lq = lq.to(self.device)
        if not self.diffusion:
            return Drawn(lambda: None, (self._one_pass(lq, empty, progress).clamp_(0, 1) for _ in range(1)))
        values = encode(self.conditions, {name: [value] for name, value in (condition or {}).items()}, 1)
        values = None if values is None else values.to(self.device)
        images = sampling.Conditioned(
            self.net, lq.mul_(2).sub_(1), self.schedule, self.options, self._autocast, empty, progress, values
        )
        seed = self.seed if seed is None else seed

        def draw() -> Iterator[torch.Tensor]:
            for number in range(samples):
                noise = image_noise(seed, [key], self.device, number, empty)
                yield images.sample(noise, callback, blend).add_(1).div_(2).clamp_(0, 1)

        if self.net.predictor is None:
            return Drawn(lambda: None, draw())
        return Drawn(lambda: images.initial.add(1).div_(2).clamp_(0, 1), draw())

    @torch.no_grad()  # run's own does not reach what is computed later
    def _one_pass(
        self, lq: torch.Tensor, empty: Callable[..., torch.Tensor], progress: Optional[base.Progress]
    ) -> torch.Tensor:
        def function(x: torch.Tensor) -> torch.Tensor:
            height, width = x.shape[-2:]
            padded = pad_for(self.net, x)
            with self._autocast():
                y = self.net(padded).float()  # [0, 1], as BasicSR's models train and test it, whatever UCDIR gives it
            if y.shape[-2:] != (padded.shape[-2] * self.scale, padded.shape[-1] * self.scale):
                raise UserError(
                    f"{type(self.net).__name__} turns {padded.shape[-1]}x{padded.shape[-2]} pixels into"
                    f" {y.shape[-1]}x{y.shape[-2]}: set scale in the option file to output size / input size"
                )
            if progress is not None:
                progress(height * width)
            return y[..., : height * self.scale, : width * self.scale]

        grid = self._grid(*lq.shape[-2:])
        if grid is None:
            return function(lq)
        options = self.options
        return tiling.tiled(function, grid, lq, tile_batch=options.tile_batch, merge=options.merge, empty=empty)

    def state_bytes(self, height: int, width: int, samples: int = 1) -> int:
        """Memory for what is as large as the image: what grows with it where patches are of one size."""
        tensors = 6 if self.diffusion else 2  # input, prediction, x_t, eps, noise, history of the solver
        tensors += 3 * (samples > 1)  # mean, spread, and the sample that is being written
        return tensors * 3 * 4 * height * width * (self.scale**2 if not self.diffusion else 1)

    @property
    def steps(self) -> int:
        """Steps of sampling."""
        return self.options.steps

    def warning(self, photo: image_reading.Photo) -> Optional[str]:
        """Why a photo is not of the kind that the network was trained on; None if it is, as far as known."""
        if self.jpeg_quality is None:
            return None
        low, high = self.jpeg_quality
        trained = f"JPEG of quality {low}" + (f" to {high}" if high > low else "")
        if photo.quality is None:
            return f"it is no JPEG, and {self.about['model']} was trained on {trained}: restored all the same"
        if low - QUALITY_MARGIN <= photo.quality <= high + QUALITY_MARGIN:
            return None
        other = zoo.for_jpeg(photo.quality)
        return (
            f"it is a JPEG of quality {photo.quality}, and {self.about['model']} was trained on {trained}: restored"
            f" all the same, {'detail may be lost' if photo.quality > high else 'blocks may be left'}"
            f"{f' (--model {other} is for it)' if other else ''}"
        )

    def record_settings(
        self,
        seed: Optional[int] = None,
        samples: int = 1,
        blend: float = 1.0,
        condition: Optional[Mapping[str, Any]] = None,
    ) -> Dict[str, Any]:
        """All that decides what comes out, beside the image and its key."""
        used = self.options.model_dump()
        if not self.diffusion:
            return {**self.about, **{name: used[name] for name in ONE_PASS}}
        seed = self.seed if seed is None else seed
        given = {"condition": dict(condition or {})} if self.conditions else {}
        return {**self.about, **used, "seed": seed, "samples": samples, "blend": blend, **given}
