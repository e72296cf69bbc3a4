"""Errors that a user can mend: one line, exit code 2, no traceback."""

from __future__ import annotations

import difflib
import errno
import math
import os
import shutil
import unicodedata
from typing import Any, Iterable, Optional


def printable(text: str) -> str:
    """With escapes for what would break a line or steer a terminal: names of files may hold anything."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNPRINTABLE else char for char in text
    )


_UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (as to turn the direction), half a character, lines


class UserError(Exception):
    """Bad input. The message is one line that names the thing and the cure."""

    def __str__(self) -> str:
        text = " ".join(super().__str__().split())
        # A DataLoader worker re-raises with its traceback as the message: keep the last statement of it.
        return printable(text.rsplit("UserError: ", 1)[-1])


class Stopped(BaseException):
    """SIGTERM, as a launcher or a cluster sends it: an exception, so that nothing half-written is left."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}; run the same command again to go on")
        self.number = number


class ImageError(UserError):
    """One image cannot be restored; others can."""


class NotAvailable(UserError):
    """Something optional, a package or a file of weights, is not there; the message says how to get it.

    Args:
        file: the :class:`ucdir_plugin.utils.downloads.WeightsFile` that is missing, if it is one.
    """

    def __init__(self, message: str, file: Any = None):
        super().__init__(message)
        self.file = file


class NotMeasurable(ValueError):
    """A metric has no value for this image (too small, constant, ...); the message says why."""


class WriteError(UserError):
    """A file cannot be written: what follows could not be either."""


STORAGE = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EROFS", "EIO", "ESTALE", "ENOTCONN", "EHOSTDOWN", "ETIMEDOUT", "ENODEV", "ENXIO")
    if hasattr(errno, name)
)
"""What the system says of a full, read-only or broken disk, or one of another machine that does not answer."""


def free_space(path: str) -> str:
    """Free space of the disk that ``path`` is on, or would be, in words."""
    folder = os.path.abspath(path)
    while not os.path.isdir(folder) and folder != os.path.dirname(folder):
        folder = os.path.dirname(folder)
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:.0f} MB free"
        if hasattr(os, "statvfs") and os.statvfs(folder).f_files and not os.statvfs(folder).f_favail:
            free += ", but room for no more files"  # no inodes
        return free
    except OSError:  # the disk does not even say that
        return "free space unknown"


def named(key: str, reason: str) -> str:
    """A reason with the image that it is of, once."""
    return reason if reason.startswith(f"{key}: ") else f"{key}: {reason}"


def at_least_one(**values: int) -> None:
    """Refuse counts below 1.

    Raises:
        UserError: naming the first value below 1.
    """
    for name, value in values.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")


def at_least(least: float, where: str, **values: Optional[float]) -> None:
    """Refuse numbers below a bound.

    Raises:
        UserError: naming the first value, but None, that is below ``least`` or not finite.
    """
    for name, value in values.items():
        if value is not None and not (math.isfinite(value) and value >= least):
            raise UserError(f"{where}: {name} must be a number of at least {least}, got {value}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Hint for a wrong name: the nearest known ones, or all of them if few and none is near."""
    names = sorted(str(k) for k in known)
    lowered = {n.lower(): n for n in names}
    near = [lowered[m] for m in difflib.get_close_matches(str(name).lower(), lowered, n=3, cutoff=0.6)]
    if near:
        return f"did you mean {' or '.join(repr(n) for n in near)}?"
    if len(names) <= 12:
        return f"known: {', '.join(names)}"
    return f"none of the {len(names)} known names is near"
