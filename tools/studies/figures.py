"""What BIR-D learned of an image, as one picture, and the trends of several systems (paper, figures 11 and 12)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Mapping, Sequence

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ucdir_plugin.blind import Learned

TRENDS = ("sigma", "guidance scale", "mean of the mask", "mean of the kernel", "loss")
"""Rows of what the study keeps of a system, by step."""

WIDTH = 320
"""Longest side of the images in it, in pixels: they are there for orientation."""


def learned_figure(learned: Learned) -> bytes:
    """A PNG: of each observation y, D(result), their difference, kernel and mask; and the curves over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = len(learned.y)
    columns = 5 + (learned.mask[0] is not None)
    figure = Figure(figsize=(2.4 * columns, 2.5 * count + 2.4), layout="constrained", dpi=100)
    FigureCanvasAgg(figure)
    pictures, curves = figure.subfigures(2, 1, height_ratios=[2.5 * count, 2.4])
    axes = pictures.subplots(count, columns, squeeze=False)
    for row, number in zip(axes, range(count)):
        name = f"y{number + 1}" if count > 1 else "y"
        y, degraded, kernel = learned.y[number], learned.degraded[number], learned.kernel[number]
        rest = (degraded - y).abs().mean(0)
        _show(row[0], _small(y.expand(3, -1, -1)), f"{name} (observed)")
        _show(row[1], _small(learned.image), "restored")
        _show(
            row[2],
            _small(degraded.expand(3, -1, -1)),
            f"degraded again, RMS error {float((degraded - y).square().mean()) ** 0.5:.4f}",
        )
        top = float(rest.max())
        _show(row[3], _small(rest[None]), f"|difference|, white {top:.3f}", cmap="gray", vmin=0, vmax=top or 1)
        plane = kernel.sum(1).mean(0).numpy()
        reach = max(abs(float(plane.min())), abs(float(plane.max())))
        title = f"kernel {plane.shape[-1]}x{plane.shape[-1]}, sum {float(kernel.sum()) / len(kernel):.3f}"
        _show(row[4], plane, title, cmap="gray", vmin=min(0.0, float(plane.min())), vmax=reach or 1)
        if learned.mask[number] is not None:
            mask = learned.mask[number]
            most = max(float(mask.abs().max()), 1e-6)
            _show(row[5], _small(mask[None]), f"mask, +-{most:.3f}", cmap="coolwarm", vmin=-most, vmax=most)
    _curves(curves, learned)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


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
        _scale(axis, shown)
        _label(axis, TRENDS[row], "share of the steps")
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
        _label(axis, metric.upper(), "iterations")
    figure.legend([lines[n] for n in systems], systems, loc="outside lower center", ncols=5, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _scale(axis: Axes, values: np.ndarray) -> None:
    """Logarithmic over more than 20 times; of what is constant no noise of rounding."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    if finite.min() > 0 and finite.max() > 20 * finite.min():
        axis.set_yscale("log")
    elif np.ptp(finite) < 1e-3 * np.abs(finite).max():
        middle = float(finite.mean())
        axis.set_ylim(middle - 0.1 * abs(middle), middle + 0.1 * abs(middle))


def _label(axis: Axes, title: str, below: str) -> None:
    axis.set_title(title, fontsize=8)
    axis.set_xlabel(below, fontsize=7)
    axis.tick_params(labelsize=6)
    axis.grid(alpha=0.3)


def _show(axis: Any, image: np.ndarray, title: str, **how: Any) -> None:
    axis.imshow(image, interpolation="nearest", **how)
    axis.set_title(title, fontsize=8)
    axis.set_xticks([])
    axis.set_yticks([])


def _small(image: torch.Tensor) -> np.ndarray:
    """(C, H, W) -> (h, w, 3) or, of one channel, (h, w); every n-th pixel would lose thin lines, so means."""
    factor = -(-max(image.shape[-2:]) // WIDTH)
    if factor > 1:
        image = torch.nn.functional.avg_pool2d(image[None], factor, ceil_mode=True, count_include_pad=False)[0]
    if len(image) == 1:
        return image[0].numpy()
    return image.clamp(0, 1).permute(1, 2, 0).numpy()


def _curves(figure: Any, learned: Learned) -> None:
    """Against the step; sigma falls from left to right."""
    steps = np.arange(1, len(learned.sigma) + 1)
    shown = [("loss", learned.loss), ("sum of the kernel", learned.kernels.sum((-3, -2, -1)).mean(-1))]
    if np.isfinite(learned.scale).any():
        shown.append(("guidance scale", learned.scale))
    if learned.mask[0] is not None:
        shown.append(("mean of the mask", learned.mask_mean))
    shown.append(("sigma", learned.sigma[:, None]))
    for axis, (name, values) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
        axis.plot(steps, values, linewidth=1, marker="." if len(steps) < 40 else None)
        _scale(axis, values)
        _label(axis, name, "step")
