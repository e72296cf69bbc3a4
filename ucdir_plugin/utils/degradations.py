"""Degradations of images as functions, and chains of them declared in options.

Images are (H, W, 3) float32 BGR in [0, 1] of any size, and all but ``block_mean`` keep it. What is random is drawn from
a generator that the caller seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import cv2
import numpy as np

from ucdir_plugin.utils.errors import UserError, did_you_mean


def convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """K * x for an odd-sized kernel (h, w), the image mirrored beyond its border."""
    return cv2.filter2D(image, -1, kernel[::-1, ::-1], borderType=cv2.BORDER_REFLECT_101)


def gaussian_kernel(sigma: float) -> np.ndarray:
    """Normal distribution of ``sigma`` pixels, cut off beyond 3 sigma, of sum 1."""
    radius = math.ceil(3 * sigma)
    line = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(sigma, 1e-6)) ** 2)
    kernel = np.outer(line, line)
    return (kernel / kernel.sum()).astype(np.float32)


def motion_kernel(length: float, angle: float) -> np.ndarray:
    """A straight line of ``length`` pixels at ``angle`` degrees counter-clockwise from the x axis, of sum 1."""
    if length <= 1:
        return np.ones((1, 1), np.float32)
    radius = math.ceil(length / 2)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = np.abs(x * cosine - y * sine), np.abs(x * sine + y * cosine)
    kernel = np.clip((length + 1) / 2 - along, 0, 1) * np.clip(1 - across, 0, 1)
    return (kernel / kernel.sum()).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of ``sigma`` pixels; 0 changes nothing."""
    return convolve(image, gaussian_kernel(sigma))


def motion_blur(image: np.ndarray, length: float, angle: float) -> np.ndarray:
    """Motion along a straight line, see :func:`motion_kernel`; length 1 changes nothing."""
    return convolve(image, motion_kernel(length, angle))


def noise(image: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """White Gaussian noise of ``sigma``, of 255 as in the literature; what leaves [0, 1] is cut."""
    drawn = rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image + np.float32(sigma / 255) * drawn, 0, 1)


def resize(image: np.ndarray, scale: float) -> np.ndarray:
    """Down by ``scale`` (mean over areas), and up to the old size again (bicubic, cut to [0, 1]); 1 changes nothing."""
    height, width = image.shape[:2]
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    if size == (width, height):
        return image
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.clip(cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC), 0, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    """Compress and decompress with OpenCV's encoder: (H, W, 3) BGR in [0, 1] -> the same, quality 1 .. 100."""
    encoded = cv2.imencode(".jpg", (image * 255).round().astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return cv2.imdecode(encoded, cv2.IMREAD_COLOR).astype(np.float32) / 255.0


def gray(image: np.ndarray) -> np.ndarray:
    """Luma (BT.601) in all three channels."""
    return np.repeat(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None], 3, 2)


def channel_mean(image: np.ndarray) -> np.ndarray:
    """The mean of the three channels in all of them, which BIR-D's colorization undoes."""
    return np.repeat(image.mean(2, keepdims=True), 3, 2)


def block_mean(image: np.ndarray, factor: int) -> np.ndarray:
    """Means over blocks: (H, W, 3) -> (H / factor, W / factor, 3); what fills no block is left out."""
    height, width = (side // factor * factor for side in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1)
    return blocks.mean((1, 3)).astype(np.float32)


def exposure(image: np.ndarray, gain: float) -> np.ndarray:
    """Brighter or darker by a factor; what leaves [0, 1] is cut."""
    return np.clip(image * np.float32(gain), 0, 1)


def holes(image: np.ndarray, share: float, size: int, rng: np.random.Generator) -> np.ndarray:
    """Squares of ``size`` pixels at random places become NaN, until they are ``share`` of the image."""
    height, width = image.shape[:2]
    hidden = np.zeros((height, width), bool)
    missing = round(share * height * width)
    while missing > 0:
        side = min(size, max(1, math.isqrt(missing)))
        top, left = (int(rng.integers(0, max(1, extent - side + 1))) for extent in (height, width))
        square = hidden[top : top + side, left : left + side]
        missing -= square.size - int(square.sum())
        square[:] = True
    return np.where(hidden[..., None], np.float32(np.nan), image)


def srgb_to_linear(image: np.ndarray) -> np.ndarray:
    """Inverse of sRGB's transfer function (IEC 61966-2-1), [0, 1] -> [0, 1]."""
    return np.where(image <= 0.04045, image / 12.92, ((np.maximum(image, 0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(image: np.ndarray) -> np.ndarray:
    """sRGB's transfer function, [0, 1] -> [0, 1]."""
    return np.where(image <= 0.0031308, image * 12.92, 1.055 * np.maximum(image, 0.0031308) ** (1 / 2.4) - 0.055)


def low_light(
    image: np.ndarray, ratio: float, electrons: float, read: float, row: float, bits: int, rng: np.random.Generator
) -> np.ndarray:
    """An exposure ``ratio`` times too short, amplified by ``ratio``: the noise of a sensor on linearised sRGB.

    A pixel of linear value v collects Poisson(v * electrons / ratio) electrons; read noise is added to each value, row
    noise is one number for each row and channel; 2 ** bits levels span ``electrons``. Values below black stay until
    after the amplification, as in raw files, whose black level is above 0. After Wei et al., "A physics-based noise
    formation model for extreme low-light raw denoising" (CVPR 2020), with normal read noise and no colour filter.

    Args:
        ratio: exposure ratio of the true image to the degraded one, 1 or more.
        electrons: that a white pixel collects in the true exposure at this gain; higher ISO: fewer.
        read, row: standard deviations, in electrons.
        bits: of the converter.
    """
    collected = rng.poisson(srgb_to_linear(image.astype(np.float64)) * electrons / ratio).astype(np.float64)
    collected += read * rng.standard_normal(image.shape)
    collected += row * rng.standard_normal((len(image), 1, image.shape[2]))
    step = electrons / 2**bits
    recorded = np.minimum(np.round(collected / step) * step, electrons)
    return linear_to_srgb(np.clip(recorded * ratio / electrons, 0, 1)).astype(np.float32)


@dataclass(frozen=True)
class Kind:
    """A degradation that a chain may have.

    Attributes:
        function: called as ``function(image, **values)``, with ``rng`` if it is ``random``.
        limits: of each parameter, smallest and largest; a whole number where both are int.
    """

    function: Callable[..., np.ndarray]
    limits: Mapping[str, tuple[float, float]]
    random: bool = False


KINDS = {
    "blur": Kind(blur, {"sigma": (0.0, 100.0)}),
    "motion_blur": Kind(motion_blur, {"length": (1.0, 500.0), "angle": (0.0, 180.0)}),
    "noise": Kind(noise, {"sigma": (0.0, 255.0)}, random=True),
    "resize": Kind(resize, {"scale": (0.01, 1.0)}),
    "jpeg": Kind(jpeg, {"quality": (1, 100)}),
    "gray": Kind(gray, {}),
    "channel_mean": Kind(channel_mean, {}),
    "exposure": Kind(exposure, {"gain": (0.0, 1000.0)}),
    "block_mean": Kind(block_mean, {"factor": (1, 64)}),
    "holes": Kind(holes, {"share": (0.0, 0.95), "size": (1, 10000)}, random=True),
}


@dataclass(frozen=True)
class Step:
    """A degradation of a chain and the ranges that its values are drawn from. ``name``: its type; of a second blur2."""

    name: str
    kind: Kind
    ranges: Mapping[str, tuple[float, float]]
    probability: float = 1.0


def value_range(value: Any, limits: tuple[float, float], where: str) -> tuple[float, float]:
    """A number, or [low, high] to draw from, as (low, high).

    Raises:
        UserError: if it is neither, or not within ``limits``.
    """
    pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
    whole = all(isinstance(limit, int) for limit in limits)
    kinds = (int,) if whole else (int, float)
    good = len(pair) == 2 and all(isinstance(v, kinds) and not isinstance(v, bool) for v in pair)
    if not good or not limits[0] <= pair[0] <= pair[1] <= limits[1]:
        what = "a whole number" if whole else "a number"
        raise UserError(
            f"option {where}: {what} or [low, high] within {limits[0]:g} .. {limits[1]:g} is expected, got {value!r}"
        )
    return pair[0], pair[1]


def draw(bounds: tuple[float, float], rng: np.random.Generator) -> float:
    """Uniformly from (low, high), ends included; whole numbers if both are."""
    if all(isinstance(bound, int) for bound in bounds):
        return int(rng.integers(bounds[0], bounds[1] + 1))
    return float(rng.uniform(*bounds))


def chain(declared: Sequence[Mapping[str, Any]], where: str = "degradations") -> tuple[Step, ...]:
    """Degradations in their order, as options declare them: ``[{type: blur, sigma: [0.5, 3], probability: 0.8}, ...]``.

    Raises:
        UserError: naming the first fault.
    """
    steps: list[Step] = []
    for number, entry in enumerate(declared):
        here = f"{where}:{number}"
        kind = entry.get("type")
        if not isinstance(kind, str) or kind not in KINDS:
            raise UserError(f"option {here}:type: there is no degradation {kind!r}; {did_you_mean(str(kind), KINDS)}")
        known = KINDS[kind]
        for key in entry:
            if key not in (*known.limits, "type", "probability"):
                raise UserError(f"unknown option {here}:{key}; {did_you_mean(key, [*known.limits, 'probability'])}")
        for key in known.limits:
            if key not in entry:
                raise UserError(f"option {here}:{key} is missing ({kind} needs it)")
        probability = value_range(entry.get("probability", 1.0), (0.0, 1.0), f"{here}:probability")
        if probability[0] != probability[1]:
            raise UserError(f"option {here}:probability: one number is expected, got {entry['probability']!r}")
        ranges = {
            key: _of_type(value_range(entry[key], limits, f"{here}:{key}"), limits)
            for key, limits in known.limits.items()
        }
        if any(step.kind is KINDS["holes"] for step in steps):
            raise UserError(f"option {here}: holes must be the last: what they hide cannot be degraded further")
        if known is KINDS["block_mean"] and (ranges["factor"][0] != ranges["factor"][1] or probability[0] != 1):
            raise UserError(f"option {here}: a block_mean has one factor and is always applied: sizes would differ")
        before = sum(step.kind is known for step in steps)
        steps.append(Step(f"{kind}{before + 1}" if before else kind, known, ranges, probability[0]))
    return tuple(steps)


def _of_type(bounds: tuple[float, float], like: tuple[float, float]) -> tuple[float, float]:
    return type(like[0])(bounds[0]), type(like[0])(bounds[1])


def shrinks(steps: Sequence[Step]) -> int:
    """By what a chain makes images smaller."""
    return math.prod(int(step.ranges["factor"][0]) for step in steps if step.kind is KINDS["block_mean"])


def degrade(steps: Sequence[Step], image: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict[str, float]]:
    """Apply a chain.

    Returns:
        the degraded image, NaN where it was not observed (``holes``); the values drawn, by names such as
        ``noise_sigma``, NaN of a degradation left out.
    """
    values: dict[str, float] = {}
    for step in steps:
        applied = rng.random() < step.probability
        drawn = {key: draw(bounds, rng) for key, bounds in step.ranges.items()}
        if applied:
            extra = {"rng": rng} if step.kind.random else {}
            image = step.kind.function(image, **drawn, **extra)
        values.update((f"{step.name}_{key}", value if applied else math.nan) for key, value in drawn.items())
    return image, values
