"""Files that belong to an image: its mask, and further observations."""

from __future__ import annotations

import hashlib
import os
from typing import Dict, Tuple

import torch

from ucdir_plugin.utils import files, image_reading
from ucdir_plugin.utils.errors import ImageError, did_you_mean


class Companions:
    """Finds the files that belong to an image: one for all images, or in a folder the one of the same name."""

    def __init__(self) -> None:
        self._folders: Dict[str, Dict[str, str]] = {}  # images by stem, listed once

    def path(self, where: str, key: str, what: str) -> str:
        """The file of ``where``: itself, or in a folder the one whose relative path agrees up to the extension.

        Args:
            key: relative path of the image.
            what: the word for it in messages.

        Raises:
            ImageError: if it is missing.
        """
        if os.path.isfile(where):
            return where
        if not os.path.isdir(where):
            raise ImageError(f"{what}: {where} does not exist")
        stem = os.path.splitext(key)[0]
        if where not in self._folders:
            self._folders[where] = image_reading.images_by_stem(where, what)
        found = self._folders[where]
        if stem not in found:
            raise ImageError(f"{key}: its {what} {stem}.* is not in {where}; {did_you_mean(stem, found)}")
        return os.path.join(where, found[stem])

    def observation(self, where: str, key: str, size: Tuple[int, int]) -> torch.Tensor:
        """Another observation of an image's scene, (1, 3, H, W) in [0, 1].

        Raises:
            ImageError: if it is missing, unreadable or not of ``size`` (height, width).
        """
        photo = image_reading.read_photo(self.path(where, key, "observation"), image_reading.MAX_PIXELS)
        image = image_reading.to_tensor(photo)
        if image.shape[-2:] != size:
            h, w = image.shape[-2:]
            raise ImageError(
                f"observations of different sizes: {key} is {size[1]}x{size[0]}, the one in {where} {w}x{h}"
            )
        return image


def read_mask(path: str, size: Tuple[int, int], holes: str = "white") -> torch.Tensor:
    """What is known of an image, from a picture of its holes.

    Args:
        size: (height, width) that it must have.
        holes: which of its pixels are holes: ``white`` (128 and more of 255) or ``black``.

    Returns:
        (1, 1, H, W) of 0 (hole) and 1 (known).

    Raises:
        ImageError: if it is of another size, or leaves nothing of the image.
    """
    photo = image_reading.read_photo(path, image_reading.MAX_PIXELS)
    height, width = photo.pixels.shape[:2]
    if (height, width) != tuple(size):
        raise ImageError(f"mask {path} is {width}x{height}, the image {size[1]}x{size[0]}: they must have one size")
    bright = image_reading.to_tensor(photo).mean(1, keepdim=True) >= 0.5
    known = (~bright if holes == "white" else bright).float()
    if not bool(known.any()):
        raise ImageError(
            f"mask {path} leaves nothing of the image: {holes} marks holes (bird: holes says which colour does)"
        )
    return known


def fingerprint(path: str) -> str:
    """Whether a file, or what lies in a folder, is still the same."""
    if os.path.isfile(path):
        return files.sha256_of(path)
    digest = hashlib.sha256()
    for name in image_reading.list_images(path, "folder") if os.path.isdir(path) else ():
        state = os.stat(os.path.join(path, name))
        digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
