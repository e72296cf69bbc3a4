"""What BIR-D learned of an image, as one picture, and the trends of several systems (paper, figures 11 and 12)."""

from __future__ import annotations

import io
from typing import Mapping, Sequence

import numpy as np

from ucdir_plugin.utils.plots import labelled, scaled

TRENDS = ("sigma", "guidance scale", "mean of the mask", "mean of the kernel", "loss")
"""Rows of what the study keeps of a system, by step."""


def trends_figure(trends: Mapping[str, np.ndarray]) -> bytes:
    """A PNG: scale, mask, kernel and loss against the progress of the reverse process, a line each system.

    Args:
        trends: system -> (5, steps), rows as :data:`TRENDS`; NaN where it has no such thing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(TRENDS) - 1)
    lines = {}
    for row, axis in enumerate(axes, 1):
        for label, rows in trends.items():
            values = rows[row]
            if np.isfinite(values).any():
                progress = np.arange(1, len(values) + 1) / len(values)
                (lines[label],) = axis.plot(progress, values, linewidth=1, color=f"C{list(trends).index(label)}")
        shown = np.concatenate([line.get_ydata() for line in axis.get_lines()] or [np.zeros(1)])
        scaled(axis, shown)
        labelled(axis, TRENDS[row], "share of the steps")
    named = [label for label in trends if label in lines]
    figure.legend([lines[label] for label in named], named, loc="outside lower center", ncols=5, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def progress_figure(curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]]) -> bytes:
    """A PNG: metrics against the iterations of the training, a line each system.

    Args:
        curves: metric -> system -> (iteration, value).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * max(2, len(curves)), 2.8), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    systems = list(dict.fromkeys(name for found in curves.values() for name in found))
    lines = {}
    for axis, (metric, found) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for name, points in found.items():
            x, y = zip(*sorted(points))
            (lines[name],) = axis.plot(x, y, marker=".", linewidth=1, color=f"C{systems.index(name)}")
        labelled(axis, metric.upper(), "iterations")
    figure.legend([lines[n] for n in systems], systems, loc="outside lower center", ncols=5, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
