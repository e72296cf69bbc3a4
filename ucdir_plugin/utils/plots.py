"""Scales and labels that figures share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scaled(axis: Axes, values: np.ndarray) -> None:
    """Logarithmic over more than 20 times; of what is constant no noise of rounding."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    if finite.min() > 0 and finite.max() > 20 * finite.min():
        axis.set_yscale("log")
    elif np.ptp(finite) < 1e-3 * np.abs(finite).max():
        middle = float(finite.mean())
        axis.set_ylim(middle - 0.1 * abs(middle), middle + 0.1 * abs(middle))


def labelled(axis: Axes, title: str, below: str) -> None:
    """Give an axis its title and the words below it."""
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(below, fontsize=7)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3)
