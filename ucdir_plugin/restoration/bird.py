"""BIR-D at work: a prior, a task and settings from options, applied to images and files.

What :class:`ucdir_plugin.restorer.Restorer` is for networks that were trained, :class:`BlindRestorer` is for a prior:
tools/restore.py, tools/test.py and ``ucdir_plugin.restore`` use both in the same way.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import typing
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from ucdir_plugin import imageio, priors, sampling, weights, zero_shot
from ucdir_plugin.data.degradations import gaussian_kernel, motion_kernel
from ucdir_plugin.diffusion import bird, tiling
from ucdir_plugin.diffusion.degradation import check_kernel_size
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.diffusion.tasks import TASKS, Settings, Task, ablation, preset, task_named
from ucdir_plugin.errors import ImageError, UserError, did_you_mean
from ucdir_plugin.options import BirdOptions, FirstStageOptions, check_call, read_options
from ucdir_plugin.restorer import Drawn, check_samples, load_model

TILE = 1024
"""Longest side of a patch for a prior that was not trained for one size."""

LEARNED_ARRAYS, LEARNED_FIGURE = ".learned.npz", ".learned.png"
"""Ends of names, behind a dot: photographs are called a_learned more often."""


def degraded_name(number: int, count: int) -> str:
    """End of the name of the ``number``-th of ``count`` re-degraded observations."""
    return f".degraded{number if count > 1 else ''}.png"


COLOUR_STEPS, COLOUR_SIGMA = 24, 3.0
"""Of a process that has to invent colours. It starts from gray with much noise: from pure noise a small prior's first
guess at the mean colour, which is a poor one, tints the whole image."""

TENSORS = 14
"""Image-sized tensors of float32 that a solver holds at its peak; least squares on the kernel needs most of them."""


def changed(base: Any, changes: Mapping[str, Any], where: str) -> Any:
    """A frozen dataclass of settings with some of its fields changed, as options say.

    A field that is such a class itself takes a mapping: of its fields, or with ``type`` one of the other classes that
    it may be, as in ``{data: {type: Gradient, scale: {type: FixedScale, eta: 0.5}}}``.

    Raises:
        UserError: for an unknown name, or a value of another type.
    """
    kind = type(base)
    hints = typing.get_type_hints(kind)
    values: Dict[str, Any] = {}
    for key, value in changes.items():
        known = {k.__name__: k for k in typing.get_args(hints.get(key)) if dataclasses.is_dataclass(k)}
        if not known:
            values[key] = value
            continue
        if not isinstance(value, Mapping):
            raise UserError(f"option {where}:{key}: a mapping is expected, with 'type: {' or '.join(known)}' or fields")
        inner, here = dict(value), f"{where}:{key}"
        name = inner.pop("type", None)
        old = getattr(base, key)
        if name is not None and (not isinstance(name, str) or name not in known):
            raise UserError(f"option {here}:type: there is no {name!r}; {did_you_mean(str(name), known)}")
        new = old if name is None or type(old) is known[name] else known[name]()
        values[key] = changed(new, inner, here)
    plain = {k: v for k, v in values.items() if not dataclasses.is_dataclass(v)}
    check_call(kind, plain, where, own=True)
    try:
        return dataclasses.replace(base, **values)
    except UserError as err:
        raise UserError(f"option {where}: {err}") from err


def known_kernel(blur: Mapping[str, Any], channels: int = 3) -> torch.Tensor:
    """A known blur: ``{type: gaussian, sigma: 2.5}``, ``{type: motion, length: 9, angle: 45}`` or ``{file: K.npy}``.

    A file holds a point spread function, what a bright dot becomes, as ``learned.npz`` does too.

    Returns:
        (1, channels, 1, k, k) of sum 1, k odd; as :class:`Degradation` has it, mirrored.

    Raises:
        UserError: if it is none of these.
    """
    blur = dict(blur)
    kinds = {"gaussian": (gaussian_kernel, ("sigma",)), "motion": (motion_kernel, ("length", "angle"))}
    path = blur.pop("file", None)
    if path is not None:
        if blur:
            raise UserError(f"option bird:blur: file goes without {', '.join(blur)}")
        if not isinstance(path, str):
            raise UserError(f"option bird:blur:file: the path of a file is expected, got {path!r}")
        kernel = _kernel_file(path)[::-1, ::-1]
    else:
        kind = blur.pop("type", None)
        if not isinstance(kind, str) or kind not in kinds:
            raise UserError(f"option bird:blur:type: there is no {kind!r}; {did_you_mean(str(kind), kinds)}")
        function, names = kinds[kind]
        if set(blur) != set(names) or not all(isinstance(v, (int, float)) and 0 <= v <= 360 for v in blur.values()):
            raise UserError(f"option bird:blur: {kind} has the numbers {' and '.join(names)}, 0 to 360, got {blur}")
        kernel = function(**blur)
    if kernel.ndim != 2 or kernel.shape[0] != kernel.shape[1]:
        raise UserError(f"option bird:blur: a kernel is square, got {' x '.join(map(str, kernel.shape))}")
    check_kernel_size(kernel.shape[0])
    total = float(kernel.sum())
    if not np.isfinite(kernel).all() or total <= 0:
        raise UserError("option bird:blur: a kernel has finite taps with a positive sum")
    plane = torch.from_numpy(np.ascontiguousarray(kernel / total)).float()
    return plane.expand(1, channels, 1, *plane.shape).clone()


def _kernel_file(path: str) -> np.ndarray:
    try:
        if path.endswith(".npy"):
            found = np.load(path, allow_pickle=False)
            if not isinstance(found, np.ndarray) or found.ndim != 2 or found.dtype.kind not in "fiu":
                raise UserError(f"option bird:blur:file: {path}: one array (k, k) of real numbers is expected")
            return found.astype(np.float64)
        return imageio.read_photo(path, imageio.MAX_PIXELS).pixels[..., 0].astype(np.float64)
    except UserError:
        raise
    except Exception as err:  # numpy raises a dozen types for damaged files
        raise UserError(f"option bird:blur:file: {path} cannot be read: {err}") from err


@dataclass
class Learned:
    """What a run found beside the image, of one image.

    Attributes:
        y: (c, h, w) in [0, 1], for each observation.
        degraded: D(image), like ``y``.
        image: (C, H, W) in [0, 1].
        kernel: for each observation (C, 1 or C, k, k), as point spread functions (of a convolution).
        mask: for each observation (H, W), on the scale of [0, 1], or None.
        sigma, loss, scale, mask_mean, kernels: of each step; see :class:`bird.Trace`.
    """

    y: List[torch.Tensor]
    degraded: List[torch.Tensor]
    image: torch.Tensor
    kernel: List[torch.Tensor]
    mask: List[Optional[torch.Tensor]]
    sigma: np.ndarray
    loss: np.ndarray
    scale: np.ndarray
    mask_mean: np.ndarray
    kernels: np.ndarray

    def arrays(self) -> Dict[str, np.ndarray]:
        """By name: kernel (O, C, c, k, k), mask (O, H, W) where one was learned, and of the steps S: sigma (S,), loss,
        scale (NaN where there is none) and mask_mean (S, O), kernel_sum (S, O, C), kernels (S, O, C, c, k, k)."""
        found = {
            "kernel": torch.stack(self.kernel).numpy(),
            "sigma": self.sigma,
            "loss": self.loss,
            "scale": self.scale,
            "mask_mean": self.mask_mean,
            "kernel_sum": self.kernels.sum((-3, -2, -1)),
            "kernels": self.kernels,
        }
        if self.mask[0] is not None:
            found["mask"] = torch.stack(self.mask).numpy()
        return found

    def npz(self) -> bytes:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays())
        return buffer.getvalue()

    def files(self) -> Dict[str, bytes]:
        """Suffix of a name -> content: the arrays, the figure, and each re-degraded observation."""
        from ucdir_plugin.figure import learned_figure

        files = {LEARNED_ARRAYS: self.npz(), LEARNED_FIGURE: learned_figure(self)}
        for number, degraded in enumerate(self.degraded, 1):
            photo = imageio.Photo(np.zeros((*degraded.shape[-2:], 3), np.uint8))
            image = degraded.clamp(0, 1).expand(3, -1, -1)
            files[degraded_name(number, len(self.degraded))] = imageio.encode_result(image, photo, ".png")
        return files


def learned_of(result: bird.Result, index: int) -> Learned:
    """Of one image of a batch."""
    trace = result.trace

    def steps(values: Sequence[torch.Tensor]) -> np.ndarray:
        return torch.stack([v[:, index] for v in values]).numpy()

    def unit(images: torch.Tensor) -> torch.Tensor:
        return (images[index].cpu() + 1) / 2

    observations = result.observations
    masks = [o.degradation.mask for o in observations]
    return Learned(
        [o.degradation.of(index).operator.seen(unit(o.y)[None])[0] for o in observations],
        [unit(d) for d in result.degraded],
        unit(result.image).clamp(0, 1),
        [o.degradation.kernel[index].cpu().flip(-1, -2) for o in observations],
        [None if m is None else m[index, 0].cpu() for m in masks],
        np.array(trace.sigma),
        steps(trace.loss),
        steps(trace.scale),
        steps(trace.mask_mean),
        torch.stack([torch.stack([k[index].flip(-1, -2) for k in kernels]) for kernels in trace.kernel]).numpy(),
    )


@dataclass
class BlindRestorer:
    """A prior, and the task that it is to solve; made by :func:`from_options`.

    Attributes:
        prior: of images.
        task: what is known of the degradation.
        settings: of the solver, for this task.
        method: another solver instead (:mod:`ucdir_plugin.zero_shot`).
        first: the first stage's model, if it has one.
        options: as in an option file.
        device: of the prior.
        blur: a kernel that is known, (1, C, 1, k, k).
        seed: where none is given.
        about: name, prior and its SHA-256, for the record.
        notes: what a user should be told.
    """

    prior: Prior
    task: Task
    settings: Settings
    options: BirdOptions
    device: torch.device
    blur: Optional[torch.Tensor] = None
    method: Optional[zero_shot.Method] = None
    first: Any = None
    seed: int = 0
    about: Dict[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    conditions = ()
    diffusion = True

    def __post_init__(self) -> None:
        self._folders: Dict[str, Dict[str, str]] = {}  # images by stem, listed once

    @property
    def scale(self) -> int:
        """Output size / input size."""
        return self.task.factor

    @property
    def steps(self) -> int:
        return (self.method or self.settings).steps

    @property
    def tile(self) -> Optional[int]:
        tile = self.options.tile
        if tile is None:
            return self.prior.size or TILE
        return tile or None

    @property
    def overlap(self) -> int:
        if self.options.overlap is not None:
            return self.options.overlap
        reach = self.prior.receptive_field
        return (self.tile or TILE) // 8 if reach is None else reach

    @property
    def beside(self) -> List[str]:
        """Ends of the names of further files that an image gives (:meth:`Learned.files`)."""
        count = 1 + len(self.options.observations or ())
        return [LEARNED_ARRAYS, LEARNED_FIGURE, *(degraded_name(number, count) for number in range(1, count + 1))]

    @property
    def reads(self) -> List[str]:
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

    def plan(self, height: int, width: int) -> sampling.Plan:
        """What restoring an image of this size once will cost."""
        grid = self._grid(height, width)
        patches, ratio = (1, 1.0) if grid is None else (len(grid.tiles), grid.computed_ratio)
        border = self._border()
        pixels = (height * self.scale + 2 * border) * (width * self.scale + 2 * border)
        return sampling.Plan(self.steps, patches, ratio, self.steps * round(ratio * pixels))

    def check(self, samples: int, blend: float, condition: Optional[Mapping[str, Any]] = None) -> None:
        """
        Raises:
            UserError: for what has no meaning here.
        """
        check_samples(samples)
        if blend != 1:
            raise UserError("blend has no meaning for BIR-D, which predicts nothing first; leave it out")
        if condition:
            raise UserError(f"condition {next(iter(condition))}: BIR-D is told nothing but the task; leave it out")

    def told(self, photo: imageio.Photo, condition: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
        """What is told of a photo: what the user says, which :meth:`check` refuses."""
        return dict(condition or {})

    def state_bytes(self, height: int, width: int, samples: int = 1) -> int:
        """Memory for what is as large as the image."""
        count = TENSORS + 2 * (self.task.mask or samples > 1)
        return count * 3 * 4 * height * width * self.scale**2

    def like(self, photo: imageio.Photo) -> imageio.Photo:
        """The kind of photo that the result is."""
        return dataclasses.replace(photo, gray=False, icc_profile=None) if self.task.gray and photo.gray else photo

    def doubt(self, photo: imageio.Photo) -> Optional[str]:
        """Why a photo is not of the kind that was trained on: nothing was trained."""
        return None

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
        files = {path: _fingerprint(path) for path in self.reads}
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
        progress: Optional[sampling.Progress] = None,
        callback: Optional[Callable[[bird.StepRecord], None]] = None,
    ) -> bird.Result:
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
        noise = sampling.image_noise(seed, keys, self.device, sample, empty)
        solve = bird.Solver if self.method is None else zero_shot.ZeroShotSolver
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
        more = []
        for where in self.options.observations or ():
            photo = imageio.read_photo(self._partner(where, key, "observation"), imageio.MAX_PIXELS)
            more.append(imageio.to_tensor(photo))
            if more[-1].shape[-2:] != size:
                h, w = more[-1].shape[-2:]
                raise ImageError(
                    f"observations of different sizes: {key} is {size[1]}x{size[0]}, the one in {where} {w}x{h}"
                )
        known = None
        if self.task.holes and self.options.mask is not None:
            known = read_mask(self._partner(self.options.mask, key, "mask"), size, self.options.holes)
        return more, known

    def _partner(self, where: str, key: str, what: str) -> str:
        """The file of ``where``: itself, or in a folder the one whose relative path agrees up to the extension.

        Raises:
            ImageError: if it is missing.
        """
        if os.path.isfile(where):
            return where
        if not os.path.isdir(where):
            raise ImageError(f"{what}: {where} does not exist")
        stem = os.path.splitext(key)[0]
        if where not in self._folders:
            self._folders[where] = imageio.images_by_stem(where, what)
        found = self._folders[where]
        if stem not in found:
            raise ImageError(f"{key}: its {what} {stem}.* is not in {where}; {did_you_mean(stem, found)}")
        return os.path.join(where, found[stem])

    def first_stage(self, key: str, lq: torch.Tensor, seed: Optional[int] = None) -> Optional[torch.Tensor]:
        """What the first stage makes of an image: (1, 3, H, W) in [0, 1] -> (1, 3, H * scale, W * scale) or None.

        Raises:
            ImageError: if its image is missing or of another size.
        """
        stage = self.options.first_stage
        if stage is None:
            return None
        if stage.images is not None:
            image = imageio.to_tensor(
                imageio.read_photo(self._partner(stage.images, key, "first stage's image"), imageio.MAX_PIXELS)
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
        progress: Optional[sampling.Progress] = None,
        callback: Optional[Callable[..., None]] = None,
    ) -> Any:
        """Restore one image; arguments and result as of :meth:`ucdir_plugin.restorer.Restorer.run`."""
        self.check(samples, blend, condition)
        more, known = self.companions(key, tuple(lq.shape[-2:]))
        first = self.first_stage(key, lq, seed)
        told = None if callback is None else lambda done: callback(done.number, None, done.x0)
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
                    callback=told,
                )
                if result.failed[0] is not None:
                    raise ImageError(result.failed[0])
                latest[:] = [learned_of(result, 0)]
                yield result.image.add(1).div_(2).clamp_(0, 1)

        def initial() -> Optional[torch.Tensor]:
            return first if first is not None else self.guess(lq, known)

        return Drawn(initial, draw(), lambda: latest[0] if latest else None)


def read_mask(path: str, size: Tuple[int, int], holes: str = "white") -> torch.Tensor:
    """What is known of an image, from a picture of its holes.

    Args:
        size: (height, width) that it must have.
        holes: which of its pixels are holes: ``white`` (128 and more of 255) or ``black``.

    Returns:
        (1, 1, H, W) of 0 (hole) and 1 (known).

    Raises:
        ImageError: if it is of another size, or leaves nothing of the image.
    """
    photo = imageio.read_photo(path, imageio.MAX_PIXELS)
    height, width = photo.pixels.shape[:2]
    if (height, width) != tuple(size):
        raise ImageError(f"mask {path} is {width}x{height}, the image {size[1]}x{size[0]}: they must have one size")
    bright = imageio.to_tensor(photo).mean(1, keepdim=True) >= 0.5
    known = (~bright if holes == "white" else bright).float()
    if not bool(known.any()):
        raise ImageError(
            f"mask {path} leaves nothing of the image: {holes} marks holes (bird: holes says which colour does)"
        )
    return known


def _fingerprint(path: str) -> str:
    """Whether a file, or what lies in a folder, is still the same."""
    if os.path.isfile(path):
        return weights.sha256_of(path)
    digest = hashlib.sha256()
    for name in imageio.list_images(path, "folder") if os.path.isdir(path) else ():
        state = os.stat(os.path.join(path, name))
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _load_first(stage: FirstStageOptions, device: torch.device) -> Any:
    if stage.model.endswith((".yml", ".yaml")) and (read_options(stage.model).get("bird") or {}).get("first_stage"):
        raise UserError(f"option bird:first_stage:model: {stage.model} has a first stage itself; remove that")
    return load_model(stage.model, stage.weights, device=str(device))


_PATCHES = ("tile", "overlap", "tile_batch", "merge")


def merged(values: Mapping[str, Any], more: Mapping[str, Any]) -> Dict[str, Any]:
    """``bird:`` with what the command line says: keys of the patches, and of the settings."""
    result = dict(values)
    settings = dict(result.get("settings") or {})
    for key, value in more.items():
        if key in _PATCHES:
            result[key] = value
        elif key in ("sampler", "spacing"):
            raise UserError(
                f"{key} has no meaning for BIR-D: its own are --set transition=... levels=... (docs/bird.md)"
            )
        elif isinstance(value, Mapping) and isinstance(settings.get(key), Mapping):
            settings[key] = {**settings[key], **value}
        else:
            settings[key] = value
    if settings:
        result["settings"] = settings
    return result


def from_options(opt: Mapping[str, Any], device: torch.device) -> BlindRestorer:
    """A restorer of checked options.

    Raises:
        UserError: if the prior cannot be loaded, or something does not fit it.
    """
    options = BirdOptions(**opt["bird"])
    task = task_named(options.task)
    settings = preset(options.preset, options.task)
    blur = None
    if options.blur is not None:
        if not task.simplex:
            raise UserError(f"option bird:blur has no meaning for task {options.task}; remove it")
        blur, settings = known_kernel(options.blur), settings.known()
    prior = priors.load_prior(options.prior, device, options.network)
    if options.preset == "default" and task.gray and prior.generates:
        much = min(COLOUR_SIGMA, prior.sigma_max)
        settings = dataclasses.replace(settings, sigma_start=much, steps=COLOUR_STEPS)
    if options.solver == "bird":
        settings = changed(settings, options.settings, "bird:settings")
    if options.noise is not None and options.solver == "bird":
        if not hasattr(settings.data, "noise"):
            raise UserError(
                f"option bird:noise has no meaning for a data step of gradients ({options.preset}); remove it"
            )
        settings = changed(settings, {"data": {"noise": options.noise / 255}}, "bird:settings")
    if options.ablation is not None and options.solver == "bird":
        settings = ablation(settings, options.ablation)
    method = None
    if options.solver != "bird":
        method = _method(options, task, blur)
    else:
        bird.reverse_schedule(prior, settings)
    stage = options.first_stage
    if stage is not None and stage.use != "start" and (blur is not None or options.observations):
        what = "blur" if blur is not None else "observations"
        raise UserError(f"option bird:first_stage: a target is restored instead of all else: remove bird:{what}")
    first = _load_first(stage, device) if stage is not None and stage.model is not None else None
    about: Dict[str, Any] = {"model": opt["name"], "prior": options.prior}
    if prior.file is not None:
        about.update(weights=os.path.basename(prior.file), weights_sha256=weights.sha256_of(prior.file))
    notes = {f"prior {options.prior}: {name}": text for name, text in prior.notes.items()}
    return BlindRestorer(prior, task, settings, options, device, blur, method, first, opt["manual_seed"], about, notes)


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


def _method(options: BirdOptions, task: Task, blur: Optional[torch.Tensor]) -> zero_shot.Method:
    """Another solver, for a known operator.

    Raises:
        NotAvailable: if deepinv is not installed.
        UserError: if the operator is not known, or a key of its settings is not.
    """
    zero_shot.deepinv()
    if not task.simplex or (task.blind and blur is None):
        cure = "say which blur it is (bird:blur)" if task.simplex else "take the solver bird"
        raise UserError(
            f"option bird:solver: {options.solver} needs a known degradation, {options.task} has none: {cure}"
        )
    if options.preset != "default" or options.ablation is not None:
        raise UserError(f"option bird:solver: {options.solver} has no preset and no ablation; remove them")
    method = zero_shot.METHODS[options.solver]()
    if options.noise is not None:
        method = dataclasses.replace(method, noise=options.noise / 255)
    return changed(method, options.settings, "bird:settings")
