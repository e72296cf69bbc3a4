"""Files that are there whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from contextlib import contextmanager, suppress
from typing import BinaryIO, Iterable, Iterator

from ucdir_plugin.utils.errors import WriteError, free_space

# .NAME.PID.tmp of atomic_write, and .NAME.PID.part, which pipeline renames only together with an image's other files.
_LEFTOVER = re.compile(r"\.{1,2}(?P<name>.+?)\.(?P<pid>\d+)\.(tmp|part|part\.\d+\.tmp)")


def hidden_name(name: str) -> str:
    """What a temporary name calls the file: a long one's beginning and digest, as names have 255 bytes at the most."""
    content = os.fsencode(name)
    if len(content) <= 200:
        return name
    return f"{name[:40]}.{hashlib.sha256(content).hexdigest()[:32]}"


@contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """An open binary file with a temporary name, flushed to the disk and renamed to ``path`` at the end of the block.

    Readers see the old file or the new one. The folder is made; after an error nothing is left behind, and what a
    killed process leaves is hidden and ends in .tmp (:func:`ucdir_plugin.utils.training_states.remove_leftovers`,
    :func:`remove_leftovers_of`).

    Raises:
        WriteError: if it cannot be written; names the path, the reason and the free space.
    """
    path = os.path.abspath(os.fspath(path))
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{hidden_name(name)}.{os.getpid()}.tmp")
    with writing(path):
        try:
            os.makedirs(folder, exist_ok=True)
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # a disk that has become read-only, or is gone, keeps it
                os.remove(temporary)
            raise


@contextmanager
def writing(path: str) -> Iterator[None]:
    """What makes ``path`` fail.

    Raises:
        WriteError: for what the storage refuses in the block; names the path, the reason and the free space.
    """
    try:
        yield
    except OSError as err:
        raise WriteError(f"cannot write {path}: {err.strerror or err} ({free_space(path)})") from err
    except RuntimeError as err:
        if "inline_container" not in str(err):  # torch.save's, which hides the reason
            raise
        raise WriteError(f"cannot write {path}: writing failed ({free_space(path)})") from err


def rename(source: str, target: str) -> None:
    """``os.replace``.

    Raises:
        WriteError: if it cannot be done.
    """
    with writing(target):
        os.replace(source, target)


def is_gone(path: str) -> bool:
    """Whether a file, or a folder that had content, is not there or holds nothing now: its disk is not mounted."""
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is None
    except NotADirectoryError:
        return False
    except OSError:
        return True


def remove_leftovers_of(paths: Iterable[str]) -> None:
    """Delete what killed processes left half-written of these files; what a living one writes is left alone."""
    wanted = {
        os.path.join(folder, hidden_name(name)) for folder, name in map(os.path.split, map(os.path.abspath, paths))
    }
    for folder in sorted({os.path.dirname(path) for path in wanted}):
        for entry in os.scandir(folder) if os.path.isdir(folder) else ():
            found = _LEFTOVER.fullmatch(entry.name)
            if found and os.path.join(folder, found["name"]) in wanted and not _is_running(int(found["pid"])):
                with suppress(FileNotFoundError):
                    os.remove(entry.path)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_atomically(content: bytes, path: str | os.PathLike) -> None:
    """Write ``content`` by :func:`atomic_write`.

    Raises:
        WriteError: if it cannot be written.
    """
    with atomic_write(path) as file:
        file.write(content)


def write_text(text: str, path: str) -> None:
    """Write a text file in UTF-8, whole or not at all.

    Raises:
        UserError: if it cannot be written.
    """
    write_atomically(text.encode("utf-8", "backslashreplace"), path)  # names of files need not be UTF-8


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file's content, 64 hexadecimal digits; computed again only when the file has changed."""
    status = os.stat(path)
    return _sha256(os.path.abspath(path), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _sha256(path: str, _modified: int, _size: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            digest.update(part)
    return digest.hexdigest()
