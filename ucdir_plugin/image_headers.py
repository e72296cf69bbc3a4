"""What an image file says before its pixels: size, kind, depth, orientation, EXIF and ICC profile."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Iterator

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

_KINDS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")  # and TIFF, whose tags are read one by one
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "F")
EXIF = b"Exif\0\0"
# What describes the picture and not how this TIFF stores it: description, make, model, resolution, software, date,
# artist, host, copyright; the last two are the EXIF and GPS directories.
_DESCRIPTIVE_TAGS = (270, 271, 272, 282, 283, 296, 305, 306, 315, 316, 33432, 34665, 34853)

_size_limit = threading.Lock()


@dataclass(frozen=True)
class Header:
    """What a file says before its pixels. ``height`` and ``width`` as stored; ``transparent``: a gray level."""

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

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) as displayed."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


@contextmanager
def any_size() -> Iterator[None]:
    """Pillow without its limit: sizes are checked here, with a clearer line and a limit of the user's own."""
    with _size_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def read_header(file: BinaryIO) -> Header | None:
    """None if it is damaged or of no known kind."""
    try:
        tags = _tiff_tags(file)
        if tags is not None:
            return _tiff_header(file, tags)
        file.seek(0)
        with any_size(), Image.open(file, formats=_KINDS) as image:
            kind, mode, info, (width, height) = image.format, image.mode, dict(image.info), image.size
        exif, gray = info.get("exif"), mode in _GRAY_MODES
        bits, transparent = 8, None
        if kind == "PNG":
            file.seek(24)
            bits, colour_type = file.read(2)
            gray = colour_type in (0, 4)  # Pillow's mode of 16 bits gray and alpha is RGBA
            if gray and "transparency" in info:
                transparent = info["transparency"] * (255 // (2**bits - 1) if bits < 8 else 1)
            exif = exif or _late_exif(file)
        orientation, exif = _upright_exif(exif)
        alpha = "transparency" in info or mode in ("LA", "PA", "RGBA")
        icc = info.get("icc_profile")
        return Header(kind, height, width, gray, alpha, bits, orientation, exif, icc, transparent)
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, OverflowError, struct.error):
        return None


def _tiff_tags(file: BinaryIO) -> ImageFileDirectory_v2 | None:
    """The tags of a TIFF's first image, also of kinds that Pillow cannot decode; None if it is no TIFF."""
    file.seek(0)
    head = file.read(8)
    if head[:4] not in TIFF:
        return None
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
    fault = None
    if 8 < bits < 16:
        fault = f"{bits} bits a channel"
    elif bits > 8 and photometric == 0:
        fault = "white as 0 at more than 8 bits"
    elif bits > 8 and alpha and (gray or 1 in extra):
        fault = f"{'gray and' if gray else 'colours multiplied by'} alpha at more than 8 bits"
    orientation = tags.get(274, 1)
    return Header(
        kind="TIFF",
        height=int(tags[257]),
        width=int(tags[256]),
        gray=gray,
        alpha=alpha,
        bits=bits,
        orientation=orientation if orientation in range(1, 9) else 1,
        exif=_tiff_exif(file),
        icc_profile=tags.get(34675),
        fault=fault,
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
