"""Confidence intervals of means and of paired differences."""

from __future__ import annotations

import functools
from typing import Any, Mapping, Optional, Sequence

import numpy as np
from scipy.stats import bootstrap, norm, t

from ucdir_plugin.metrics.distances import jackknife_error

CONFIDENCE = 0.95
"""Of all intervals."""

ENOUGH_IMAGES = 5
"""For an interval; resamples of fewer say nothing about how far the mean can be off."""


def interval(values: Sequence[Optional[float]]) -> Optional[tuple[float, float]]:
    """95% interval of the mean by the bootstrap over images (5000 resamples, seed 0).

    Percentiles, farther out for few images (the expanded percentile interval of Hesterberg, The American Statistician
    2015): plain ones are too narrow then.

    Args:
        values: one per image; None, where not measured, is left out.

    Returns:
        (low, high); None for fewer than :data:`ENOUGH_IMAGES` values, or where one is infinite.
    """
    return _interval(tuple(v for v in values if v is not None))


def paired(first: Sequence[float], second: Sequence[float]) -> Optional[dict[str, Any]]:
    """Differences second - first of one image each: ``mean``, its ``interval``, ``images``; None if none is finite."""
    pairs = [b - a for a, b in zip(first, second) if np.isfinite([a, b]).all()]
    if not pairs:
        return None
    return {"mean": float(np.mean(pairs)), "interval": interval(pairs), "images": len(pairs)}


def paired_sets(
    values: Sequence[float], first: Mapping[str, Optional[float]], second: Mapping[str, Optional[float]]
) -> dict[str, Any]:
    """:func:`paired` of what a set of images has one value of (FID, KID), by the jackknife over images.

    Args:
        values: of the whole set, in ``first`` and ``second``.
        first, second: image -> value of the set without it.

    Returns:
        ``mean``: the difference second - first; its ``interval`` (Student's t), None for fewer than
        :data:`ENOUGH_IMAGES` images or where a value is not known; ``images``.
    """
    whole = values[1] - values[0]
    if first.keys() != second.keys() or None in (*first.values(), *second.values()) or len(first) < ENOUGH_IMAGES:
        return {"mean": whole, "interval": None, "images": len(first)}
    error = jackknife_error([second[key] - first[key] for key in first])
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(first) - 1)) * error
    return {"mean": whole, "interval": (whole - reach, whole + reach), "images": len(first)}


@functools.lru_cache(maxsize=1024)  # tables of each kind, and the page, ask for the same
def _interval(values: tuple[float, ...]) -> Optional[tuple[float, float]]:
    measured = np.array(values, dtype=float)
    if len(measured) < ENOUGH_IMAGES or not np.isfinite(measured).all():
        return None
    n = len(measured)
    tail = norm.cdf(np.sqrt(n / (n - 1)) * t.ppf((1 - CONFIDENCE) / 2, n - 1))
    found = bootstrap(
        (measured,),
        np.mean,
        n_resamples=5000,
        confidence_level=1 - 2 * tail,
        method="percentile",
        batch=max(1, 2**22 // n),
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)
