"""Classical systems to compare with: scikit-image's."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Callable, Dict, Optional, Tuple

import numpy as np
from skimage import exposure, filters, restoration, transform
from ucdir_cli.studies.bird.cases import SIZE, Case

from ucdir_plugin.restoration.bird_options import known_kernel

Classical = Callable[[np.ndarray, Case, Optional[np.ndarray]], np.ndarray]


@cache
def _psf(kind: str, **values: float) -> np.ndarray:
    return known_kernel({"type": kind, **values})[0, 0, 0].numpy()[::-1, ::-1].astype(np.float64)


def _true_psf(case: Case) -> np.ndarray:
    return _psf(case.blur["type"], **{k: v for k, v in case.blur.items() if k != "type"})


def _channels(function: Callable[[np.ndarray], np.ndarray], y: np.ndarray) -> np.ndarray:
    return np.stack([function(y[..., c]) for c in range(y.shape[2])], 2)


def _padded(function: Callable[[np.ndarray], np.ndarray], y: np.ndarray, width: int = 16) -> np.ndarray:
    """Restore an image mirrored beyond its border: what works with Fourier transforms rings there else."""
    bigger = np.pad(y, ((width, width), (width, width), (0, 0)), mode="reflect")
    return _channels(function, bigger)[width:-width, width:-width]


def _richardson_lucy(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    turns = 20 if case.noise < 5 else 5  # more of them restore the noise
    return _padded(lambda c: restoration.richardson_lucy(c, _true_psf(case), num_iter=turns), y)


def _wiener(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    rng = np.random.default_rng(0)
    return _padded(lambda c: restoration.unsupervised_wiener(c, _true_psf(case), rng=rng)[0], y)


def _unsharp(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return filters.unsharp_mask(y, radius=3, amount=0.5, channel_axis=2)


def _bicubic(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return transform.resize(y, (SIZE, SIZE), order=3, mode="reflect", anti_aliasing=False)


def _biharmonic(y: np.ndarray, case: Case, known: Optional[np.ndarray]) -> np.ndarray:
    return restoration.inpaint_biharmonic(y, ~known, channel_axis=2)


def _gamma(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return exposure.adjust_gamma(y, math.log(0.4) / math.log(min(max(float(y.mean()), 1e-3), 0.99)))


def _clahe(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    return exposure.equalize_adapthist(y)


CLASSICAL: Dict[str, Tuple[Classical, Tuple[str, ...]]] = {
    "unsharp mask": (_unsharp, ("deblur", "motion")),
    "Richardson-Lucy, true kernel": (_richardson_lucy, ("deblur", "motion")),
    "Wiener, true kernel": (_wiener, ("deblur", "motion")),
    "bicubic": (_bicubic, ("sr4",)),
    "biharmonic": (_biharmonic, ("inpaint",)),
    "gamma": (_gamma, ("lowlight",)),
    "CLAHE": (_clahe, ("lowlight",)),
}
"""scikit-image's: (function of y (h, w, 3) in [0, 1], case, known pixels), tasks. Constants: the best of a few on other
images than those of the study."""


def as_input(y: np.ndarray, case: Case, _: Any) -> np.ndarray:
    """The input itself; of the small images of sr4 the nearest pixel."""
    return y if y.shape[:2] == (SIZE, SIZE) else y.repeat(SIZE // len(y), 0).repeat(SIZE // len(y), 1)
