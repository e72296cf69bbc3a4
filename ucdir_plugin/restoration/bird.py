"""BIR-D at work: a prior, a task and settings from options, applied to images and files.

:class:`BlindRestorer` is for a prior what :class:`ucdir_plugin.restoration.network.NetworkRestorer` is for a trained
network: tools/restore.py, tools/test.py and ``ucdir_plugin.restore`` use both in the same way.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch

from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.bird import records
from ucdir_plugin.diffusion.bird.settings import Settings
from ucdir_plugin.diffusion.bird.solver import Solver
from ucdir_plugin.diffusion.bird.tasks import TASKS, Task
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.options.schema import BirdOptions
from ucdir_plugin.restoration import base, deepinv_methods, deepinv_solver
from ucdir_plugin.restoration.base import Drawn, check_samples
from ucdir_plugin.restoration.companions import Companions, fingerprint, read_mask
from ucdir_plugin.restoration.learned import LEARNED_ARRAYS, LEARNED_FIGURE, Learned, degraded_name, learned_of
from ucdir_plugin.utils import image_reading
from ucdir_plugin.utils.errors import ImageError, UserError

TILE = 1024
"""Longest side of a patch for a prior that was not trained for one size."""


COLOUR_STEPS, COLOUR_SIGMA = 24, 3.0
"""Of a process that has to invent colours. It starts from gray with much noise: from pure noise a small prior's first
guess at the mean colour, which is a poor one, tints the whole image."""

TENSORS = 14
"""Image-sized tensors of float32 that a solver holds at its peak; least squares on the kernel needs most of them."""


@dataclass
class BlindRestorer(base.Restorer):
    """A prior, and the task that it is to solve; made by :func:`from_options`.

    Attributes:
        prior: of images.
        task: what is known of the degradation.
        settings: of the solver, for this task.
        method: another solver instead (:mod:`ucdir_plugin.restoration.deepinv_solver`).
        first: the first stage's model, if it has one.
        options: as in an option file.
        device: of the prior.
        blur: a kernel that is known, (1, C, 1, k, k).
        seed: where none is given.
        about: name, prior and its SHA-256, for the record.
        notes: what its user should be told.
    """

    prior: Prior
    task: Task
    settings: Settings
    options: BirdOptions
    device: torch.device
    blur: Optional[torch.Tensor] = None
    method: Optional[deepinv_methods.Method] = None
    first: Any = None
    seed: int = 0
    about: Dict[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._files = Companions()

    @property
    def scale(self) -> int:
        """Output size / input size."""
        return self.task.factor

    @property
    def steps(self) -> int:
        """Steps of the reverse process."""
        return (self.method or self.settings).steps

    @property
    def tile(self) -> Optional[int]:
        """Longest side of a patch; None takes images whole."""
        tile = self.options.tile
        if tile is None:
            return self.prior.size or TILE
        return tile or None

    @property
    def overlap(self) -> int:
        """Pixels that patches share at each inner border."""
        if self.options.overlap is not None:
            return self.options.overlap
        reach = self.prior.receptive_field
        return (self.tile or TILE) // 8 if reach is None else reach

    @property
    def extra_suffixes(self) -> List[str]:
        """Ends of the names of further files that an image gives (:meth:`Learned.files`)."""
        count = 1 + len(self.options.observations or ())
        return [LEARNED_ARRAYS, LEARNED_FIGURE, *(degraded_name(number, count) for number in range(1, count + 1))]

    @property
    def input_files(self) -> List[str]:
        """Files and folders besides the images that results must not be written over."""
        options, stage = self.options, self.options.first_stage
        found = [*(options.observations or ()), options.mask, (options.blur or {}).get("file")]
        found += [stage.images, stage.model, stage.weights] if stage is not None else []
        return [path for path in found if path is not None]

    def _grid(self, height: int, width: int) -> Optional[tiling.Grid]:
        """For the scene of an observation of this size."""
        border = self._border()
        height, width = height * self.scale + 2 * border, width * self.scale + 2 * border
        if self.tile is None or max(height, width) <= self.tile:
            return None
        return tiling.Grid.aligned(height, width, self.tile, self.overlap, self.prior.stride)

    def _border(self) -> int:
        size = self.blur.shape[-1] if self.blur is not None else self.settings.kernel_size or self.task.kernel_size
        return size // 2 if self.settings.padding == "valid" else 0

    def plan(self, height: int, width: int) -> base.Plan:
        """What restoring an image of this size once will cost."""
        grid = self._grid(height, width)
        patches, ratio = (1, 1.0) if grid is None else (len(grid.tiles), grid.computed_ratio)
        border = self._border()
        pixels = (height * self.scale + 2 * border) * (width * self.scale + 2 * border)
        return base.Plan(self.steps, patches, ratio, self.steps * round(ratio * pixels))

    def check(self, samples: int, blend: float, condition: Optional[Mapping[str, Any]] = None) -> None:
        """Look at the arguments of :meth:`run` before any image is read.

        Raises:
            UserError: for what has no meaning here.
        """
        check_samples(samples)
        if blend != 1:
            raise UserError("blend has no meaning for BIR-D, which predicts nothing first; leave it out")
        if condition:
            raise UserError(f"condition {next(iter(condition))}: BIR-D is told nothing but the task; leave it out")

    def state_bytes(self, height: int, width: int, samples: int = 1) -> int:
        """Memory for what is as large as the image."""
        count = TENSORS + 2 * (self.task.mask or samples > 1)
        return count * 3 * 4 * height * width * self.scale**2

    def output_photo(self, photo: image_reading.Photo) -> image_reading.Photo:
        """The kind of photo that the result is."""
        return dataclasses.replace(photo, gray=False, icc_profile=None) if self.task.gray and photo.gray else photo

    def record_settings(
        self,
        seed: Optional[int] = None,
        samples: int = 1,
        blend: float = 1.0,
        condition: Optional[Mapping[str, Any]] = None,
    ) -> Dict[str, Any]:
        """All that decides what comes out, beside the image and its key."""
        used = dataclasses.asdict(self.method or self.settings)
        for name in ("data", "kernel") if self.method is None else ():
            used[name]["type"] = type(getattr(self.settings, name)).__name__
        options = self.options.model_dump(exclude={"settings", "preset"}, exclude_none=True)
        files = {path: fingerprint(path) for path in self.input_files}
        return {
            **self.about,
            **options,
            **({"files": files} if files else {}),
            "preset": self.options.preset,
            "settings": used,
            "tile": self.tile,
            "overlap": self.overlap,
            "seed": self.seed if seed is None else seed,
            "samples": samples,
        }

    def observed(self, lq: torch.Tensor) -> torch.Tensor:
        """y of an image: (B, 3, H, W) in [0, 1] -> (B, 3 or 1, H, W) in [-1, 1]."""
        return (lq.mean(1, keepdim=True) if self.task.gray else lq) * 2 - 1

    def solve(
        self,
        observations: Sequence[torch.Tensor],
        keys: Sequence[str],
        *,
        known: Optional[torch.Tensor] = None,
        first: Optional[torch.Tensor] = None,
        seed: Optional[int] = None,
        sample: int = 0,
        empty: Callable[..., torch.Tensor] = torch.empty,
        progress: Optional[base.Progress] = None,
        callback: Optional[Callable[[records.StepRecord], None]] = None,
    ) -> records.Result:
        """Restore a batch of scenes.

        Args:
            observations: (B, 3, h, w) in [0, 1], one or several of each scene.
            keys: name the scenes to the noise, and in messages.
            known: (B, 1, h, w) of 0 (hole) and 1, for inpainting.
            first: (B, 3, H, W) in [0, 1], what a first stage made of it.
            sample: number of the draw.

        Raises:
            UserError: if something does not fit.
        """
        seed = self.seed if seed is None else seed
        operator_known = None if known is None else known.to(self.device)
        if self.task.holes and known is None:
            raise ImageError(f"{keys[0]}: this task needs a mask of what is known: add --mask FILE, or bird: mask")
        start, settings, task = None, self.settings, self.task
        stage = self.options.first_stage
        seen = [self.observed(lq.to(self.device)) for lq in observations]
        if first is not None and stage.use in ("target", "both"):
            seen, task, operator_known = [first.to(self.device) * 2 - 1], TASKS["blind"], None
        found = task.degradations(seen, settings, operator_known, self.prior.channels, (seed,))
        if self.blur is not None:
            kernel = self.blur.to(self.device)
            found = [dataclasses.replace(d, kernel=kernel.expand(len(d.kernel), -1, -1, -1, -1).clone()) for d in found]
        observed = list(zip(seen, found))
        if first is not None and stage.use in ("start", "both"):
            start = first.to(self.device) * 2 - 1
        noise = image_noise(seed, keys, self.device, sample, empty)
        solve = Solver if self.method is None else deepinv_solver.ZeroShotSolver
        solver = solve(
            self.prior,
            observed,
            settings if self.method is None else self.method,
            noise,
            tile=self.tile or 2**30,
            overlap=self.overlap,
            tile_batch=self.options.tile_batch,
            merge=self.options.merge,
            names=keys,
            start=start,
            progress=progress,
        )
        return solver.run(callback)

    def guess(self, lq: torch.Tensor, known: Optional[torch.Tensor] = None) -> Optional[torch.Tensor]:
        """y brought to the result's size and channels, its holes filled; None where it has them; both in [0, 1].

        Low light and HDR start from brighter guesses of their own.
        """
        if self.task.factor == 1 and not self.task.gray and not self.task.holes:
            return None
        y = self.observed(lq.to(self.device))
        operator = self.task.operator(None if known is None else known.to(self.device))
        return operator.lift((y + 1) / 2, self.prior.channels).clamp(0, 1)

    def companions(self, key: str, size: Tuple[int, int]) -> Tuple[List[torch.Tensor], Optional[torch.Tensor]]:
        """The further observations of an image, and its mask, from the files that the options name.

        Args:
            key: relative path of the image.
            size: (height, width).

        Returns:
            each (1, 3, H, W) in [0, 1]; (1, 1, H, W) of 0 and 1, or None.

        Raises:
            ImageError: if one is missing, unreadable or of another size.
        """
        options = self.options
        more = [self._files.observation(where, key, size) for where in options.observations or ()]
        if not self.task.holes or options.mask is None:
            return more, None
        return more, read_mask(self._files.path(options.mask, key, "mask"), size, options.holes)

    def first_stage(self, key: str, lq: torch.Tensor, seed: Optional[int] = None) -> Optional[torch.Tensor]:
        """What the first stage makes of an image: (1, 3, H, W) in [0, 1] -> (1, 3, H * scale, W * scale) or None.

        Raises:
            ImageError: if its image is missing or of another size.
        """
        stage = self.options.first_stage
        if stage is None:
            return None
        if stage.images is not None:
            image = image_reading.to_tensor(
                image_reading.read_photo(
                    self._files.path(stage.images, key, "first stage's image"), image_reading.MAX_PIXELS
                )
            )
        else:
            image = next(self.first.run(lq.clone(), key, seed=seed).samples)
        expected = tuple(s * self.scale for s in lq.shape[-2:])
        if tuple(image.shape[-2:]) != expected:
            h, w = image.shape[-2:]
            raise ImageError(f"{key}: the first stage's image is {w}x{h}, {expected[1]}x{expected[0]} is needed")
        return image

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
    ) -> base.Drawn:
        """Restore one image; arguments and result as of :meth:`ucdir_plugin.restoration.base.Restorer.run`."""
        self.check(samples, blend, condition)
        more, known = self.companions(key, tuple(lq.shape[-2:]))
        first = self.first_stage(key, lq, seed)
        each_step = None if callback is None else lambda done: callback(done.number, None, done.x0)
        latest: List[Learned] = []

        def draw() -> typing.Iterator[torch.Tensor]:
            for number in range(samples):
                result = self.solve(
                    [lq, *more],
                    [key],
                    known=known,
                    first=first,
                    seed=seed,
                    sample=number,
                    empty=empty,
                    progress=progress,
                    callback=each_step,
                )
                if result.failed[0] is not None:
                    raise ImageError(result.failed[0])
                latest[:] = [learned_of(result, 0)]
                yield result.image.add(1).div_(2).clamp_(0, 1)

        def initial() -> Optional[torch.Tensor]:
            return first if first is not None else self.guess(lq, known)

        return Drawn(initial, draw(), lambda: latest[0] if latest else None)


class RestoredSample(NamedTuple):
    """An image of a data set.

    Attributes:
        initial: the first stage's, or :meth:`BlindRestorer.guess`, (1, 3, h, w) in [0, 1], or None.
        output: (1, 3, H, W) in [0, 1].
        learned: what was found beside it.
    """

    initial: Optional[torch.Tensor]
    output: torch.Tensor
    learned: Learned


def restore_sample(
    restorer: BlindRestorer, lq: torch.Tensor, keys: Sequence[str], known: Optional[torch.Tensor] = None
) -> RestoredSample:
    """Restore one image of a data set.

    Args:
        lq: (1, 3, h, w) in [0, 1].
        keys: its relative path.
        known: 0 in holes; else the mask that the options name.

    Raises:
        ImageError: if this image cannot be restored.
    """
    try:
        (key,) = keys
        more, of_file = restorer.companions(key, tuple(lq.shape[-2:]))
        known = of_file if known is None else known
        first = restorer.first_stage(key, lq)
        result = restorer.solve([lq, *more], keys, known=known, first=first)
    except UserError as err:
        raise ImageError(str(err)) from err
    if result.failed[0] is not None:
        raise ImageError(result.failed[0])
    initial = first if first is not None else restorer.guess(lq, known)
    return RestoredSample(initial, (result.image + 1) / 2, learned_of(result, 0))
