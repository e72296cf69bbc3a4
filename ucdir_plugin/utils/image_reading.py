"""Reading and writing images of the kinds users have: 8 and 16 bit, float, gray, alpha, palette, EXIF-rotated.

OpenCV decodes, Pillow reads headers: ``decode_image`` for datasets, ``read_photo`` ... ``encode_result`` for tools.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Callable, Iterator

import cv2
import numpy as np
import torch
from PIL import Image

from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_headers import Header, any_size, jpeg_fault, png_is_cut, read_header

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
MAX_PIXELS = 250_000_000
"""Larger images are refused, unless a tool is told otherwise."""
_DAMAGED = "image {} cannot be decoded: it is damaged or no PNG, JPEG, TIFF, WebP, BMP or PPM; save it as PNG"
_FAULT = "image {} is a {} with {}, which is not read; save it as PNG"
JPEG_SIDE, JPEG_EXIF = 65500, 65533  # what libjpeg and a marker hold


@dataclass(frozen=True, eq=False)
class Photo:
    """An image file's content, and what to keep of it when its restored version is written.

    Attributes:
        pixels: (H, W, 3) RGB, upright, in the file's depth: uint8, uint16, or float32 in [0, 1].
        alpha: (H, W) of the same dtype, or None.
        gray: whether the file has one colour channel; a palette counts as colour.
        exif: as Pillow's ``exif=`` takes it, for the upright image: orientation 1, no thumbnail, else unchanged.
        icc_profile: as in the file, whatever colours it is for.
        quality: of a JPEG file, 1 .. 100, by its quantization; None of others.
    """

    pixels: np.ndarray
    alpha: np.ndarray | None = None
    gray: bool = False
    exif: bytes | None = None
    icc_profile: bytes | None = None
    quality: int | None = None


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """A view of (H, W, ...), turned as the EXIF orientation asks."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image[:, ::-1] if orientation in (2, 3, 6, 7) else image


def _imdecode(content: bytes, path: str, flags: int) -> np.ndarray:
    """cv2.imdecode of an image of 8 or 16 bits without sign or of float, which becomes float32 in [0, 1]."""
    fault = jpeg_fault(content) if content[:2] == b"\xff\xd8" else None
    if fault:
        raise UserError(_FAULT.format(path, "JPEG", fault))
    if content[:4] == b"\x89PNG" and png_is_cut(content):
        raise UserError(_DAMAGED.format(path))
    level = cv2.utils.logging.setLogLevel(0)  # what it has to say becomes our one line
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error as err:
        if "CV_IO_MAX_IMAGE" in str(err):
            raise UserError(
                f"image {path} is larger than OpenCV reads: 2^30 pixels, 2^20 a side, or what the environment variables"
                " OPENCV_IO_MAX_IMAGE_PIXELS, _WIDTH and _HEIGHT allow"
            ) from err
        raise UserError(f"image {path} cannot be decoded: {err}") from err
    finally:
        cv2.utils.logging.setLogLevel(level)
    if image is None:
        raise UserError(
            f"image {path} cannot be decoded: it is damaged, no image, or of a kind that OpenCV cannot read"
        )
    if image.dtype in (np.uint8, np.uint16):
        return image
    if image.dtype.kind != "f":
        raise UserError(f"image {path} has pixels of type {image.dtype}; 8 and 16 bits without sign and float are read")
    image = image.astype(np.float32, copy=False)
    if not cv2.checkRange(image)[0]:
        raise UserError(f"image {path} holds NaN or infinite values")
    return image.clip(0, 1, out=image)


def _header(file: BinaryIO, path: str, max_pixels: int, cure: str) -> Header:
    """What a file says of itself, if it may be decoded.

    Args:
        cure: of an image that is too large; ``{}`` stands for its pixels.

    Raises:
        UserError: if it is damaged, of another kind, too large, or one that OpenCV reads wrongly.
    """
    header = read_header(file)
    if header is None:
        raise UserError(_DAMAGED.format(path))
    height, width = header.size
    if height * width > max_pixels:
        raise UserError(
            f"image {path} has {width}x{height} = {width * height} pixels, more than the limit of {max_pixels};"
            f" {cure.format(width * height)}"
        )
    if header.fault:
        raise UserError(_FAULT.format(path, header.kind, header.fault))
    return header


def _decode(content: bytes, path: str, header: Header) -> np.ndarray:
    """(H, W, 3) BGR, upright; dtype as in :func:`_imdecode`."""
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH
    if header.bits > 16:  # of float OpenCV converts no channels
        image = _imdecode(content, path, cv2.IMREAD_UNCHANGED)
        if image.ndim == 2:
            image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
        elif image.shape[2] == 4:
            image = cv2.cvtColor(image, cv2.COLOR_BGRA2BGR)
    elif header.kind == "WEBP":  # only late versions of OpenCV turn it
        image = _imdecode(content, path, flags | cv2.IMREAD_IGNORE_ORIENTATION)
        image = np.ascontiguousarray(_upright(image, header.orientation))
    else:
        if header.packed:
            _check_unpacks(content, path)
        image = _imdecode(content, path, flags)
    if image.shape != (*header.size, 3):  # as by a tag that is there twice
        raise UserError(f"image {path} cannot be decoded: it has another size than its header says")
    return image


def _check_unpacks(content: bytes, path: str) -> None:
    """Unpack a TIFF's strips and tiles before OpenCV does.

    Raises:
        UserError: if parts of a TIFF cannot be unpacked, which OpenCV leaves black, without a word.
    """
    try:
        with any_size(), Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error) as err:
        if "decoder error" in str(err) or "truncated" in str(err):  # else it is of a kind that Pillow does not know
            raise UserError(_DAMAGED.format(path)) from err


def _unit(pixels: np.ndarray) -> np.ndarray:
    """float32 in [0, 1], as BasicSR converts."""
    if pixels.dtype == np.uint8:
        return pixels.astype(np.float32) / 255.0
    if pixels.dtype == np.uint16:
        return pixels.astype(np.float32) / 65535.0
    return pixels


def decode_image(content: bytes, path: str) -> np.ndarray:
    """Decode an image file's bytes: (H, W, 3) float32 BGR in [0, 1], as BasicSR's datasets hold images.

    Gray is repeated, alpha dropped, 16 bits keep their precision, EXIF rotation is applied; 8 bits equal BasicSR's.
    Of several frames or pages the first is read. A JPEG that is cut short is refused by OpenCV 4.11 and later; older
    versions fill it up.

    Raises:
        UserError: if it is empty, cannot be decoded, or has more than :data:`MAX_PIXELS`; names ``path``.
    """
    if not content:
        raise UserError(f"image {path} is empty (0 bytes)")
    header = _header(io.BytesIO(content), path, MAX_PIXELS, "cut it into parts, or scale it down")
    return _unit(_decode(content, path, header))


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a file that is one.

    Raises:
        UserError: if the file cannot be read, is empty, or no file (a pipe would be waited for, for ever).
    """
    try:
        if not os.path.isdir(path) and not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"image {path} cannot be read: it is a pipe or a device, not a file")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise UserError(f"image {path} is empty (0 bytes)")
            yield file
    except (OSError, ValueError) as err:  # ValueError: a name that no file can have
        raise UserError(f"image {path} cannot be read: {getattr(err, 'strerror', None) or err}") from err


def read_bytes(path: str) -> bytes:
    """The file's content.

    Raises:
        UserError: if it cannot be read or is empty.
    """
    with _opened(path) as file:
        return file.read()


def image_size(path: str) -> tuple[int, int]:
    """(height, width) as displayed, from the header, whether the rest can be read or not.

    Raises:
        UserError: if the file is missing, empty or of another kind than :data:`EXTENSIONS`.
    """
    with _opened(path) as file:
        header = read_header(file)
    if header is None:
        raise UserError(_DAMAGED.format(path))
    return header.size


def read_photo(path: str, max_pixels: int) -> Photo:
    """Read an image and what is to be kept of its file; the pixels are :func:`decode_image`'s, in the file's depth.

    Only in a TIFF of 8 bits with alpha they differ where it is transparent: OpenCV, and so the datasets, multiply by
    alpha there; these are the file's colours. CMYK becomes RGB. Of several frames or pages the first is read.

    Args:
        max_pixels: the most that is decoded; the header tells.

    Raises:
        UserError: if the file is missing, empty, damaged (a cut JPEG: see :func:`decode_image`), of another kind than
            :data:`EXTENSIONS`, has more pixels than ``max_pixels`` or OpenCV's limit, signed or NaN pixels, or is a
            TIFF that OpenCV would read wrongly: 16 bits with white as 0, with colours multiplied by alpha, or gray
            with alpha, and 9 to 15 bits.
    """
    with _opened(path) as file:
        header = _header(file, path, max_pixels, "if that is meant, give --max-pixels {}")
        file.seek(0)
        content = file.read()
    if header.alpha and header.kind == "TIFF" and header.bits <= 8:
        pixels, alpha = _tiff_with_alpha(content, path)
    else:
        alpha = _alpha(content, path, header) if header.alpha else None  # first: the peak is lower
        pixels = _decode(content, path, header)
        for rows in strips(*pixels.shape[:2]):
            pixels[rows] = cv2.cvtColor(pixels[rows], cv2.COLOR_BGR2RGB)
    if any(part is not None and part.shape[:2] != header.size for part in (pixels, alpha)):
        raise UserError(f"image {path} cannot be decoded: it has another size than its header says")
    return Photo(pixels, alpha, header.gray, header.exif, header.icc_profile, header.quality)


def _tiff_with_alpha(content: bytes, path: str) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) RGB and (H, W) uint8 by Pillow: OpenCV drops the alpha of gray and multiplies colours by it."""
    try:
        with any_size(), Image.open(io.BytesIO(content), formats=("TIFF",)) as image:
            rgba = np.asarray(image.convert("RGBA"))
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error) as err:
        raise UserError(f"image {path} cannot be decoded: it is damaged or of a rare kind; save it as PNG") from err
    return rgba[..., :3].copy(), rgba[..., 3].copy()


def _alpha(content: bytes, path: str, header: Header) -> np.ndarray:
    """(H, W), upright."""
    image = _imdecode(content, path, cv2.IMREAD_UNCHANGED)
    if header.transparent is not None:
        opaque = np.iinfo(image.dtype).max
        alpha = np.where(image == header.transparent, image.dtype.type(0), image.dtype.type(opaque))
    elif image.ndim == 3 and image.shape[2] == 4:
        alpha = image[..., 3]
    else:
        raise UserError(f"image {path} has alpha that OpenCV does not find; save it as PNG")
    return np.ascontiguousarray(_upright(alpha, 1 if header.kind == "TIFF" else header.orientation))


def strips(height: int, width: int) -> Iterator[slice]:
    """Rows in groups of about a million pixels, so that what is computed of them stays small."""
    step = max(1, 2**20 // width)
    return (slice(top, top + step) for top in range(0, height, step))


def to_tensor(photo: Photo, empty: Callable[..., torch.Tensor] = torch.empty) -> torch.Tensor:
    """The photo as networks take it: (1, 3, H, W) float32 RGB in [0, 1], contiguous; bit for bit the datasets' tensor.

    Args:
        empty: allocates the result, called as torch.empty; for instance in a memory-mapped file.
    """
    height, width = photo.pixels.shape[:2]
    result = empty((1, 3, height, width), dtype=torch.float32, device=torch.device("cpu"))
    for rows in strips(height, width):
        result[0, :, rows] = torch.from_numpy(_unit(photo.pixels[rows])).permute(2, 0, 1)
    return result


def check_inside(name: str, where: str) -> str:
    """A name of an image, relative to its folder, which names its results too; returns it.

    Raises:
        UserError: if it leads out of the folder.
    """
    parts = os.path.normpath(name).split(os.sep)
    if os.path.isabs(name) or os.path.splitdrive(name)[0] or parts[0] in ("..", ".") or "\0" in name:
        raise UserError(f"{where}: {name!r} leads out of its folder, where its results would be written; rename it")
    return name


def list_images(folder: str, what: str, skip: str | None = None) -> list[str]:
    """Paths relative to ``folder`` of the images in it and below, sorted; hidden files are left out.

    Args:
        what: the option that named the folder, for the error.
        skip: a folder below to leave out, such as the results'; it need not exist.

    Raises:
        UserError: if the folder is missing or holds no image.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{what}: the folder {folder} does not exist")
    found = []
    visited = {os.path.realpath(skip)} - {os.path.realpath(folder)} if skip else set()
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


def images_by_stem(folder: str, what: str) -> dict[str, str]:
    """:func:`list_images` by their path without extension, in which a pair's images agree.

    Raises:
        UserError: also if two images have the same.
    """
    found: dict[str, str] = {}
    for name in list_images(folder, what):
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{folder}: {found[stem]} and {name} have the same name; which one is the partner?")
        found[stem] = name
    return found


def read_uint8(path: str) -> np.ndarray:
    """(H, W, 3) BGR; 16 bits are rounded to 8, gray becomes three channels, alpha is dropped."""
    return (decode_image(read_bytes(path), path) * 255).round().astype(np.uint8)
