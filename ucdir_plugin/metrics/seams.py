"""Do the borders of patches show in an image?"""

from __future__ import annotations

from typing import Sequence

import numpy as np


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
