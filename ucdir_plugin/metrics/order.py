"""LOE (lightness order error): how far a result changes which of two pixels is lighter."""

from __future__ import annotations

from typing import Any

import numpy as np

from ucdir_plugin.metrics.images import described, same_size
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import NotMeasurable, UserError


def lightness_order_error(lightness: np.ndarray, reference: np.ndarray) -> float:
    """Mean over pixels x of the number of pixels y whose order U(x, y) = [L(x) >= L(y)] differs between two images.

    Args:
        lightness, reference: numbers of one shape, of any type; N of them.

    Returns:
        0 (same order, ties included) to N - 1; exact, in O(N^2) time and O(N) memory.
    """
    # Ranks have the same order and are quick to compare.
    a, b = (np.unique(values, return_inverse=True)[1].ravel() for values in (lightness, reference))
    if a.size <= 2**15:
        a, b = a.astype(np.int16), b.astype(np.int16)
    rows = max(1, 2**20 // a.size)
    differing = sum(
        np.count_nonzero((a[i : i + rows, None] >= a) != (b[i : i + rows, None] >= b)) for i in range(0, a.size, rows)
    )
    return differing / a.size


def _check(crop_border: int, short_side: int) -> None:
    if short_side < 1 or crop_border < 0:
        raise UserError(f"LOE: short_side {short_side} must be at least 1, crop_border {crop_border} at least 0")


def _protocol(crop_border: int, short_side: int) -> dict[str, Any]:
    _check(crop_border, short_side)
    return {
        "name": "LOE",
        "colour": "max(R, G, B)",
        "range": "order only",
        "crop_border": crop_border,
        "sampling": f"every n-th pixel, shorter side at least {short_side}",
        "reference": "input",
    }


@register("metric")
@described(_protocol)
def calculate_loe(
    img: np.ndarray, lq: np.ndarray, crop_border: int = 0, short_side: int = 50, better: str = "lower"
) -> float:
    """Lightness order error (Wang et al., IEEE TIP 2013) against the degraded input.

    LOE = 1/N sum_x sum_y [U(x, y) != U'(x, y)], U(x, y) = [L(x) >= L(y)], L = max(R, G, B), where both images are
    first thinned to every n-th row and column, n = max(1, shorter side // ``short_side``), without interpolation.

    Args:
        img: the result, (H, W, C) or (H, W), any type and range (only the order of values counts).
        lq: the degraded input, of the same size.
        crop_border: pixels left out on each side.
        short_side: least number of pixels kept on the shorter side.
        better: for BasicSR, which hands it over; changes nothing.

    Returns:
        0 to N - 1 with N the number of pixels kept; it grows with N, so compare images of one shape.

    Raises:
        UserError: for ``short_side`` below 1.
        NotMeasurable: for images of two sizes, or if ``crop_border`` leaves nothing.
    """
    same_size(img, lq)
    _check(crop_border, short_side)
    end = -crop_border or None
    pair = [np.asarray(i)[crop_border:end, crop_border:end] for i in (img, lq)]
    if not pair[0].size:
        raise NotMeasurable(f"crop_border {crop_border} leaves nothing")
    step = max(1, min(pair[0].shape[:2]) // short_side)
    lightness = [(i.max(2) if i.ndim == 3 else i)[::step, ::step] for i in pair]
    return lightness_order_error(*lightness)
