"""A photograph or a folder in, restored ones out: what tools/restore.py does.

Beside each result NAME.png lies NAME.json, which says how it was made. Both are renamed into place when they are
complete, so that an image with its JSON is a finished one, and a second run passes it over.

Several ranks (:mod:`ucdir_plugin.sharding`) each take every n-th image of all, finished or not: what another run has
done by now must not move the shares. All files of an image are written by its rank alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from tqdm import tqdm

from ucdir_plugin import imageio, memory, sharding
from ucdir_plugin.errors import UserError, WriteError, named, printable
from ucdir_plugin.files import hidden_name, is_gone, remove_leftovers_of, rename, write_atomically, writing
from ucdir_plugin.report import write_text
from ucdir_plugin.restorer import Moments, Restorer, cost, versions
from ucdir_plugin.sharding import Share

if TYPE_CHECKING:
    from ucdir_plugin.blind import BlindRestorer

Model = Union[Restorer, "BlindRestorer"]


GO_ON = "what is finished is kept: run the same command again to go on"


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
        keys = imageio.list_images(source, "-i", skip=target)
    elif os.path.isfile(source):
        root, name = os.path.split(source)
        keys = [name]
    else:
        raise UserError(f"-i {source} does not exist")
    stems = [os.path.join(target, stem) for stem in _stems(keys)]
    if os.path.isfile(source) and os.path.splitext(target)[1] and not os.path.isdir(target):
        extension = os.path.splitext(target)[1]
        imageio.check_output(extension)
        stems = [os.path.splitext(target)[0]]
    if os.path.isfile(source) and os.path.realpath(f"{stems[0]}{extension}") == os.path.realpath(source):
        raise UserError(f"-o {target} would overwrite the input: name another one")
    return [Job(key, os.path.join(root, key), stem) for key, stem in zip(keys, stems)], extension


def read_sizes(jobs: Sequence[Job]) -> Tuple[Dict[Job, Tuple[int, int]], Dict[str, str]]:
    """(height, width) of the images, by their headers; and key -> reason of those that cannot be read."""
    sizes, unreadable = {}, {}
    for job in jobs:
        try:
            sizes[job] = imageio.image_size(job.path)
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


def _is_finished(job: Job, record: Optional[Dict[str, Any]]) -> bool:
    folder = os.path.dirname(job.stem)
    return (
        record is not None
        and record["input"] == job.key
        and all(os.path.isfile(os.path.join(folder, name)) for name in record["outputs"])
    )


class _Results:
    """The files of one image: written under hidden names, then renamed together, the record first."""

    def __init__(self, job: Job, extension: str):
        self.job, self.extension = job, extension
        self.folder, self.name = os.path.split(job.stem)
        self.hidden: Dict[str, str] = {}
        self.fault: Optional[Exception] = None
        self.finished = False

    def write(self, image: torch.Tensor, photo: imageio.Photo, suffix: str = "") -> None:
        """(1, 3, H, W) in [0, 1], as NAME + suffix. What is wrong with the image itself becomes ``fault``."""
        name = f"{self.name}{suffix}{self.extension}"
        try:
            content = imageio.encode_result(image[0], photo, self.extension)
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
        for path in self.hidden.values():
            with contextlib.suppress(OSError):  # not there yet, or on a disk that has become read-only
                os.remove(path)


class _Writer:
    """Encodes and writes in a thread of its own while the next image is computed; one result waits at the most."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Optional[Future] = None

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self.wait()
        self.pending = self.pool.submit(function, *args)

    def wait(self) -> None:
        """
        Raises:
            what the last task raised.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()


class _Bar:
    """One bar over images, steps and patches, in pixels that the networks compute.

    Lines only where no terminal is, and from one of several ranks; theirs begin with the rank.
    """

    def __init__(self, work: int, share: Share):
        self.prefix = f"rank {share.rank}: " if share.world > 1 else ""
        self.bar = tqdm(
            total=work,
            disable=True if share.world > 1 else None,
            leave=False,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
        )

    def image(self, number: int, count: int, key: str) -> None:
        self.head = f"{number}/{count} {printable(key)}"
        self.bar.set_description_str(self.head)

    def step(self, step: int, steps: int) -> None:
        self.bar.set_description_str(f"{self.head} step {step + 1}/{steps}", refresh=False)

    def say(self, line: str) -> None:
        tqdm.write(f"{self.prefix}{printable(line)}", file=sys.stdout)
        sys.stdout.flush()


def restore_files(
    model: Model,
    source: str,
    target: str,
    *,
    seed: Optional[int] = None,
    samples: int = 1,
    blend: float = 1.0,
    condition: Optional[Mapping[str, Any]] = None,
    overwrite: bool = False,
    max_pixels: int = imageio.MAX_PIXELS,
    scratch: Optional[str] = None,
    share: Optional[Share] = None,
) -> int:
    """Restore an image or a folder of images; a line for each, and the failures at the end.

    With ``samples`` K > 1, NAME_sample1 ... NAME_sampleK, their mean NAME_mean, and NAME_spread, the standard
    deviation between them with white for the largest, whose value is in the JSON (``spread_white``).

    Args:
        source, target: see :func:`find_jobs`.
        seed, samples, blend, condition: see :meth:`Restorer.run`.
        overwrite: restore also what has been restored before.
        max_pixels: larger images are refused.
        scratch: a folder for the image-sized tensors of sampling, which else are in memory.
        share: which of the images are restored here; default: all.

    Returns:
        exit code: 0, or 1 if some of several images failed. Of a rank: if some of its own did.

    Raises:
        UserError: if nothing could be restored, or results cannot be written.
    """
    share = share or Share()
    model.check(samples, blend, condition)
    jobs, extension = find_jobs(source, target)
    sizes, failed = read_sizes(share.of(jobs))
    if not sizes and share.world == 1:
        _give_up(source, failed)
    _check_writable(os.path.dirname(jobs[0].stem) if os.path.isfile(source) else target)
    if scratch is not None and model.device.type != "cpu":
        raise UserError(f"scratch is for the CPU: on {model.device} the state of sampling lies in its own memory")
    empty = torch.empty if scratch is None else memory.file_backed(scratch)
    settings = model.record_settings(seed, samples, blend, condition)
    records = {job: read_record(job.stem) for job in sizes}
    clashes = _clashes(jobs, extension, samples, model)
    skipped = {job for job in sizes if not overwrite and _is_finished(job, records[job])}
    otherwise = sum(records[job]["settings"] != settings for job in skipped)
    todo = [job for job in sizes if job not in skipped]
    counted = [sizes[job] for job in todo if sizes[job][0] * sizes[job][1] <= max_pixels]
    bar = _Bar(sum(model.plan(*size).pixels for size in counted) * samples * bool(blend), share)
    remove_leftovers_of([name for job in sizes for name in _paths(job.stem, extension, samples, model.beside)])
    writer = _Writer()
    every: List[_Results] = []
    try:
        for number, job in enumerate(todo, 1):
            bar.image(number, len(todo), job.key)
            results = _Results(job, extension)
            every.append(results)
            try:
                if job in clashes:
                    raise UserError(clashes[job])
                _check_names(job, extension, samples, model.beside)
                if not overwrite:
                    _keep_foreign(results, records[job], samples, model.beside)
                if empty is torch.empty and model.device.type == "cpu":
                    _check_memory(model, sizes[job], samples)
                record = _restore_one(
                    model, job, results, writer, bar, seed, samples, blend, condition, max_pixels, empty
                )
            except WriteError:
                raise
            except (UserError, RuntimeError, MemoryError, ValueError) as err:
                if is_gone(source):
                    raise UserError(f"-i {source} is not there any more; {GO_ON}") from err
                results.fault = err
            else:
                writer.submit(results.finish, {**record, "settings": settings}, records[job], bar.say)
        writer.wait()
    except WriteError as err:
        raise WriteError(f"{err}; {GO_ON}") from err
    finally:
        writer.pool.shutdown()
        for results in every:
            results.remove_unfinished()
        bar.bar.close()
    failed.update((results.job.key, reason_of(results.fault)) for results in every if results.fault is not None)
    if skipped:
        note = f", {otherwise} of them with other settings" if otherwise else ""
        bar.say(f"{len(skipped)} finished before{note}: kept (--overwrite restores again)")
    if failed and not skipped and not any(results.finished for results in every) and share.world == 1:
        _give_up(source, failed)
    for key, reason in failed.items():
        print(f"failed: {printable(named(key, reason))}", file=sys.stderr)
    if share.world > 1:
        all_here = sharding.wait_for_others(share)
        if share.rank == 0 or not all_here:
            bar.say(_all_ranks(share, jobs, overwrite, settings, all_here))
    return 1 if failed else 0


def _all_ranks(share: Share, jobs: Sequence[Job], overwrite: bool, settings: Mapping[str, Any], ended: bool) -> str:
    """What there is now of all ranks' images, and what to do about the rest.

    Args:
        ended: whether all ranks are known to have done what they could.
    """
    missing = []
    for job in jobs:
        record = read_record(job.stem)
        if not _is_finished(job, record) or (overwrite and record["settings"] != settings):
            missing.append(job.key)
    if not missing:
        return f"all {len(jobs)} images of {share.world} ranks are finished"
    names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    found = f"{len(jobs) - len(missing)} of the {len(jobs)} images of {share.world} ranks are finished"
    if ended:
        return f"{found}, not: {names}; the reasons are above"
    return (
        f"{found}, not (yet): {names}; if no rank is left at work, run the same command again, on any number of ranks"
    )


def _restore_one(
    model: Model,
    job: Job,
    results: _Results,
    writer: _Writer,
    bar: _Bar,
    seed: Optional[int],
    samples: int,
    blend: float,
    condition: Optional[Mapping[str, Any]],
    max_pixels: int,
    empty: Callable[..., torch.Tensor],
) -> Dict[str, Any]:
    """Compute, and hand over for writing; returns the record."""
    started = time.perf_counter()
    memory.reset_peak(model.device)
    photo = imageio.read_photo(job.path, max_pixels)
    imageio.check_output(results.extension, photo, model.scale)
    doubt = model.doubt(photo)
    if doubt:
        bar.say(f"{job.key}: {doubt}")
    told = model.told(photo, condition)
    photo = model.like(photo)
    height, width = photo.pixels.shape[:2]
    lq = imageio.to_tensor(photo, empty)
    # Of the pixels only shape and type are still needed.
    photo = dataclasses.replace(photo, pixels=np.broadcast_to(photo.pixels[:1, :1].copy(), (height, width, 3)))
    drawn = model.run(
        lq,
        job.key,
        seed=seed,
        samples=samples,
        blend=blend,
        condition=told,
        empty=empty,
        progress=bar.bar.update,
        callback=lambda step, x_t, x0: bar.step(step, model.steps),
    )
    record: Dict[str, Any] = {"size": [width, height], "date": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    if told:
        record["condition"] = told
    if doubt:
        record["note"] = doubt
    moments = Moments()
    for number, result in enumerate(drawn.samples, 1):
        if samples > 1:
            moments.add(result)
        suffix = f"_sample{number}" if samples > 1 else ""
        writer.submit(results.write, result, photo, suffix)
        learned = drawn.learned()
        if learned is not None:
            for more, content in learned.files().items():
                writer.submit(results.keep, content, f"{suffix}{more}")
    if samples > 1:
        writer.submit(results.write, moments.mean, photo, "_mean")
        spread = moments.spread
        white = float(spread.max())
        gray = dataclasses.replace(photo, gray=True, alpha=None, icc_profile=None)
        writer.submit(results.write, (spread / (white or 1)).expand(-1, 3, -1, -1), gray, "_spread")
        record.update(spread_white=white, spread_mean=float(spread.mean()))
    record.update(
        cost(model, height, width, samples, blend),
        seconds=round(time.perf_counter() - started, 3),
        peak_memory=memory.peak(model.device),
        device=str(model.device),
        versions=versions(),
    )
    return record


def _check_memory(model: Model, size: Tuple[int, int], samples: int) -> None:
    need, free = model.state_bytes(*size, samples), memory.available()
    if free is not None and need > free:
        raise UserError(
            f"{size[1]}x{size[0]} pixels need {need / 2**30:.1f} GB beside the networks, {free / 2**30:.1f} GB"
            " are free: add --scratch DIR, a folder on a disk with that room"
        )


def reason_of(err: Exception) -> str:
    """Why an image could not be restored, in one line."""
    if isinstance(err, UserError):
        return str(err)
    text = str(err).strip().splitlines()[0] if str(err).strip() else "no message"
    if isinstance(err, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in text:
        return "not enough memory: take a smaller --tile"
    return f"{type(err).__name__}: {text}"


def _keep_foreign(
    results: _Results, record: Optional[Dict[str, Any]], samples: int, beside: Sequence[str] = ()
) -> None:
    """
    Raises:
        UserError: if a file that no record claims is where a result would go.
    """
    own, more = _names(results.name, results.extension, samples, beside)
    ours = [*record["outputs"], f"{results.name}.json"] if record else []
    for name in own + more:
        if name not in ours and os.path.exists(os.path.join(results.folder, name)):
            raise UserError(
                f"{os.path.join(results.folder, name)} is there already, and no record beside it says that it is a"
                " result: move it away, name another -o, or add --overwrite"
            )


def _names(stem: str, extension: str, samples: int, beside: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Of the files that an image gives: its results and record, and what lies beside them."""
    numbered = [f"_sample{i + 1}" for i in range(samples)] if samples > 1 else [""]
    suffixes = [*numbered, *(("_mean", "_spread") if samples > 1 else ())]
    results = [f"{stem}{suffix}{extension}" for suffix in suffixes]
    return [*results, f"{stem}.json"], [f"{stem}{number}{more}" for number in numbered for more in beside]


def _check_names(job: Job, extension: str, samples: int, beside: Sequence[str]) -> None:
    """
    Raises:
        UserError: if a result would have a name that is longer than file systems allow.
    """
    for path in _paths(job.stem, extension, samples, beside):
        length = len(os.fsencode(os.path.basename(path)))
        if length > 255:
            raise UserError(f"{job.key}: its result's name would have {length} bytes, 255 are possible: rename it")


def _paths(stem: str, extension: str, samples: int, beside: Sequence[str]) -> List[str]:
    own, more = _names(stem, extension, samples, beside)
    return own + more


def _clashes(jobs: List[Job], extension: str, samples: int, model: Model) -> Dict[Job, str]:
    """Images of which a file would be written over an input or another image's result: why they are not restored."""
    inputs = [(job.path, f"the input {job.key}") for job in jobs]
    inputs += [(path, f"{path}, which is read") for path in model.reads if os.path.isfile(path)]
    owners = {os.path.realpath(path): whose for path, whose in inputs}
    names = {job: _names(job.stem, extension, samples, model.beside) for job in jobs}
    found: Dict[Job, str] = {}
    for part in (0, 1):  # results come first: what lies beside gives way
        for job in jobs:
            for path in names[job][part]:
                whose = owners.setdefault(os.path.realpath(path), f"a result of {job.key}")
                if whose != f"a result of {job.key}":
                    found[job] = f"{path} would be written over {whose}: name another -o, or restore it on its own"
    return found


def _check_writable(folder: str) -> None:
    """
    Raises:
        UserError: if results cannot be written there, before hours of work.
    """
    try:
        os.makedirs(folder or ".", exist_ok=True)
        with tempfile.TemporaryFile(dir=folder or "."):
            pass
    except OSError as err:
        raise UserError(f"-o: cannot write in {folder or '.'}: {err.strerror}") from err


def _give_up(source: str, failed: Dict[str, str]) -> None:
    if os.path.isfile(source):
        raise UserError(next(iter(failed.values())))
    for key, reason in failed.items():
        print(f"failed: {printable(named(key, reason))}", file=sys.stderr)
    raise UserError(f"none of the {len(failed)} images of {source} could be restored; the reasons are above")
