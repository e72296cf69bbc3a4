"""Consistency: whether the result, degraded again, gives the input."""

from __future__ import annotations

from typing import Any, Mapping, Optional, Sequence, Union

import numpy as np
import torch
import torch.nn.functional as F

from ucdir_plugin.metrics.images import described, rgb, same_size
from ucdir_plugin.registry import register
from ucdir_plugin.utils.degradations import Step, chain
from ucdir_plugin.utils.errors import NotAvailable, NotMeasurable, UserError

OWN = "own"
"""The degradation of the data set that is measured; :func:`ucdir_plugin.evaluation.measure.for_dataset` fills it in."""

Degradation = Union[str, Sequence[Mapping[str, Any]]]


def steps_of(degradation: Degradation, quality: Optional[int] = None) -> Optional[tuple[Step, ...]]:
    """What is applied to a result: the steps of a declared chain that are not random.

    Noise is left out, so that what is compared is the input's mean. Holes are left out too: pixels in them are not
    compared.

    Args:
        degradation: 'resize', 'jpeg' (of ``quality``), or a chain of :func:`ucdir_plugin.utils.degradations.chain`.

    Returns:
        the steps, or None for 'resize', which needs the input's size.

    Raises:
        NotAvailable: for 'own' without a data set, and for chains whose values differ from image to image.
        UserError: for what is no degradation.
    """
    if isinstance(degradation, str):
        if degradation == OWN:
            raise NotAvailable(
                "degradation 'own' needs a data set that degrades its images itself, as MixedDegradationDataset does:"
                " name the degradation"
            )
        if degradation not in ("resize", "jpeg"):
            raise UserError(
                f"Consistency: there is no degradation {degradation!r}; known: resize, jpeg, own, or a list as in"
                " datasets: degradations"
            )
        if degradation == "jpeg" and (not isinstance(quality, int) or not 1 <= quality <= 100):
            raise UserError(f"Consistency: degradation jpeg needs quality, 1 to 100, got {quality}")
        return None if degradation == "resize" else chain([{"type": "jpeg", "quality": quality}])
    if not isinstance(degradation, Sequence) or not all(isinstance(entry, Mapping) for entry in degradation):
        raise UserError(f"Consistency: degradation is a name or a list of mappings with type, got {degradation!r}")
    kept = []
    for step in chain(degradation, "degradation"):
        if step.kind.random:
            continue
        if step.probability != 1 or any(low != high for low, high in step.ranges.values()):
            raise NotAvailable(f"the values of {step.name} differ from image to image: give it fixed ones")
        kept.append(step)
    return tuple(kept)


def degrade(
    image: np.ndarray, height: int, width: int, degradation: Degradation, quality: Optional[int] = None
) -> np.ndarray:
    """An image degraded as its input was, without noise.

    Args:
        image: (H, W, 3) RGB uint8.
        height, width: of the input.
        degradation, quality: of :func:`steps_of`; 'resize' is bicubic with antialiasing (a = -0.5).

    Returns:
        (h, w, 3) RGB uint8, rounded and cut to 0 .. 255.

    Raises:
        NotAvailable, UserError: as :func:`steps_of`.
    """
    steps = steps_of(degradation, quality)
    if steps is None:
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        pixels = F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False, antialias=True)
        return pixels.round().clamp(0, 255)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    again = image[..., ::-1].astype(np.float32) / 255
    for step in steps:
        again = step.kind.function(again, **{key: value for key, (value, _) in step.ranges.items()})
    return (again * 255).round().clip(0, 255).astype(np.uint8)[..., ::-1]


def _has_holes(degradation: Degradation) -> bool:
    return not isinstance(degradation, str) and any(entry.get("type") == "holes" for entry in degradation)


def _described(steps: Sequence[Step]) -> str:
    texts = []
    for step in steps:
        values = ", ".join(f"{key} {value:g}" for key, (value, _) in step.ranges.items())
        texts.append(f"{step.name}{f' ({values})' if values else ''}")
    return ", ".join(texts) or "none"


def _protocol(degradation: Degradation, quality: Optional[int], crop_border: int) -> dict[str, Any]:
    steps = steps_of(degradation, quality)
    what = "bicubic resize with antialiasing" if steps is None else _described(steps)
    if degradation == "jpeg":
        what = f"jpeg, quality {quality}"
    return {
        "name": "Consistency",
        "colour": "RGB",
        "range": "0 to 255, squared",
        "crop_border": crop_border,
        "degradation": what,
        **({"pixels": "those not in holes"} if _has_holes(degradation) else {}),
        "reference": "input",
    }


@register("metric")
@described(_protocol)
def calculate_consistency(
    img: np.ndarray,
    lq: np.ndarray,
    degradation: Degradation = "resize",
    quality: Optional[int] = None,
    crop_border: int = 0,
    known: Optional[np.ndarray] = None,
    better: str = "lower",
) -> float:
    """Mean squared error, in squared gray levels, between the input and the result degraded in the same way.

    Args:
        img: the result, (H, W, 3) or (H, W) BGR uint8.
        lq: the degraded input, uint8, of the size that the degradation gives.
        degradation, quality: of :func:`degrade`. 'resize' to the same size changes nothing.
        crop_border: pixels of the input left out on each side.
        known: (h, w) of 0 in holes, which are left out; a degradation with holes needs it.
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        UserError: for images that are not uint8, or arguments that make no sense.
        NotMeasurable: for sizes that do not fit, or if nothing is left to compare.
    """
    image, wanted = rgb(img), rgb(lq)
    again = degrade(image, *wanted.shape[:2], degradation, quality)
    same_size(again, wanted)
    if known is None and _has_holes(degradation):
        raise NotMeasurable("where the holes are is not known")
    end = -crop_border or None
    difference = (again.astype(np.float64) - wanted)[crop_border:end, crop_border:end]
    if known is not None:
        difference = difference[np.asarray(known)[crop_border:end, crop_border:end] > 0]
    if not difference.size:
        raise NotMeasurable(f"crop_border {crop_border} leaves nothing")
    return float((difference**2).mean())
