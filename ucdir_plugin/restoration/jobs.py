"""Which images a folder has to restore, the names of their results, and what is finished already."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections import Counter
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch

from ucdir_plugin.restoration.base import Restorer
from ucdir_plugin.utils import image_reading, image_writing
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import hidden_name, rename, write_atomically, write_text, writing


class Job(NamedTuple):
    """An image to restore.

    Attributes:
        key: its path relative to the input folder, which names it to the noise, as in validation and test.
        path: where it is.
        stem: path of its results without their extension.
    """

    key: str
    path: str
    stem: str


def find_jobs(source: str, target: str) -> Tuple[List[Job], str]:
    """What there is to do; nothing is opened yet.

    Args:
        source: an image, or a folder with images in it and below.
        target: a folder; for one image also a file with an image's extension.

    Returns:
        jobs, in the order of their keys; extension of the results.

    Raises:
        UserError: if there is no image, or no place for results.
    """
    root, extension = source, ".png"
    if os.path.isdir(source):
        if os.path.realpath(source) == os.path.realpath(target):
            raise UserError(f"-o {target} is the folder of the input: name another one, nothing is overwritten there")
        keys = image_reading.list_images(source, "-i", skip=target)
    elif os.path.isfile(source):
        root, name = os.path.split(source)
        keys = [name]
    else:
        raise UserError(f"-i {source} does not exist")
    stems = [os.path.join(target, stem) for stem in _stems(keys)]
    if os.path.isfile(source) and os.path.splitext(target)[1] and not os.path.isdir(target):
        extension = os.path.splitext(target)[1]
        image_writing.check_output(extension)
        stems = [os.path.splitext(target)[0]]
    if os.path.isfile(source) and os.path.realpath(f"{stems[0]}{extension}") == os.path.realpath(source):
        raise UserError(f"-o {target} would overwrite the input: name another one")
    return [Job(key, os.path.join(root, key), stem) for key, stem in zip(keys, stems)], extension


def read_sizes(jobs: Sequence[Job]) -> Tuple[Dict[Job, Tuple[int, int]], Dict[str, str]]:
    """(height, width) of the images, by their headers; and key -> reason of those that cannot be read."""
    sizes, unreadable = {}, {}
    for job in jobs:
        try:
            sizes[job] = image_reading.image_size(job.path)
        except UserError as err:
            unreadable[job.key] = str(err)
    return sizes, unreadable


def _stems(keys: List[str]) -> List[str]:
    """Keys without their extension, but where two would be the same: a.jpg and a.png become a_jpg and a_png."""
    plain = [os.path.splitext(key)[0] for key in keys]
    count = Counter(plain)
    return [stem if count[stem] == 1 else f"{stem}_{os.path.splitext(key)[1][1:]}" for key, stem in zip(keys, plain)]


def read_record(stem: str) -> Optional[Dict[str, Any]]:
    """The JSON of an earlier run beside ``stem``; None if there is none of ours."""
    unreadable = (OSError, ValueError, RecursionError)
    with contextlib.suppress(*unreadable), open(f"{stem}.json", encoding="utf-8") as file:
        record = json.load(file)
        if isinstance(record, dict) and {"input", "outputs", "settings"} <= record.keys():
            outputs = record["outputs"]
            if isinstance(outputs, list) and outputs and all(isinstance(name, str) for name in outputs):
                return record
    return None


def main_output(record: Dict[str, Any]) -> str:
    """Name of the result: of several samples their mean."""
    return next((name for name in record["outputs"] if "_mean." in name), record["outputs"][0])


def is_finished(job: Job, record: Optional[Dict[str, Any]]) -> bool:
    """Whether an image's record and all its results are there."""
    folder = os.path.dirname(job.stem)
    return (
        record is not None
        and record["input"] == job.key
        and all(os.path.isfile(os.path.join(folder, name)) for name in record["outputs"])
    )


class ResultFiles:
    """The files of one image: written under hidden names, then renamed together, the record first."""

    def __init__(self, job: Job, extension: str):
        self.job, self.extension = job, extension
        self.folder, self.name = os.path.split(job.stem)
        self.hidden: Dict[str, str] = {}
        self.fault: Optional[Exception] = None
        self.finished = False

    def write(self, image: torch.Tensor, photo: image_reading.Photo, suffix: str = "") -> None:
        """(1, 3, H, W) in [0, 1], as NAME + suffix. What is wrong with the image itself becomes ``fault``."""
        name = f"{self.name}{suffix}{self.extension}"
        try:
            content = image_writing.encode_result(image[0], photo, self.extension)
        except (UserError, MemoryError) as err:
            self.fault = err
            return
        self._write_hidden(content, name)

    def keep(self, content: bytes, suffix: str) -> None:
        """A file beside the image, NAME + suffix with its extension."""
        self._write_hidden(content, f"{self.name}{suffix}")

    def _write_hidden(self, content: bytes, name: str) -> None:
        self.hidden[name] = os.path.join(self.folder, f".{hidden_name(name)}.{os.getpid()}.part")
        write_atomically(content, self.hidden[name])

    def finish(self, record: Dict[str, Any], earlier: Optional[Dict[str, Any]], say: Callable[[str], None]) -> None:
        """Write the record and rename the files into place; the old ones go first."""
        if self.fault is not None:
            return
        record = {"input": self.job.key, "outputs": list(self.hidden), **record}
        # The file that is renamed last goes first: without it, no mix of old and new is taken for finished.
        stale = set(earlier["outputs"] if earlier else ()) - set(record["outputs"])
        for name in [*stale, record["outputs"][-1]]:
            path = os.path.join(self.folder, os.path.basename(name))
            with writing(path), contextlib.suppress(FileNotFoundError):
                os.remove(path)
        write_text(json.dumps(record, indent=1), f"{self.job.stem}.json")
        for name in record["outputs"]:
            rename(self.hidden[name], os.path.join(self.folder, name))
            del self.hidden[name]
        self.finished = True
        say(f"{self.job.key} -> {os.path.join(self.folder, main_output(record))}  {record['seconds']:.1f} s")

    def remove_unfinished(self) -> None:
        """Delete what was not renamed into place."""
        for path in self.hidden.values():
            with contextlib.suppress(OSError):  # not there yet, or on a disk that has become read-only
                os.remove(path)


def keep_foreign(
    results: ResultFiles, record: Optional[Dict[str, Any]], samples: int, extra_suffixes: Sequence[str] = ()
) -> None:
    """Refuse to write over files that are nobody's results.

    Raises:
        UserError: if a file that no record claims is where a result would go.
    """
    own, more = _result_names(results.name, results.extension, samples, extra_suffixes)
    ours = [*record["outputs"], f"{results.name}.json"] if record else []
    for name in own + more:
        if name not in ours and os.path.exists(os.path.join(results.folder, name)):
            raise UserError(
                f"{os.path.join(results.folder, name)} is there already, and no record beside it says that it is a"
                " result: move it away, name another -o, or add --overwrite"
            )


def _result_names(
    stem: str, extension: str, samples: int, extra_suffixes: Sequence[str]
) -> Tuple[List[str], List[str]]:
    """Names of the files that an image gives: its results and record, and what lies beside them."""
    numbered = [f"_sample{i + 1}" for i in range(samples)] if samples > 1 else [""]
    suffixes = [*numbered, *(("_mean", "_spread") if samples > 1 else ())]
    results = [f"{stem}{suffix}{extension}" for suffix in suffixes]
    return [*results, f"{stem}.json"], [f"{stem}{number}{more}" for number in numbered for more in extra_suffixes]


def check_names(job: Job, extension: str, samples: int, extra_suffixes: Sequence[str]) -> None:
    """Refuse results with names that no file system takes.

    Raises:
        UserError: if a result would have a name that is longer than file systems allow.
    """
    for path in result_paths(job.stem, extension, samples, extra_suffixes):
        length = len(os.fsencode(os.path.basename(path)))
        if length > 255:
            raise UserError(f"{job.key}: its result's name would have {length} bytes, 255 are possible: rename it")


def result_paths(stem: str, extension: str, samples: int, extra_suffixes: Sequence[str]) -> List[str]:
    """Paths of all files that an image gives."""
    own, more = _result_names(stem, extension, samples, extra_suffixes)
    return own + more


def find_clashes(jobs: List[Job], extension: str, samples: int, model: Restorer) -> Dict[Job, str]:
    """Images of which a file would be written over an input or another image's result: why they are not restored."""
    inputs = [(job.path, f"the input {job.key}") for job in jobs]
    inputs += [(path, f"{path}, which is read") for path in model.input_files if os.path.isfile(path)]
    owners = {os.path.realpath(path): whose for path, whose in inputs}
    names = {job: _result_names(job.stem, extension, samples, model.extra_suffixes) for job in jobs}
    found: Dict[Job, str] = {}
    for part in (0, 1):  # results come first: what lies beside gives way
        for job in jobs:
            for path in names[job][part]:
                whose = owners.setdefault(os.path.realpath(path), f"a result of {job.key}")
                if whose != f"a result of {job.key}":
                    found[job] = f"{path} would be written over {whose}: name another -o, or restore it on its own"
    return found


def check_writable(folder: str) -> None:
    """Find out before hours of work whether results can be written.

    Raises:
        UserError: if results cannot be written there, before hours of work.
    """
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with tempfile.TemporaryFile(dir=folder or "."):
            pass
    except OSError as err:
        raise UserError(f"-o: cannot write in {folder or '.'}: {err.strerror}") from err
