"""Whether the borders of patches show in an image: the seam score."""

from __future__ import annotations

from typing import Any, Sequence

import numpy as np

from ucdir_plugin.diffusion import tiling
from ucdir_plugin.metrics.images import described
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import NotMeasurable, UserError


def seam_score(image: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Mean absolute difference of neighbouring pixels across the borders of patches, over the mean elsewhere.

    1 if the borders do not show, more if they do. The content counts too: compare results of one image and grid.

    Args:
        image: (H, W) or (H, W, C), any range.
        rows, columns: where patches begin, in 1 .. H-1 and 1 .. W-1: ``Grid.borders``. Row r lies between the
            pixels r - 1 and r.

    Raises:
        ValueError: if there is no border, nothing but borders, or one outside the image.
    """
    image = np.asarray(image, dtype=np.float64)
    across, elsewhere = [], []
    for axis, borders in enumerate((rows, columns)):
        if any(not 1 <= border < image.shape[axis] for border in borders):
            raise ValueError(f"borders {list(borders)} must be between 1 and {image.shape[axis] - 1}")
        difference = np.abs(np.diff(image, axis=axis))
        at = np.isin(np.arange(1, image.shape[axis]), borders)
        across.append(difference.compress(at, axis).ravel())
        elsewhere.append(difference.compress(~at, axis).ravel())
    seams, rest = np.concatenate(across), np.concatenate(elsewhere)
    if not seams.size or not rest.size:
        raise ValueError(f"rows {list(rows)} and columns {list(columns)} leave no seam, or nothing else, to look at")
    if not rest.any():
        return float("inf") if seams.any() else 1.0
    return float(seams.mean() / rest.mean())


def _protocol(tile: int, overlap: int, grid: str, stride: int, border: int) -> dict[str, Any]:
    about = {"name": "Seam score", "colour": "as stored", "range": "any", "tile": tile, "overlap": overlap}
    return {**about, "grid": grid, "stride": stride, "border": border}


@register("metric")
@described(_protocol)
def calculate_seam_score(
    img: np.ndarray,
    tile: int,
    overlap: int = 64,
    grid: str = "aligned",
    stride: int = 1,
    border: int = 8,
    better: str = "lower",
) -> float:
    """:func:`seam_score` at the borders of the patches that ``val: sampling:`` of the same ``tile``, ... makes.

    Args:
        img: (H, W) or (H, W, C).
        stride: of the denoiser, to which the aligned grid is rounded (UCDIRDenoiser: 2 ** (levels - 1)).
        border: ``val: sampling: border``, of the same default; the grid is laid over the image with it.
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        NotMeasurable: for an image that is one patch.
        UserError: for an unknown grid, or a tile and overlap that make none.
    """
    if grid not in ("aligned", "released"):
        raise UserError(f"seam score: there is no grid {grid!r}; known: aligned, released")
    height, width = img.shape[:2]
    made = tiling.grid_of(height, width, tile, overlap, stride, border, grid)
    if made is None:
        raise NotMeasurable(f"the image is one patch of {tile}")
    rows, columns = tiling.borders_in_image(made, height, width, border)
    try:
        return seam_score(img, rows, columns)
    except ValueError as err:
        raise NotMeasurable(str(err)) from err
