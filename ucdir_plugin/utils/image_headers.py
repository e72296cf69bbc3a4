"""What an image file says before its pixels: size, kind, depth, orientation, EXIF and ICC profile."""

from __future__ import annotations

import os
import re
import struct
import threading
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Iterator, Sequence

import numpy as np
from PIL import Image, PngImagePlugin
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_KINDS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")  # and TIFF, whose tags are read one by one
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
EXIF = b"Exif\0\0"
# What describes the picture and not how this TIFF stores it: description, make, model, resolution, software, date,
# artist, host, copyright; the last two are the EXIF and GPS directories.
_DESCRIPTIVE_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853)

_TEXT = 2**24  # bytes of a PNG's packed profile or text: edited photographs pass Pillow's limit of 2^20
_TILE = 2**24  # pixels
# The most that LZW, deflate and run lengths pack; 1, unpacked: colours may be of half the resolution.
_RATIOS = {1: 2, 5: 4096, 8: 1040, 32773: 64, 32946: 1040}
_SCANS = 100  # of a progressive JPEG; usual are 10, and each costs as much time as an image of its own
# Quantization of the luma at quality 50 (ITU-T T.81, table K.1).
_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56,
    14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_DIGITS = re.compile(rb"P([1-6])(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)(?:\s+|#[^\n]*\n)+(\d+)")
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7\xff]")  # behind a scan's data
_limits = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What an image file says before its pixels.

    ``height`` and ``width`` are as stored; ``transparent``: a gray level; ``packed``: a TIFF whose damage OpenCV would
    not report; ``quality``: of a JPEG, 1 .. 100.
    """

    kind: str
    height: int
    width: int
    gray: bool
    alpha: bool
    bits: int
    orientation: int = 1
    exif: bytes | None = None
    icc_profile: bytes | None = None
    transparent: int | None = None
    fault: str | None = None
    packed: bool = False
    quality: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as displayed."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


@contextmanager
def any_size() -> Iterator[None]:
    """Pillow without its limit: sizes are checked here, with a clearer line and a limit of the user's own.

    And without its warnings of damaged tags: who reads what is left of them is told by this package.
    """
    with _limits, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, _TEXT
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits


def read_header(file: BinaryIO) -> Header | None:
    """None if it is damaged or of no known kind."""
    try:
        file.seek(0)
        if file.read(4) in TIFF:
            with any_size():
                return _tiff_header(file, _tiff_tags(file))
        file.seek(0)
        with any_size(), Image.open(file, formats=_KINDS) as image:
            kind, mode, info, (width, height) = image.format, image.mode, dict(image.info), image.size
            quality = _quality_of(image) if kind in ("JPEG", "MPO") else None  # MPO: a camera's, of several pictures
        fault = None
        exif, gray = info.get("exif"), mode in _GRAY_MODES
        bits, transparent = 8, None
        if kind == "PNG":
            file.seek(24)
            bits, colour_type = file.read(2)
            gray = colour_type in (0, 4)  # Pillow's mode of 16 bits gray and alpha is RGBA
            if gray and "transparency" in info:
                transparent = info["transparency"] * (255 // (2**bits - 1) if bits < 8 else 1)
            exif = exif or _late_exif(file)
        elif kind == "PPM":
            fault = _ppm_fault(file)
        orientation, exif = _upright_exif(exif)
        alpha = "transparency" in info or mode in ("LA", "PA", "RGBA")
        icc = info.get("icc_profile")
        return Header(
            kind, height, width, gray, alpha, bits, orientation, exif, icc, transparent, fault, quality=quality
        )
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error):
        return None


def _quality_of(image: Image.Image) -> int | None:
    """Quality of a JPEG, by the table that its first component, the luma, takes."""
    layers = getattr(image, "layer", None) or [(1, 1, 1, 0)]
    table = image.quantization.get(layers[0][3])
    return jpeg_quality(table) if table and len(table) == len(_LUMA) else None


def jpeg_quality(table: Sequence[int]) -> int:
    """The quality, 1 .. 100, at which libjpeg's table of the luma is nearest to this one; exact for its own tables.

    Args:
        table: the 64 steps of a JPEG's first quantization table, in any order.
    """
    quality = np.arange(1, 101)
    scale = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)
    tables = ((np.sort(_LUMA) * scale[:, None] + 50) // 100).clip(1, 255)
    return int(quality[np.abs(tables - np.sort(table)).sum(1).argmin()])


def jpeg_fault(content: bytes) -> str | None:
    """Whether a JPEG is made to take long: each of a progressive one's scans may refine all of its pixels."""
    at, scans, progressive = 2, 0, False
    while at + 4 <= len(content):
        kind = content[at + 1]
        progressive |= kind in (0xC2, 0xCA)
        if content[at] != 0xFF or kind == 0xD9 or (kind == 0xDA and not progressive):
            break
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
        if kind == 0xDA:
            scans += 1
            found = _MARKER.search(content, at)
            if found is None or scans > _SCANS:
                break
            at = found.start()
    return f"more than {_SCANS} scans" if scans > _SCANS else None


def png_is_cut(content: bytes) -> bool:
    """Whether a chunk is said to be longer than what is left of the file; OpenCV 5 takes memory for it, up to 4 GB."""
    at = 8
    while at + 8 <= len(content):
        name = content[at + 4 : at + 8]
        at += 12 + int.from_bytes(content[at : at + 4], "big")
        if at > len(content) or name == b"IEND":
            break
    return at > len(content)


def _ppm_fault(file: BinaryIO) -> str | None:
    """OpenCV reads the numbers as they are, whatever stands for white."""
    file.seek(0)
    found = _DIGITS.match(file.read(2**12))
    if found is None:  # bitmaps have no such number
        file.seek(0)
        return None if file.read(2) in (b"P1", b"P4") else "a header of a rare kind"
    white = 255 if found[1] in b"14" else int(found[4])
    return None if white in (255, 65535) else f"{white} for white"


def _tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2:
    """The tags of a TIFF's first image, also of kinds that Pillow cannot decode."""
    file.seek(0)
    head = file.read(8)
    if b"+" in head[:4]:  # BigTIFF
        head += file.read(8)
    tags = ImageFileDirectory_v2(head)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _tiff_header(file: BinaryIO, tags: ImageFileDirectory_v2) -> Header:
    photometric, samples, bits = tags.get(262), tags.get(277, 1), max(tags.get(258, (1,)))
    colours = 3 if photometric in (2, 6, 8) else 4 if photometric == 5 else 1
    # OpenCV's own RGBA files do not say that the fourth channel is alpha.
    extra = tags.get(338, (2,) if samples > colours else ())
    gray = photometric in (0, 1)
    alpha = photometric in (0, 1, 2) and (1 in extra or 2 in extra)
    tile, (width, height) = (int(tags.get(322, 0)), int(tags.get(323, 0))), (int(tags[256]), int(tags[257]))
    fault = None
    packing = tags.get(259, 1)
    stored = sum(tags.get(279) or tags.get(325) or ())
    if stored and packing in _RATIOS and width * height * samples * bits > 8 * _RATIOS[packing] * stored:
        fault = "less data than its size needs"
    elif samples > 8:
        fault = f"{samples} channels"
    elif tile[0] * tile[1] > max(_TILE, 4 * width * height):  # unpacked whole, however small the image is
        fault = f"tiles of {tile[0]}x{tile[1]} pixels"
    elif 8 < bits < 16:
        fault = f"{bits} bits a channel"
    elif bits > 8 and photometric == 0:
        fault = "white as 0 at more than 8 bits"
    elif bits > 8 and alpha and (gray or 1 in extra):
        fault = f"{'gray and' if gray else 'colours multiplied by'} alpha at more than 8 bits"
    orientation = tags.get(274, 1)
    return Header(
        kind="TIFF",
        height=height,
        width=width,
        gray=gray,
        alpha=alpha,
        bits=bits,
        orientation=orientation if orientation in range(1, 9) else 1,
        exif=_tiff_exif(file),
        icc_profile=tags.get(34675),
        fault=fault,
        packed=bits <= 8 and packing != 1,
    )


def _tiff_exif(file: BinaryIO) -> bytes | None:
    try:
        file.seek(0)
        tags, kept = Image.Exif(), Image.Exif()
        tags.load_from_fp(file)
        for tag in _DESCRIPTIVE_TAGS:
            value = tags.get_ifd(tag) if tag in _DESCRIPTIVE_TAGS[-2:] else tags.get(tag)
            if value:
                kept[tag] = value
        return kept.tobytes() if len(kept) else None
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, struct.error):
        return None  # BigTIFF, or tags that Pillow cannot write


def _late_exif(file: BinaryIO) -> bytes | None:
    """A PNG's eXIf chunk behind the pixels: Pillow would decode the image to find it, OpenCV heeds it."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
    tail = file.read()
    start = tail.rfind(b"eXIf")
    if start < 4:
        return None
    end = start + 4 + int.from_bytes(tail[start - 4 : start], "big")
    sound = zlib.crc32(tail[start:end]).to_bytes(4, "big") == tail[end : end + 4]
    return tail[start + 4 : end] if sound else None


def _upright_exif(exif: bytes | None) -> tuple[int, bytes | None]:
    """The orientation, and the same EXIF for the turned image. Changed in place: offsets, as of maker notes, hold."""
    if not exif:
        return 1, None
    data = bytearray(exif[len(EXIF) :] if exif.startswith(EXIF) else exif)
    orientation = 1
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        end = start + 2 + 12 * count
        for entry in range(start + 2, end, 12):
            if struct.unpack_from(f"{order}H", data, entry)[0] == 0x0112:
                (orientation,) = struct.unpack_from(f"{order}H", data, entry + 8)
                struct.pack_into(f"{order}H", data, entry + 8, 1)
        struct.pack_into(f"{order}I", data, end, 0)  # the thumbnail: it shows the image unturned and unrestored
    except (KeyError, struct.error):
        pass  # cut off: what could be read counts
    return orientation if orientation in range(1, 9) else 1, EXIF + bytes(data)
