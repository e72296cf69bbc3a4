"""One image in, a restored one and its record out."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Union

import cv2
import numpy as np
import torch

from ucdir_plugin.restoration.base import Drawn, Progress, Restorer
from ucdir_plugin.restoration.learned import Learned
from ucdir_plugin.utils import image_reading, memory
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import Photo
from ucdir_plugin.utils.versions import versions


@dataclass
class Restored:
    """What :func:`restore` returns. Images are float32 RGB in [0, 1], of the input's shape (times the scale).

    Attributes:
        image: the result; the mean of the samples if there are several.
        initial: the initial prediction; None for a network without diffusion.
        samples: each sample; one in all for ``samples=1``.
        learned: of BIR-D: kernel, mask, history (:class:`ucdir_plugin.restoration.learned.Learned`); else None.
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
        """Take one more tensor in."""
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


def _photo_of(array: np.ndarray) -> Photo:
    """Make a photo of an array.

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
    return Photo(np.repeat(array[..., None], 3, 2) if gray else array, gray=gray)


def _to_array(image: torch.Tensor, gray: bool) -> np.ndarray:
    """(3, H, W) in [0, 1] -> (H, W, 3) in [0, 1], or (H, W) luma (BT.601)."""
    array = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    return cv2.cvtColor(array, cv2.COLOR_RGB2GRAY) if gray else array


def restore(
    image: Union[str, os.PathLike, np.ndarray],
    model: Restorer,
    *,
    seed: Optional[int] = None,
    samples: int = 1,
    blend: float = 1.0,
    condition: Optional[Mapping[str, Any]] = None,
    key: Optional[str] = None,
    max_pixels: int = image_reading.MAX_PIXELS,
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
    is_array = isinstance(image, np.ndarray)
    if key is None:
        key = "" if is_array else os.path.basename(image)
    found: List[np.ndarray] = []

    def read() -> Photo:
        return _photo_of(image) if is_array else image_reading.read_photo(os.fspath(image), max_pixels)

    def keep(photo: Photo, _number: int, sample: torch.Tensor, _learned: Optional[Learned]) -> None:
        found.append(_to_array(sample[0], photo.gray))

    done = restore_photo(
        model, read, key, keep, seed=seed, samples=samples, blend=blend, condition=condition, from_file=not is_array
    )
    gray, initial, moments = done.photo.gray, done.drawn.initial(), done.moments
    return Restored(
        found[0].copy() if moments is None else _to_array(moments.mean[0], gray),
        None if initial is None else _to_array(initial[0], gray),
        found,
        None if moments is None else moments.spread[0, 0].cpu().numpy(),
        {"settings": model.record_settings(seed, samples, blend, condition), **done.record},
        done.drawn.learned(),
    )


class Done(NamedTuple):
    """An image that :func:`restore_photo` has restored.

    Attributes:
        photo: kind and size of the result; its pixels are gone.
        drawn: what the model gave.
        moments: of several samples; None for one.
        record: conditions, warning, cost, seconds, memory, device, versions.
    """

    photo: Photo
    drawn: Drawn
    moments: Optional[Moments]
    record: Dict[str, Any]


def restore_photo(
    model: Restorer,
    read: Callable[[], Photo],
    key: str,
    keep: Callable[[Photo, int, torch.Tensor, Optional[Learned]], None],
    *,
    seed: Optional[int] = None,
    samples: int = 1,
    blend: float = 1.0,
    condition: Optional[Mapping[str, Any]] = None,
    from_file: bool = True,
    ready: Callable[[Photo, Optional[str]], None] = lambda photo, warning: None,
    empty: Callable[..., torch.Tensor] = torch.empty,
    progress: Optional[Progress] = None,
    callback: Optional[Callable[..., None]] = None,
) -> Done:
    """Read an image, restore it, hand over its samples and record how it was made: the one way to a result.

    Args:
        read: gives the photo; called here, so that its pixels can be freed before the network runs.
        key, seed, samples, blend, condition, empty, progress, callback: see :meth:`Restorer.run`.
        keep: takes each sample, (1, 3, H, W) in [0, 1], with its number from 1 on, and what BIR-D learned with it.
        from_file: the photo was a file, which may be of another kind than those of the training.
        ready: called before the network runs, with the photo as it was read and the warning about its kind.

    Raises:
        UserError: one line that names what is wrong with the image or an argument.
    """
    started = time.perf_counter()
    memory.reset_peak(model.device)
    photo = read()
    warning = model.warning(photo) if from_file else None
    ready(photo, warning)
    conditions = model.condition_values(photo, condition)
    photo = model.output_photo(photo)
    height, width = photo.pixels.shape[:2]
    lq = image_reading.to_tensor(photo, empty)
    # Of the pixels only shape and type are still needed.
    photo = replace(photo, pixels=np.broadcast_to(photo.pixels[:1, :1].copy(), photo.pixels.shape))
    drawn = model.run(
        lq,
        key,
        seed=seed,
        samples=samples,
        blend=blend,
        condition=conditions,
        empty=empty,
        progress=progress,
        callback=callback,
    )
    moments = Moments() if samples > 1 else None
    for number, sample in enumerate(drawn.samples, 1):
        if moments is not None:
            moments.add(sample)
        keep(photo, number, sample, drawn.learned())
    record = {
        **({"condition": conditions} if conditions else {}),
        **({"note": warning} if warning else {}),
        **cost(model, height, width, samples, blend),
        "seconds": time.perf_counter() - started,
        "peak_memory": memory.peak(model.device),
        "device": str(model.device),
        "versions": versions(),
    }
    return Done(photo, drawn, moments, record)


def cost(model: Restorer, height: int, width: int, samples: int, blend: float) -> Dict[str, Any]:
    """Network passes over the image and its patches, for the record."""
    plan = model.plan(height, width)
    nfe = plan.nfe * samples if blend or not model.diffusion else 0
    return {"nfe": nfe, "patches": plan.patches, "computed_ratio": round(plan.computed_ratio, 4)}
