"""One image in, a restored one and its record out."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Optional, Union

import cv2
import numpy as np
import torch

from ucdir_plugin.restoration.network import Restorer
from ucdir_plugin.utils import image_reading, memory
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.versions import versions

if TYPE_CHECKING:
    from ucdir_plugin.restoration.bird import BlindRestorer
    from ucdir_plugin.restoration.learned import Learned


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


def _photo_of(array: np.ndarray) -> image_reading.Photo:
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
    return image_reading.Photo(np.repeat(array[..., None], 3, 2) if gray else array, gray=gray)


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
    if isinstance(image, np.ndarray):
        photo = _photo_of(image)
    else:
        photo = image_reading.read_photo(os.fspath(image), max_pixels)
        key = os.path.basename(image) if key is None else key
    doubt = None if isinstance(image, np.ndarray) else model.doubt(photo)
    told = model.told(photo, condition)
    photo = model.like(photo)
    started = time.perf_counter()
    memory.reset_peak(model.device)
    height, width = photo.pixels.shape[:2]
    drawn = model.run(
        image_reading.to_tensor(photo), key or "", seed=seed, samples=samples, blend=blend, condition=told
    )
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
