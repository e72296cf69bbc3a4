"""Reading images of the kinds users have: 8 and 16 bit, gray, RGB, RGBA, palette, EXIF-rotated."""

from __future__ import annotations

import os

import cv2
import numpy as np
from PIL import Image

from ucdir_plugin.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def decode_image(content: bytes, path: str) -> np.ndarray:
    """Decode an image file's bytes: (H, W, 3) float32 BGR in [0, 1], as BasicSR's datasets hold images.

    Gray is repeated, alpha dropped, 16 bits keep their precision, EXIF rotation is applied; 8 bits equal BasicSR's.

    Raises:
        UserError: if it is empty or cannot be decoded; names ``path``.
    """
    if not content:
        raise UserError(f"image {path} is empty (0 bytes)")
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    if image is None:
        raise UserError(f"image {path} cannot be decoded: it is damaged or no image")
    if image.dtype == np.uint8:
        return image.astype(np.float32) / 255.0
    if image.dtype == np.uint16:
        return image.astype(np.float32) / 65535.0
    if image.dtype.kind != "f":
        raise UserError(f"image {path} has pixels of type {image.dtype}; 8 and 16 bits without sign and float are read")
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise UserError(f"image {path} holds NaN or infinite values")
    return image.clip(0, 1)


def read_bytes(path: str) -> bytes:
    """The file's content.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as err:
        raise UserError(f"image {path} cannot be read: {err.strerror}") from err


def image_size(path: str) -> tuple[int, int]:
    """(height, width) as displayed, from the header where Pillow knows the format.

    Raises:
        UserError: if the file is missing, empty or no image.
    """
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise UserError(f"image {path} is empty (0 bytes)")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format in ("JPEG", "MPO", "TIFF", "WEBP") and image.getexif().get(0x0112) in _ROTATED:
                width, height = height, width
            return height, width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return decode_image(read_bytes(path), path).shape[:2]


def list_images(folder: str, what: str) -> list[str]:
    """Paths relative to ``folder`` of the images in it and below, sorted; hidden files are left out.

    Args:
        what: the option that named the folder, for the error.

    Raises:
        UserError: if the folder is missing or holds no image.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{what}: the folder {folder} does not exist")
    found = []
    visited = set()
    for root, folders, files in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:  # links in a circle
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(root, name), folder).replace(os.sep, "/")
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    if not found:
        raise UserError(f"{what}: the folder {folder} holds no image ({' '.join(EXTENSIONS)})")
    return sorted(found)
