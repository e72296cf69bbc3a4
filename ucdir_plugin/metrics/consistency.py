"""Consistency: whether the result, degraded again, gives the input."""

from __future__ import annotations

from typing import Any, Optional

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from ucdir_plugin.metrics.images import described, rgb, same_size
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import NotMeasurable, UserError


def _check(degradation: str, quality: Optional[int]) -> None:
    if degradation not in ("resize", "jpeg"):
        raise UserError(f"Consistency: there is no degradation {degradation!r}; known: resize, jpeg")
    if degradation == "jpeg" and (quality is None or not 1 <= quality <= 100):
        raise UserError(f"Consistency: degradation jpeg needs quality, 1 to 100, got {quality}")


def degrade(image: np.ndarray, height: int, width: int, degradation: str, quality: Optional[int]) -> np.ndarray:
    """An image degraded as its input was.

    Args:
        image: (H, W, 3) RGB uint8.
        height, width: of the input.
        degradation: 'resize': bicubic with antialiasing (a = -0.5), rounded and cut to 0..255; 'jpeg': OpenCV's, of
            ``quality`` (1 to 100) in RGB order as in :class:`JPEGDataset`.

    Raises:
        UserError: for an unknown degradation or a missing quality.
    """
    _check(degradation, quality)
    if degradation == "resize":
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return pixels.round().clamp(0, 255)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    coded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1]


def _protocol(degradation: str, quality: Optional[int], crop_border: int) -> dict[str, Any]:
    _check(degradation, quality)
    what = {"resize": "bicubic resize with antialiasing"}.get(degradation, f"{degradation}, quality {quality}")
    return {
        "name": "Consistency",
        "colour": "RGB",
        "range": "0 to 255, squared",
        "crop_border": crop_border,
        "degradation": what,
        "reference": "input",
    }


@register("metric")
@described(_protocol)
def calculate_consistency(
    img: np.ndarray,
    lq: np.ndarray,
    degradation: str = "resize",
    quality: Optional[int] = None,
    crop_border: int = 0,
    better: str = "lower",
) -> float:
    """Mean squared error, in squared gray levels, between the input and the result degraded in the same way.

    Args:
        img: the result, (H, W, 3) or (H, W) BGR uint8.
        lq: the degraded input, uint8; another size only with ``degradation: resize``.
        degradation, quality: of :func:`degrade`. 'resize' to the same size changes nothing.
        crop_border: pixels of the input left out on each side.
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        UserError: for images that are not uint8, or arguments that make no sense.
        NotMeasurable: for sizes that do not fit, or if ``crop_border`` leaves nothing.
    """
    image, wanted = rgb(img), rgb(lq)
    if degradation != "resize":
        same_size(image, wanted)
    again = degrade(image, *wanted.shape[:2], degradation, quality)
    end = -crop_border or None
    difference = (again.astype(np.float64) - wanted)[crop_border:end, crop_border:end]
    if not difference.size:
        raise NotMeasurable(f"crop_border {crop_border} leaves nothing")
    return float((difference**2).mean())
