"""Raw files of "Learning to See in the Dark" (SID): pairing by its lists, developing as half-size sRGB. Needs rawpy.

Half-size: each 2x2 of the Bayer pattern becomes one pixel, so that nothing is interpolated.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import numpy as np

from ucdir_plugin.utils.errors import NotAvailable, UserError

MAX_RATIO = 300.0
"""The data set's own: 10 s / 0.033 s counts as 300."""


class RawPair(NamedTuple):
    """A short exposure, its long one, and the exposure ratio between them."""

    key: str
    short: str
    long: str
    ratio: float


def _rawpy() -> Any:
    try:
        import rawpy
    except ImportError as err:
        raise NotAvailable("raw files need rawpy: pip install rawpy, or this package with [raw]") from err
    return rawpy


def _seconds(path: str) -> float:
    found = re.search(r"_(\d+(?:\.\d+)?)s\.[^.]+$", path)
    if not found or not float(found.group(1)):
        raise UserError(f"{path}: no exposure time in the name, such as 00001_00_0.1s.ARW")
    return float(found.group(1))


def read_pairs(list_file: str, root: str, ratio: tuple[float, float] | None = None) -> list[RawPair]:
    """Pairs of an official list: ``./Sony/short/00001_00_0.1s.ARW ./Sony/long/00001_00_10s.ARW ISO200 F8`` a line.

    Args:
        root: folder that the list's paths start from.
        ratio: only pairs of an exposure ratio from .. to (to 1 %); None: all.

    Raises:
        UserError: if it cannot be read, names a file that is not there, or no pair of this ratio.
    """
    try:
        with open(list_file, encoding="utf-8") as file:
            lines = [line.split() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(
            f"list {list_file} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}"
        ) from err
    pairs = []
    for number, words in enumerate(lines, 1):
        if len(words) < 2:
            raise UserError(f"list {list_file}, line {number}: a short and a long exposure are expected")
        short, long = (os.path.normpath(os.path.join(root, word)) for word in words[:2])
        found = min(_seconds(long) / _seconds(short), MAX_RATIO)
        if ratio is not None and not 0.99 * ratio[0] <= found <= 1.01 * ratio[1]:
            continue
        for path, other in ((short, "long"), (long, "short")):
            if not os.path.isfile(path):
                partner = long if other == "long" else short
                raise UserError(f"{path} is missing, of which {partner} is the {other} exposure (list {list_file})")
        pairs.append(RawPair(os.path.splitext(os.path.basename(short))[0], short, long, found))
    if not pairs:
        what = "" if ratio is None else " of exposure ratio {:g} to {:g}".format(*ratio)
        raise UserError(f"list {list_file} names no pair{what}")
    return pairs


def _sizes(raw: Any) -> Any:
    if not hasattr(raw.sizes, "crop_width"):
        raise NotAvailable("raw files need rawpy 0.25 or later, which tells the camera's crop: pip install -U rawpy")
    return raw.sizes


def _camera_crop(image: np.ndarray, sizes: Any) -> np.ndarray:
    """The camera's own picture of the half-size image of all pixels that see light, upright; all where it names none.

    Libraw keeps a border that cameras cut off: of SID's Sony 4256x2848 pixels, of which the picture is 4240x2832.
    """
    if sizes.crop_width and sizes.crop_height:
        top, left = (sizes.crop_top_margin - sizes.top_margin) // 2, (sizes.crop_left_margin - sizes.left_margin) // 2
        bottom, right = top + sizes.crop_height // 2, left + sizes.crop_width // 2
        if 0 <= top < bottom <= image.shape[0] and 0 <= left < right <= image.shape[1]:
            image = image[top:bottom, left:right]
    return np.rot90(image, {3: 2, 5: 1, 6: 3}.get(sizes.flip, 0))


def develop(path: str, ratio: float = 1.0, bits: int = 16) -> np.ndarray:
    """Half-size sRGB of a raw file: black level, ``ratio``, camera white balance; no automatic brightness.

    The sensor's values above black are multiplied by ``ratio`` and cut at white, as if exposed longer. Libraw's default
    curve (BT.709), as in the data set's own code; unlike there, white is the camera's, not the image's largest value,
    and what the camera's metadata cut off is cut off (which makes SID's 2120x1416, as in the paper).

    Returns:
        (H / 2, W / 2, 3) BGR, uint8 or uint16 by ``bits``.

    Raises:
        NotAvailable: without rawpy, or with one before 0.25.
        UserError: if it cannot be read, is cut short, or is of a sensor without a Bayer pattern.
    """
    rawpy = _rawpy()
    try:
        with rawpy.imread(path) as raw:
            pattern = raw.raw_pattern
            if pattern is None or pattern.shape != (2, 2) or raw.num_colors != 3:
                raise UserError(f"raw file {path}: its sensor has no Bayer pattern; only those are read")
            pixels, sizes = raw.raw_image_visible, _sizes(raw)  # its flip becomes the one below
            if ratio != 1:
                black = np.asarray(raw.black_level_per_channel, np.float32)[raw.raw_colors_visible]
                amplified = (pixels - black) * np.float32(ratio) + black
                pixels[:] = np.clip(np.round(amplified), 0, raw.white_level).astype(pixels.dtype)
            image = raw.postprocess(
                use_camera_wb=True,
                half_size=True,
                no_auto_bright=True,
                output_bps=bits,
                adjust_maximum_thr=0.0,
                user_flip=0,
            )
            image = _camera_crop(image, sizes)
    except (rawpy.LibRawError, OSError) as err:
        reason = err.args[0].decode() if err.args and isinstance(err.args[0], bytes) else err
        raise UserError(f"raw file {path} cannot be read: it is damaged, cut short or no raw file ({reason})") from err
    return np.ascontiguousarray(image[..., ::-1])
