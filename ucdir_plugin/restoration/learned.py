"""The degradation that BIR-D found for one image: its arrays, and their picture."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch

from ucdir_plugin.diffusion.bird import records
from ucdir_plugin.utils import image_reading, image_writing
from ucdir_plugin.utils.plots import labelled, scaled

LEARNED_ARRAYS, LEARNED_FIGURE = ".learned.npz", ".learned.png"
"""Ends of names, behind a dot: photographs are called a_learned more often."""


def degraded_name(number: int, count: int) -> str:
    """End of the name of the ``number``-th of ``count`` re-degraded observations."""
    return f".degraded{number if count > 1 else ''}.png"


@dataclass
class Learned:
    """What a run found beside the image, of one image.

    Attributes:
        y: (c, h, w) in [0, 1], for each observation.
        degraded: D(image), like ``y``.
        image: (C, H, W) in [0, 1].
        kernel: for each observation (C, 1 or C, k, k), as point spread functions (of a convolution).
        mask: for each observation (H, W), on the scale of [0, 1], or None.
        sigma, loss, scale, mask_mean, kernels: of each step; see :class:`bird.Trace`.
    """

    y: List[torch.Tensor]
    degraded: List[torch.Tensor]
    image: torch.Tensor
    kernel: List[torch.Tensor]
    mask: List[Optional[torch.Tensor]]
    sigma: np.ndarray
    loss: np.ndarray
    scale: np.ndarray
    mask_mean: np.ndarray
    kernels: np.ndarray

    def arrays(self) -> Dict[str, np.ndarray]:
        """Arrays of what was learned, by name.

        kernel (O, C, c, k, k), mask (O, H, W) where one was learned, and of the steps S: sigma (S,), loss, scale (NaN
        where there is none) and mask_mean (S, O), kernel_sum (S, O, C), kernels (S, O, C, c, k, k).
        """
        found = {
            "kernel": torch.stack(self.kernel).numpy(),
            "sigma": self.sigma,
            "loss": self.loss,
            "scale": self.scale,
            "mask_mean": self.mask_mean,
            "kernel_sum": self.kernels.sum((-3, -2, -1)),
            "kernels": self.kernels,
        }
        if self.mask[0] is not None:
            found["mask"] = torch.stack(self.mask).numpy()
        return found

    def npz(self) -> bytes:
        """The arrays as the content of an .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays())
        return buffer.getvalue()

    def files(self) -> Dict[str, bytes]:
        """Suffix of a name -> content: the arrays, the figure, and each re-degraded observation."""
        files = {LEARNED_ARRAYS: self.npz(), LEARNED_FIGURE: learned_figure(self)}
        for number, degraded in enumerate(self.degraded, 1):
            photo = image_reading.Photo(np.zeros((*degraded.shape[-2:], 3), np.uint8))
            image = degraded.clamp(0, 1).expand(3, -1, -1)
            files[degraded_name(number, len(self.degraded))] = image_writing.encode_result(image, photo, ".png")
        return files


def learned_of(result: records.Result, index: int) -> Learned:
    """What the solver learned of one image of a batch."""
    trace = result.trace

    def steps(values: Sequence[torch.Tensor]) -> np.ndarray:
        return torch.stack([v[:, index] for v in values]).numpy()

    def unit(images: torch.Tensor) -> torch.Tensor:
        return (images[index].cpu() + 1) / 2

    observations = result.observations
    masks = [o.degradation.mask for o in observations]
    return Learned(
        [o.degradation.for_image(index).operator.seen(unit(o.y)[None])[0] for o in observations],
        [unit(d) for d in result.degraded],
        unit(result.image).clamp(0, 1),
        [o.degradation.kernel[index].cpu().flip(-1, -2) for o in observations],
        [None if m is None else m[index, 0].cpu() for m in masks],
        np.array(trace.sigma),
        steps(trace.loss),
        steps(trace.scale),
        steps(trace.mask_mean),
        torch.stack([torch.stack([k[index].flip(-1, -2) for k in kernels]) for kernels in trace.kernel]).numpy(),
    )


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
        scaled(axis, values)
        labelled(axis, name, "step")
