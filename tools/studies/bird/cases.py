"""The study's degradations, and its images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.utils import image_reading
from ucdir_plugin.utils.degradations import chain, degrade
from ucdir_plugin.utils.errors import UserError, did_you_mean
from ucdir_plugin.utils.image_reading import read_uint8
from ucdir_plugin.utils.image_writing import write_image

SIZE = 128
"""Side of the centre crops."""

BORDER = 4
"""Pixels that no metric sees, as in the paper's tables."""


@dataclass(frozen=True)
class Case:
    """A degradation, and what BIR-D is told of it.

    Attributes:
        title: in tables.
        task: of ``diffusion.tasks.TASKS``.
        degradations: as of ``utils.degradations.chain``; noise is among them.
        blur: the true one, for the systems that know it, and the kernel's error.
        noise: of the input, of 255, as the solver is told.
    """

    title: str
    task: str
    degradations: Tuple[Mapping[str, Any], ...]
    blur: Optional[Mapping[str, Any]] = None
    noise: float = 2.0


def _noise(sigma: float = 2.0) -> Dict[str, Any]:
    return {"type": "noise", "sigma": sigma}


def _gaussian(sigma: float, noise: float = 2.0) -> Case:
    title = f"Gaussian blur {sigma}" + (f" and noise {noise:g}" if noise != 2 else "")
    chained = ({"type": "blur", "sigma": sigma}, _noise(noise))
    return Case(title, "deblur", chained, {"type": "gaussian", "sigma": sigma}, noise)


_MOTION = {"length": 9, "angle": 45}

CASES: Dict[str, Case] = {
    "gaussian1.5": _gaussian(1.5),
    "gaussian2.5": _gaussian(2.5),
    "motion": Case(
        "motion blur 9 at 45 degrees",
        "motion",
        ({"type": "motion_blur", **_MOTION}, _noise()),
        {"type": "motion", **_MOTION},
    ),
    "sr4": Case("means of 4x4 pixels", "sr4", ({"type": "block_mean", "factor": 4}, _noise())),
    "holes": Case("25 % holes of 8x8", "inpaint", (_noise(), {"type": "holes", "share": 0.25, "size": 8})),
    "gray": Case("mean of the channels", "colorize", ({"type": "channel_mean"},), noise=1.0),
    "lowlight": Case("a fifth of the light", "lowlight", ({"type": "exposure", "gain": 0.2}, _noise())),
    "noisyblur": _gaussian(1.5, 10.0),
}


@dataclass
class Images:
    """The study's images on the disk, 8-bit PNGs: ``truth``, ``inputs/CASE`` and ``masks/CASE`` (white: holes)."""

    folder: str
    names: List[str]

    def truth(self, name: str) -> str:
        """Path of the undegraded crop."""
        return os.path.join(self.folder, "truth", name)

    def input(self, case: str, name: str) -> str:
        """Path of the degraded crop."""
        return os.path.join(self.folder, "inputs", case, name)

    def known(self, case: str, name: str) -> Optional[np.ndarray]:
        """(H, W) bool."""
        if CASES[case].task != "inpaint":
            return None
        return read_uint8(os.path.join(self.folder, "masks", case, name))[..., 0] == 0


def chosen(source: str, only: Optional[str], without: Optional[str]) -> List[str]:
    """Images of a folder, by the names without extension that two text files list, one a line.

    Raises:
        UserError: for a missing file, or a name that is not in the folder.
    """
    names = {os.path.splitext(name)[0]: name for name in image_reading.list_images(source, "--source")}

    def listed(path: str) -> List[str]:
        try:
            with open(path, encoding="utf-8") as file:
                found = file.read().split()
        except (OSError, UnicodeDecodeError) as err:
            raise UserError(f"{path} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}") from err
        for name in found:
            if name not in names:
                raise UserError(f"{path}: {name} is not in {source}; {did_you_mean(name, names)}")
        return found

    left = sorted(set(listed(only)) if only else names, key=str)
    gone = set(listed(without)) if without else set()
    return [names[stem] for stem in left if stem not in gone]


def prepare(source: str, names: Sequence[str], folder: str, cases: Iterable[str]) -> Images:
    """Centre crops and their degraded images, each a function of its name; what is there already is kept.

    Raises:
        UserError: for images smaller than the crop.
    """
    images = Images(folder, [f"{os.path.splitext(name)[0].replace('/', '_')}.png" for name in names])
    for name, target in zip(names, images.names):
        if not os.path.isfile(images.truth(target)):
            photo = read_uint8(os.path.join(source, name))
            top, left = ((side - SIZE) // 2 for side in photo.shape[:2])
            if min(top, left) < 0:
                raise UserError(f"{os.path.join(source, name)} is smaller than {SIZE}x{SIZE}; leave it out")
            write_image(photo[top : top + SIZE, left : left + SIZE], images.truth(target))
    for case in cases:
        steps = chain(CASES[case].degradations)
        for name in images.names:
            if os.path.isfile(images.input(case, name)):
                continue
            truth = read_uint8(images.truth(name)).astype(np.float32) / 255
            y, _ = degrade(steps, truth, np.random.default_rng(key_to_seed(0, "degradation", name)))
            known = np.isfinite(y[..., 0])
            if CASES[case].task == "inpaint":
                mask = np.where(known, 0, 255).astype(np.uint8)
                write_image(mask, os.path.join(folder, "masks", case, name))
            write_image((np.nan_to_num(y).clip(0, 1) * 255).round().astype(np.uint8), images.input(case, name))
    return images
