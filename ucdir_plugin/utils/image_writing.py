"""Images encoded and written: PNG of 8 and 16 bits, JPEG with its metadata."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import torch
from PIL import Image

from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_headers import EXIF
from ucdir_plugin.utils.image_reading import JPEG_EXIF, JPEG_SIDE, Photo, strips


def side_by_side(images: list[np.ndarray], gap: int = 8) -> np.ndarray:
    """Images (H, W, 3) uint8 of one height in a row with white gaps."""
    white = np.full((images[0].shape[0], gap, 3), 255, np.uint8)
    return np.concatenate([part for image in images for part in (image, white)][:-1], 1)


def write_image(image: np.ndarray, path: str) -> None:
    """Write a PNG, whole or not at all.

    Args:
        image: (H, W) or (H, W, 3) BGR, uint8 or uint16.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomically(cv2.imencode(".png", image)[1].tobytes(), path)


RESULT_EXTENSIONS = (".png", ".jpg", ".jpeg")


def check_output(extension: str, like: Photo | None = None, scale: int = 1) -> None:
    """Whether :func:`encode_result` can write; to be asked before long work.

    Args:
        extension: of the result's file, with the dot, in any case.
        like: the photo, once it has been read.
        scale: of the result's size.

    Raises:
        UserError: if there is no writer for ``extension``, or if a JPEG cannot hold what ``like`` has.
    """
    extension = extension.lower()
    if extension not in RESULT_EXTENSIONS:
        raise UserError(
            f"results cannot be written as {extension or 'a file without extension'}:"
            " use .png (every image) or .jpg (8 bits, no alpha)"
        )
    if like is None or extension == ".png":
        return
    excess = [
        *(["16 bits"] if like.pixels.dtype == np.uint16 else ["float pixels"] if like.pixels.dtype.kind == "f" else []),
        *(["alpha"] if like.alpha is not None else []),
        *([f"more than {JPEG_SIDE} pixels a side"] if max(like.pixels.shape[:2]) * scale > JPEG_SIDE else []),
        *([f"{len(like.exif)} bytes of EXIF"] if like.exif and len(like.exif) > JPEG_EXIF else []),
    ]
    if excess:
        raise UserError(f"a JPEG cannot hold {' and '.join(excess)}, which the image has: write .png")


def encode_result(image: torch.Tensor, like: Photo, extension: str) -> bytes:
    """A result as a file's content, of the kind that ``like`` was: gray, alpha, depth, EXIF and ICC profile are kept.

    8 bits are rounded as BasicSR's tensor2img does; 16 bits and float are written as 16 bits. Gray is the BT.601 luma.
    A profile for other colours than the file's (of CMYK, which became RGB) is left out. JPEG: quality 95, 4:4:4.

    Args:
        image: (3, H, W) RGB in [0, 1], clamped; any float dtype and device.
        like: the photo that was restored, of this size or, for super-resolution, a whole fraction of it; alpha is
            then enlarged (bilinear).
        extension: as for :func:`check_output`.

    Raises:
        UserError: if ``image`` holds NaN or infinite values, or as :func:`check_output`.
        ValueError: if ``image`` has another shape.
    """
    height, width = like.pixels.shape[:2]
    scale = image.shape[-1] // width
    if not scale or image.shape != (3, height * scale, width * scale):
        raise ValueError(f"the result {tuple(image.shape)} is no multiple of the photo's (3, {height}, {width})")
    check_output(extension, like, scale)
    pixels = _quantized(image, like, scale)
    icc_profile = like.icc_profile
    if icc_profile and icc_profile[16:20] != (b"GRAY" if like.gray else b"RGB "):
        icc_profile = None
    if pixels.dtype == np.uint16:
        return _png16(pixels, like.exif, icc_profile)
    buffer = io.BytesIO()
    options = {"format": "PNG"} if extension.lower() == ".png" else {"format": "JPEG", "quality": 95, "subsampling": 0}
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    picture.save(buffer, exif=like.exif or b"", icc_profile=icc_profile, **options)
    return buffer.getvalue()


def _quantized(image: torch.Tensor, like: Photo, scale: int) -> np.ndarray:
    """(H, W, channels) of uint8 in the order gray or RGB, alpha; or of uint16 in OpenCV's: gray or BGR, alpha."""
    _, height, width = image.shape
    colours = 1 if like.gray else 3
    dtype, top = (np.uint8, 255.0) if like.pixels.dtype == np.uint8 else (np.uint16, 65535.0)
    pixels = np.empty((height, width, colours + (like.alpha is not None)), dtype)
    for rows in strips(height, width):
        part = image[:, rows].detach().float()
        if not part.isfinite().all():
            raise UserError("the result holds NaN or infinite values: the weights are damaged or the precision too low")
        strip = part.clamp(0, 1).permute(1, 2, 0).contiguous().cpu().numpy()
        if like.gray:
            strip = cv2.cvtColor(strip, cv2.COLOR_RGB2GRAY)[..., None]
        elif dtype == np.uint16:
            strip = strip[..., ::-1]
        pixels[rows, :, :colours] = (strip * np.float32(top)).round()
    if like.alpha is not None:
        alpha = like.alpha
        if scale != 1:
            alpha = cv2.resize(alpha, (width, height), interpolation=cv2.INTER_LINEAR)
        pixels[..., -1] = (alpha * np.float32(top)).round() if alpha.dtype.kind == "f" else alpha
    return pixels


def _png16(pixels: np.ndarray, exif: bytes | None, icc_profile: bytes | None) -> bytes:
    """A PNG of (H, W, 1 to 4) uint16 in OpenCV's order of channels; Pillow writes no 16-bit colours."""
    gray_alpha = pixels.shape[2] == 2
    if gray_alpha:  # OpenCV writes none, but a row of it has the bytes of a row of 8-bit RGBA
        pixels = cv2.cvtColor(pixels.astype(">u2").view(np.uint8), cv2.COLOR_RGBA2BGRA)
    png = memoryview(cv2.imencode(".png", pixels)[1]).cast("B")
    header = bytearray(png[16:29])  # behind the signature (8 bytes), a length and a name
    if gray_alpha:
        header[8:10] = 16, 4  # bit depth, colour type
    chunks = _chunk(b"IHDR", bytes(header))
    if icc_profile:
        chunks += _chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile))
    if exif:
        chunks += _chunk(b"eXIf", exif[len(EXIF) :])
    return b"".join((png[:8], chunks, png[33:]))


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
