"""Restoring images with any registered network: what ``ucdir_plugin.load_model`` and ``ucdir_plugin.restore`` do.

model = ucdir_plugin.load_model("options/demo_ucdir.yml", sampling={"sampler": "dpmpp_2m", "steps": 10})
result = ucdir_plugin.restore("photo.jpg", model)
result.image, result.initial, result.info
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple, Union

import cv2
import numpy as np
import torch
from torch import nn

import ucdir_plugin
from ucdir_plugin import conditions, imageio, memory, sampling, sharding, weights, zoo
from ucdir_plugin.archs import UCDIR
from ucdir_plugin.archs.padding import pad_for, size_multiple
from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.errors import UserError, at_least_one, did_you_mean
from ucdir_plugin.options import (
    SamplingOptions,
    ScheduleOptions,
    check_options,
    load_options,
    read_options,
    sampling_options,
)
from ucdir_plugin.registry import build_arch
from ucdir_plugin.sizing import check_network

if TYPE_CHECKING:
    from ucdir_plugin.blind import BlindRestorer, Learned

TILE = 1024
"""Longest side of a patch where nothing else is asked for (the paper's, section 4.1)."""

QUALITY_MARGIN = 5
"""So far a JPEG may be from those of the training without a word."""

_ONE_PASS = ("tile", "overlap", "tile_batch", "merge", "amp")
"""The sampling options that mean something for a network without diffusion."""


def check_samples(samples: int) -> None:
    """
    Raises:
        UserError: for less than one sample of an image, or more than files are made of.
    """
    at_least_one(samples=samples)
    if samples > 10_000:
        raise UserError(f"samples: {samples} files of each image are asked for; take at most 10000")


class Drawn(NamedTuple):
    """An image at the model: (1, 3, H * scale, W * scale) in [0, 1], on the model's device.

    Attributes:
        initial: gives the initial prediction, None without diffusion.
        samples: each is computed when it is asked for.
        learned: what BIR-D found besides with the last sample; None of others.
    """

    initial: Callable[[], Optional[torch.Tensor]]
    samples: Iterator[torch.Tensor]
    learned: Callable[[], Optional[Learned]] = lambda: None


@dataclass
class Restorer:
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
        dtype = sampling.amp_dtype(self.device, self.options.amp, "dtype")
        self._autocast = lambda: torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        if self.diffusion:
            sampling.check_tiles(self.net, self.options)
        elif self.options.tile is not None:
            self._grid(2 * self.options.tile, 2 * self.options.tile)

    @property
    def diffusion(self) -> bool:
        return isinstance(self.net, UCDIR)

    def _grid(self, height: int, width: int) -> Optional[tiling.Grid]:
        tile = self.options.tile
        if tile is None or max(height, width) <= tile:
            return None
        return tiling.Grid.aligned(height, width, tile, self.options.overlap, size_multiple(self.net))

    def plan(self, height: int, width: int) -> sampling.Plan:
        """What restoring an image of this size once will cost."""
        if self.diffusion:
            return sampling.plan(self.net, height, width, self.options)
        grid = self._grid(height, width)
        patches, ratio = (1, 1.0) if grid is None else (len(grid.tiles), grid.computed_ratio)
        return sampling.Plan(1, patches, ratio, round(ratio * height * width))

    @property
    def conditions(self) -> Tuple[conditions.Condition, ...]:
        """Auxiliary scalar conditions that the network declares."""
        return self.net.conditions if self.diffusion else ()

    def told(self, photo: imageio.Photo, condition: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
        """What the network is told of a photo: what the user says, and else the quality that a JPEG file shows.

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
    def _shown(self) -> Optional[conditions.Condition]:
        """The condition that a file tells, if there is one."""
        found = [c for c in self.conditions if c.name == "quality" and not c.classes and self.jpeg_quality is not None]
        return found[0] if found else None

    def check(self, samples: int, blend: float, condition: Optional[Mapping[str, Any]] = None) -> None:
        """
        Raises:
            UserError: for what this network has no use for, or values out of range. What a file may tell is not
                missing yet.
        """
        shown = {} if self._shown is None else {self._shown.name: self._shown.limits[0]}
        conditions.given(self.conditions, {**shown, **(condition or {})})
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
        progress: Optional[sampling.Progress] = None,
        callback: Optional[Callable[..., None]] = None,
    ) -> Drawn:
        """Restore one image.

        Args:
            lq: (1, 3, H, W) RGB in [0, 1]; it is used up (overwritten).
            key: names the image to the noise; with one key and seed the result is the same in every run.
            seed: default: the model's.
            samples: how many to draw.
            blend: lambda of initial + lambda * residual (paper, figure 1): 0 the initial prediction, 1 the sample.
            condition: name -> value of the conditions that the network declares.
            empty, progress: see :class:`ucdir_plugin.sampling.Conditioned`.
            callback: as of the samplers, on the scaled residual (``residual_scale``).

        Returns:
            prediction and samples, each computed when asked for.
        """
        self.check(samples, blend, condition)
        lq = lq.to(self.device)
        if not self.diffusion:
            return Drawn(lambda: None, (self._one_pass(lq, empty, progress).clamp_(0, 1) for _ in range(1)))
        told = conditions.encode(self.conditions, {name: [value] for name, value in (condition or {}).items()}, 1)
        told = None if told is None else told.to(self.device)
        images = sampling.Conditioned(
            self.net, lq.mul_(2).sub_(1), self.schedule, self.options, self._autocast, empty, progress, told
        )
        seed = self.seed if seed is None else seed

        def draw() -> Iterator[torch.Tensor]:
            for number in range(samples):
                noise = sampling.image_noise(seed, [key], self.device, number, empty)
                yield images.sample(noise, callback, blend).add_(1).div_(2).clamp_(0, 1)

        if self.net.predictor is None:
            return Drawn(lambda: None, draw())
        return Drawn(lambda: images.initial.add(1).div_(2).clamp_(0, 1), draw())

    @torch.no_grad()  # run's own does not reach what is computed later
    def _one_pass(
        self, lq: torch.Tensor, empty: Callable[..., torch.Tensor], progress: Optional[sampling.Progress]
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
        """Of sampling."""
        return self.options.steps

    @property
    def beside(self) -> List[str]:
        """Ends of the names of further files that an image gives."""
        return []

    @property
    def reads(self) -> List[str]:
        """Files besides the images that results must not be written over."""
        return []

    def like(self, photo: imageio.Photo) -> imageio.Photo:
        """The kind of photo that the result is: this one's."""
        return photo

    def doubt(self, photo: imageio.Photo) -> Optional[str]:
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
            return {**self.about, **{name: used[name] for name in _ONE_PASS}}
        seed = self.seed if seed is None else seed
        told = {"condition": dict(condition or {})} if self.conditions else {}
        return {**self.about, **used, "seed": seed, "samples": samples, "blend": blend, **told}


def versions() -> Dict[str, str]:
    return {"ucdir_plugin": ucdir_plugin.__version__, "torch": torch.__version__, "python": platform.python_version()}


def choose_device(name: str = "auto") -> torch.device:
    """
    Raises:
        UserError: if there is no such device.
    """
    if name == "auto":
        return _own_gpu(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        device = torch.device(name)
    except RuntimeError as err:
        raise UserError(f"device {name!r} is not known: take auto, cpu, cuda or cuda:N") from err
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} was never tried: take auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here: {torch.cuda.device_count()} CUDA devices are; take cpu")
    return _own_gpu(device)


def _own_gpu(device: torch.device) -> torch.device:
    """Of several processes on a machine each takes a GPU of its own, unless one was named."""
    share = sharding.own_share()
    if share.world == 1 or device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", share.local % torch.cuda.device_count())


def load_model(
    model: str,
    weights_file: Optional[str] = None,
    *,
    device: str = "auto",
    dtype: Optional[str] = None,
    sampling: Optional[Mapping[str, Any]] = None,
    bird: Optional[Mapping[str, Any]] = None,
) -> Union[Restorer, BlindRestorer]:
    """Build a network and load its weights; or load the prior of BIR-D.

    Args:
        model: ``bird``, a model of the package (``jpeg_small``, see ucdir_plugin/zoo), an option file (.yml) of any
            model with a ``network_g``, or a file (.safetensors) written by tools/convert_weights.py, which has its
            options in it.
        weights_file: weights for an option file: .pth or .safetensors. Default: what the option file trained below
            the working directory, else its ``path: pretrain_network_g``.
        device: auto, cpu, cuda or cuda:N.
        dtype: fp32, bf16 or fp16 (CUDA only) for the networks. Default: the model's ``amp``, else fp32.
        sampling: replaces keys of the option file's ``val: sampling``, e.g. ``{"sampler": "ddim", "steps": 10, "tile":
            512, "overlap": 32}``. ``tile: 0`` takes images whole; 1024 if neither says anything. For BIR-D they are
            keys of ``bird: settings``.
        bird: for BIR-D, replaces keys of the option file's ``bird``, e.g. ``{"task": "deblur", "prior": "ffdnet"}``.

    Raises:
        UserError: one line that names what is wrong.
    """
    chosen, notes = choose_device(device), {}
    found = _blind(model, weights_file, dtype, sampling or {}, bird or {})
    if found is not None:
        from ucdir_plugin import blind

        return blind.from_options(found, chosen)
    if model in zoo.names("model"):
        model = zoo.find(model)
    if model.endswith(".safetensors"):
        if weights_file is not None:
            raise UserError(f"{model} has its weights in it: leave out {weights_file}")
        opt, state, notes = weights.read_model(model)
        quality = weights.jpeg_quality_of(model)
        if opt["model_type"] == weights.PRIOR_MODEL:
            raise UserError(f"{model} is a prior, which restores nothing by itself: --model bird --prior {model}")
        weights_file, key = model, None
    else:
        if not model.endswith((".yml", ".yaml")):
            raise UserError(
                f"{model} is neither an option file (.yml) nor a model file (.safetensors), and none of the package's:"
                f" {did_you_mean(model, ['bird', *zoo.names('model')])}"
            )
        opt = load_options(model, is_train=False)
        quality = weights.jpeg_quality(opt)
        opt["root_path"] = os.getcwd()
        if weights_file is None:
            weights.find_weights(opt, [])
            weights_file = os.path.expanduser(opt["path"]["pretrain_network_g"])
            key = opt["path"].get("param_key_g", "params")
        else:
            key = "params_ema"
        state, key = weights.choose_state(weights.read_checkpoint(weights_file), weights_file, key)
    check_network(opt["network_g"], "network_g")
    net = build_arch(opt["network_g"], "network_g")
    weights.load_state_dict(net, state, weights_file)
    net = net.eval().requires_grad_(False).to(chosen)
    if chosen.type == "cpu":
        net = net.to(memory_format=torch.channels_last)  # what the layers would convert in each pass
    if opt.get("compile"):
        net.compile_networks()
    diffusion = isinstance(net, UCDIR)
    training = ScheduleOptions(**opt.get("diffusion", {})).schedule()
    about = {
        "model": opt["name"],
        "network": type(net).__name__,
        "weights": os.path.basename(weights_file),
        "weights_key": key,
        "weights_sha256": weights.sha256_of(weights_file),
        "options_sha256": _digest([opt["network_g"], opt.get("diffusion"), opt["scale"]]),
        # The overlap from which on patches equal the whole image; None: the network looks at all of it.
        "receptive_field": getattr(net.denoise_fn if diffusion else net, "receptive_field", None),
    }
    options = _sampling(opt, dict(sampling or {}), dtype, diffusion, training, type(net).__name__)
    return Restorer(
        net, training if diffusion else None, options, chosen, opt["scale"], opt["manual_seed"], about, notes, quality
    )


def _digest(options: Any) -> str:
    return hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()


def _blind(
    model: str, weights_file: Optional[str], dtype: Optional[str], sampling: Mapping[str, Any], bird: Mapping[str, Any]
) -> Optional[dict]:
    """The options of BIR-D, if it is what ``model`` names."""
    of_bird = model == "bird"
    if model.endswith((".yml", ".yaml")):
        of_bird = read_options(model).get("model_type") == "BIRDModel"
    if not of_bird:
        if bird:
            raise UserError(f"{next(iter(bird))} is for BIR-D, which {model} is not: take --model bird")
        return None
    if weights_file is not None or dtype is not None:
        what = "weights" if weights_file is not None else "dtype"
        raise UserError(
            f"{what} has no meaning for BIR-D: --prior names the network, bird:network says how it computes"
        )
    from ucdir_plugin import blind

    raw = {"name": model, "model_type": "BIRDModel"} if model == "bird" else read_options(model)
    base = raw.get("bird") or {}
    if not isinstance(base, Mapping) or not isinstance(base.get("settings") or {}, Mapping):
        what = "bird:settings" if isinstance(base, Mapping) else "bird"
        raise UserError(f"{os.path.basename(model)}: option {what}: a mapping is expected")
    if bird.get("task", base.get("task")) != base.get("task"):
        raw.pop("scale", None)
    raw["bird"] = blind.merged({**base, **bird}, sampling)
    return check_options(raw, is_train=False, where=os.path.basename(model))


def _sampling(
    opt: dict, given: Dict[str, Any], dtype: Optional[str], diffusion: bool, training: NoiseSchedule, name: str
) -> SamplingOptions:
    if dtype is not None:
        if dtype not in ("fp32", "bf16", "fp16"):
            raise UserError(f"dtype {dtype!r} is not known: take fp32, bf16 or fp16")
        given["amp"] = None if dtype == "fp32" else dtype
    if not diffusion:
        for key in given:
            if key not in _ONE_PASS and key in SamplingOptions.model_fields:
                raise UserError(f"{key} has no meaning for {name}, which restores in one pass")
    base = dict(opt["val"].get("sampling", {}))
    if base.get("tile") is None:
        base["tile"] = TILE
    if given.get("tile", 1) == 0:
        given["tile"] = None
    if "sampler" in given and given["sampler"] != base.get("sampler"):
        base.pop("eta", None)  # the option file's is for its own sampler
    return sampling_options({**base, **given}, training)


@dataclass
class Restored:
    """What :func:`restore` returns. Images are float32 RGB in [0, 1], of the input's shape (times the scale).

    Attributes:
        image: the result; the mean of the samples if there are several.
        initial: the initial prediction; None for a network without diffusion.
        samples: each sample; one in all for ``samples=1``.
        learned: of BIR-D: kernel, mask and how they came about (:class:`ucdir_plugin.blind.Learned`); else None.
        spread: (H, W) standard deviation of the samples, root mean square over the channels; None for one sample.
        info: settings, versions, seconds, network passes.
    """

    image: np.ndarray
    initial: Optional[np.ndarray]
    samples: List[np.ndarray]
    spread: Optional[np.ndarray]
    info: Dict[str, Any]
    learned: Optional[Learned] = None


class Moments:
    """Mean and standard deviation of tensors that are seen one after the other (Welford)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Optional[torch.Tensor] = None
        self._squares: Optional[torch.Tensor] = None

    def add(self, x: torch.Tensor) -> None:
        self.count += 1
        if self.mean is None:
            self.mean, self._squares = x.clone(), torch.zeros_like(x)
            return
        delta = x - self.mean
        self.mean.add_(delta, alpha=1 / self.count)
        self._squares.addcmul_(delta, x - self.mean)

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviation (n - 1), root mean square over the channels: (B, 1, H, W)."""
        return (self._squares.mean(1, keepdim=True) / max(self.count - 1, 1)).sqrt_()


def _photo_of(array: np.ndarray) -> imageio.Photo:
    """
    Raises:
        UserError: if it is no image.
    """
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or not array.size:
        raise UserError(f"an array of shape {array.shape} is no image: (H, W, 3) RGB or (H, W) gray is expected")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise UserError(f"a floating-point image is in [0, 1], this one in [{low:g}, {high:g}]")
        array = array.astype(np.float32)
    elif array.dtype not in (np.uint8, np.uint16):
        raise UserError(f"an image of type {array.dtype} has no known range: take uint8, uint16, or float in [0, 1]")
    gray = array.ndim == 2
    return imageio.Photo(np.repeat(array[..., None], 3, 2) if gray else array, gray=gray)


def _to_array(image: torch.Tensor, gray: bool) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) in [0, 1], or (H, W) luma (BT.601)."""
    array = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    return cv2.cvtColor(array, cv2.COLOR_RGB2GRAY) if gray else array


def restore(
    image: Union[str, os.PathLike, np.ndarray],
    model: Union[Restorer, BlindRestorer],
    *,
    seed: Optional[int] = None,
    samples: int = 1,
    blend: float = 1.0,
    condition: Optional[Mapping[str, Any]] = None,
    key: Optional[str] = None,
    max_pixels: int = imageio.MAX_PIXELS,
) -> Restored:
    """Restore one image.

    Args:
        image: a file, or an array (H, W, 3) or (H, W): RGB or gray, uint8, uint16, or floating point in [0, 1].
        model: of :func:`load_model`.
        seed, samples, blend, condition: see :meth:`Restorer.run`.
        key: names the image to the noise. Default: the file's name; empty for an array.
        max_pixels: a file with more is refused.

    Raises:
        UserError: one line that names what is wrong with the image or an argument.
    """
    if isinstance(image, np.ndarray):
        photo = _photo_of(image)
    else:
        photo = imageio.read_photo(os.fspath(image), max_pixels)
        key = os.path.basename(image) if key is None else key
    doubt = None if isinstance(image, np.ndarray) else model.doubt(photo)
    told = model.told(photo, condition)
    photo = model.like(photo)
    started = time.perf_counter()
    memory.reset_peak(model.device)
    height, width = photo.pixels.shape[:2]
    drawn = model.run(imageio.to_tensor(photo), key or "", seed=seed, samples=samples, blend=blend, condition=told)
    moments, found = Moments(), []
    for result in drawn.samples:
        moments.add(result)
        found.append(_to_array(result[0], photo.gray))
    info = {
        "settings": model.record_settings(seed, samples, blend, condition),
        **cost(model, height, width, samples, blend),
        "seconds": time.perf_counter() - started,
        "peak_memory": memory.peak(model.device),
        "device": str(model.device),
        "versions": versions(),
        **({"condition": told} if told else {}),
        **({"note": doubt} if doubt else {}),
    }
    initial = drawn.initial()
    return Restored(
        _to_array(moments.mean[0], photo.gray),
        None if initial is None else _to_array(initial[0], photo.gray),
        found,
        moments.spread[0, 0].cpu().numpy() if samples > 1 else None,
        info,
        drawn.learned(),
    )


def cost(model: Union[Restorer, BlindRestorer], height: int, width: int, samples: int, blend: float) -> Dict[str, Any]:
    """Network passes over the image and its patches, for the record."""
    plan = model.plan(height, width)
    nfe = plan.nfe * samples if blend or not model.diffusion else 0
    return {"nfe": nfe, "patches": plan.patches, "computed_ratio": round(plan.computed_ratio, 4)}
