"""Ma's score (NRQM) by pyiqa, and the perceptual index (PI)."""

from __future__ import annotations

import functools
import math
from typing import Any, Callable, Optional

import numpy as np
import torch

from ucdir_plugin.compat import calculate_niqe
from ucdir_plugin.metrics.images import described, exact, imported, package_folder, rgb
from ucdir_plugin.metrics.protocol import package_version
from ucdir_plugin.registry import register
from ucdir_plugin.utils.downloads import WeightsFile
from ucdir_plugin.utils.errors import NotMeasurable, UserError

NRQM = WeightsFile("NRQM_model.mat", "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/NRQM_model.mat")
"""Its publishers name no SHA-256: the stamp has that of the file found."""

INSTALL = "pip install --no-deps 'pyiqa>=0.1.13' (not for commercial use; its other dependencies are not needed here)"
_SMALLEST = 64


def _found(weights_dir: Optional[str]) -> dict[str, Any]:
    package_folder("pyiqa", INSTALL)
    return {"weights": {NRQM.name: NRQM.find(weights_dir)[1]}, "package": package_version("pyiqa")}


def _nrqm_protocol(crop_border: int, colour: str, weights_dir: Optional[str]) -> dict[str, Any]:
    _check(colour)
    about = {"name": "Ma (NRQM)", "colour": _COLOURS[colour], "range": "0 to 255", "crop_border": crop_border}
    return {**about, **_found(weights_dir)}


def _pi_protocol(crop_border: int, weights_dir: Optional[str]) -> dict[str, Any]:
    about = {"name": "PI", "colour": _COLOURS["ycbcr"], "range": "0 to 255", "crop_border": crop_border}
    found = _found(weights_dir)
    return {**about, **found, "package": f"{found['package']} (Ma), {package_version('basicsr')} (NIQE)"}


_COLOURS = {"yiq": "Y of YIQ", "ycbcr": "Y of YCbCr (BT.601)"}


def _check(colour: str) -> None:
    if colour not in _COLOURS:
        raise UserError(f"Ma: there is no colour {colour!r}; known: {', '.join(_COLOURS)}")


@functools.lru_cache(maxsize=4)
def nrqm_network(path: str, colour: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """pyiqa's NRQM with the random forests of a .mat file (which holds arrays, no code).

    Raises:
        UserError: if the file is none of NRQM.
    """
    network = imported("pyiqa.archs.nrqm_arch", INSTALL).NRQM
    try:
        return network(color_space=colour, pretrained_model_path=path)
    except Exception as err:  # SciPy raises many types for damaged files
        raise UserError(f"{path} is not the model of NRQM: {type(err).__name__}: {err}") from err


@register("metric")
@described(_nrqm_protocol)
def calculate_nrqm(
    img: np.ndarray,
    crop_border: int = 0,
    colour: str = "yiq",
    weights_dir: Optional[str] = None,
    better: str = "higher",
) -> float:
    """Ma et al.'s no-reference score (CVIU 2017), by the package ``pyiqa``: about 0 to 10, higher is better.

    Args:
        img: (H, W, 3) or (H, W) BGR uint8.
        crop_border: pixels left out on each side.
        colour: yiq (pyiqa's default) or ycbcr (within PI).
        weights_dir: where NRQM_model.mat is looked for first.
        better: for BasicSR, which hands it over; changes nothing.

    Raises:
        NotAvailable: if pyiqa or the file is not there.
        NotMeasurable: for images below 64 pixels or constant ones.
    """
    _check(colour)
    image = rgb(img, crop_border)
    if min(image.shape[:2]) < _SMALLEST:
        raise NotMeasurable(f"Ma's score needs {_SMALLEST} pixels on each side")
    package_folder("pyiqa", INSTALL)
    network = nrqm_network(NRQM.find(weights_dir)[0], colour)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    try:
        with exact():
            value = float(network(pixels))
    except (RuntimeError, ValueError, IndexError) as err:  # singular matrices of constant images
        raise NotMeasurable(f"Ma's score: {err}") from err
    if not math.isfinite(value):
        raise NotMeasurable("Ma's score of this image is not finite")
    return value


def perceptual_index(ma: float, niqe: float) -> float:
    """PI = ((10 - Ma) + NIQE) / 2 (Blau et al., PIRM 2018); lower is better."""
    return ((10 - ma) + niqe) / 2


@register("metric")
@described(_pi_protocol)
def calculate_pi(
    img: np.ndarray, crop_border: int = 4, weights_dir: Optional[str] = None, better: str = "lower"
) -> float:
    """:func:`perceptual_index` of pyiqa's Ma and BasicSR's NIQE, both on Y of YCbCr; about 2 to 10, lower is better.

    Args:
        crop_border: pixels left out on each side; 4 in the challenge.
        Others and errors: as :func:`calculate_nrqm`.
    """
    ma = calculate_nrqm(img, crop_border, "ycbcr", weights_dir)
    with np.errstate(all="ignore"):
        niqe = calculate_niqe(img, crop_border, "HW" if img.ndim == 2 else "HWC")
    return perceptual_index(ma, niqe)
