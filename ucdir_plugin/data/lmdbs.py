"""Names and sizes of the images in an LMDB as BasicSR writes it."""

from __future__ import annotations

import contextlib
import os
import re
import struct

import lmdb

from ucdir_plugin.data.samples import some_of
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import check_inside


def read_lmdb_names(root: str) -> dict[str, tuple[int, int] | None]:
    """Keys of an LMDB by its meta_info.txt -> (height, width), None where a line says none.

    A key is the name without its extension: BasicSR's reader ends it at the first dot, as in SID's 00001_00_0.1s.png.

    Raises:
        UserError: if it cannot be read, or names no image.
    """
    path = os.path.join(root, "meta_info.txt")
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        reason = getattr(err, "strerror", None) or "it is no text"
        raise UserError(f"{path} cannot be read: {reason}; io_backend lmdb reads folders that BasicSR made") from err
    names: dict[str, tuple[int, int] | None] = {}
    for line in lines:
        name, _, rest = line.partition(" (")
        shape = re.match(r"(\d+),\s*(\d+)", rest)
        names[check_inside(os.path.splitext(name)[0], path)] = (
            (int(shape.group(1)), int(shape.group(2))) if shape else None
        )
    if not names:
        raise UserError(f"{path} names no image")
    return names


def lmdb_sizes(root: str, names: dict[str, tuple[int, int] | None]) -> dict[str, tuple[int, int]]:
    """(height, width) of the PNGs among the images that an LMDB's meta_info.txt names, or of some of very many.

    Raises:
        UserError: if the LMDB holds others than these.
    """
    sizes = {}
    try:
        with contextlib.ExitStack() as stack:
            base = stack.enter_context(lmdb.open(root, readonly=True, lock=False, readahead=False))
            # Reading beyond the end of a file that is mapped into memory ends the process without a word.
            size = os.path.getsize(os.path.join(root, "data.mdb"))
            whole = (base.info()["last_pgno"] + 1) * base.stat()["psize"]
            if size < whole:
                raise UserError(f"LMDB {root} is cut short: {size} of {whole} bytes; copy it or make it again")
            reader = stack.enter_context(base.begin(buffers=True))
            for name in some_of(list(names)):
                image = reader.get(name.encode())
                if image is None:
                    raise UserError(f"LMDB {root} has no image {name}, which its meta_info.txt names; make it again")
                if bytes(image[:8]) == b"\x89PNG\r\n\x1a\n" and len(image) >= 24:
                    width, height = struct.unpack(">II", image[16:24])
                    sizes[name] = height, width
                    if (names[name] or sizes[name]) != sizes[name]:
                        h, w = names[name]
                        raise UserError(
                            f"LMDB {root}: {name} is {width}x{height}, and {w}x{h} by meta_info.txt: it was made from"
                            " other images; make it again"
                        )
            held = base.stat()["entries"]
    except lmdb.Error as err:
        if "already open" in str(err):  # by another data set of this process, which has looked
            return {}
        raise UserError(f"LMDB {root} cannot be read: {err}; make it again") from err
    if held != len(names):
        raise UserError(f"LMDB {root} holds {held} images, and its meta_info.txt names {len(names)}; make it again")
    return sizes
