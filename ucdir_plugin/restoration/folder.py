"""A photograph or a folder in, restored ones out: what tools/restore.py does.

Beside each result NAME.png lies NAME.json, which says how it was made. Both are renamed into place when they are
complete, so that an image with its JSON is a finished one, and a second run passes it over.

Several ranks (:mod:`ucdir_plugin.utils.ranks`) each take every n-th image of all, finished or not: what another run has
done by now must not move the shares. All files of an image are written by its rank alone.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from tqdm import tqdm

from ucdir_plugin.restoration.base import Restorer
from ucdir_plugin.restoration.jobs import (
    Job,
    ResultFiles,
    check_names,
    check_writable,
    find_clashes,
    find_jobs,
    is_finished,
    keep_foreign,
    read_record,
    read_sizes,
    result_paths,
)
from ucdir_plugin.restoration.learned import Learned
from ucdir_plugin.restoration.restore import restore_photo
from ucdir_plugin.utils import image_reading, image_writing, memory, ranks
from ucdir_plugin.utils.errors import UserError, WriteError, named, printable
from ucdir_plugin.utils.files import is_gone, remove_leftovers_of
from ucdir_plugin.utils.image_reading import Photo
from ucdir_plugin.utils.ranks import Share

GO_ON = "what is finished is kept: run the same command again to go on"


class _Writer:
    """Encodes and writes in a thread of its own while the next image is computed; one result waits at the most."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Optional[Future] = None

    def submit(self, function: Callable[..., None], *args: Any) -> None:
        self.wait()
        self.pending = self.pool.submit(function, *args)

    def wait(self) -> None:
        """Wait for the last task.

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
    model: Restorer,
    source: str,
    target: str,
    *,
    seed: Optional[int] = None,
    samples: int = 1,
    blend: float = 1.0,
    condition: Optional[Mapping[str, Any]] = None,
    overwrite: bool = False,
    max_pixels: int = image_reading.MAX_PIXELS,
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
    sizes, failed = read_sizes(share.take(jobs))
    if not sizes and share.world == 1:
        _give_up(source, failed)
    check_writable(os.path.dirname(jobs[0].stem) if os.path.isfile(source) else target)
    if scratch is not None and model.device.type != "cpu":
        raise UserError(f"scratch is for the CPU: on {model.device} the state of sampling lies in its own memory")
    empty = torch.empty if scratch is None else memory.file_backed(scratch)
    settings = model.record_settings(seed, samples, blend, condition)
    records = {job: read_record(job.stem) for job in sizes}
    clashes = find_clashes(jobs, extension, samples, model)
    skipped = {job for job in sizes if not overwrite and is_finished(job, records[job])}
    otherwise = sum(records[job]["settings"] != settings for job in skipped)
    todo = [job for job in sizes if job not in skipped]
    counted = [sizes[job] for job in todo if sizes[job][0] * sizes[job][1] <= max_pixels]
    bar = _Bar(sum(model.plan(*size).pixels for size in counted) * samples * bool(blend), share)
    remove_leftovers_of(
        [name for job in sizes for name in result_paths(job.stem, extension, samples, model.extra_suffixes)]
    )
    writer = _Writer()
    every: List[ResultFiles] = []
    try:
        for number, job in enumerate(todo, 1):
            bar.image(number, len(todo), job.key)
            results = ResultFiles(job, extension)
            every.append(results)
            try:
                if job in clashes:
                    raise UserError(clashes[job])
                check_names(job, extension, samples, model.extra_suffixes)
                if not overwrite:
                    keep_foreign(results, records[job], samples, model.extra_suffixes)
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
        all_here = ranks.wait_for_others(share)
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
        if not is_finished(job, record) or (overwrite and record["settings"] != settings):
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
    model: Restorer,
    job: Job,
    results: ResultFiles,
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

    def ready(photo: Photo, warning: Optional[str]) -> None:
        image_writing.check_output(results.extension, photo, model.scale)
        if warning:
            bar.say(f"{job.key}: {warning}")

    def keep(photo: Photo, number: int, sample: torch.Tensor, learned: Optional[Learned]) -> None:
        suffix = f"_sample{number}" if samples > 1 else ""
        writer.submit(results.write, sample, photo, suffix)
        for more, content in learned.files().items() if learned is not None else ():
            writer.submit(results.keep, content, f"{suffix}{more}")

    done = restore_photo(
        model,
        lambda: image_reading.read_photo(job.path, max_pixels),
        job.key,
        keep,
        seed=seed,
        samples=samples,
        blend=blend,
        condition=condition,
        ready=ready,
        empty=empty,
        progress=bar.bar.update,
        callback=lambda step, x_t, x0: bar.step(step, model.steps),
    )
    height, width = done.photo.pixels.shape[:2]
    record = {"size": [width, height], "date": time.strftime("%Y-%m-%d %H:%M:%S %z"), **done.record}
    if done.moments is not None:
        writer.submit(results.write, done.moments.mean, done.photo, "_mean")
        spread = done.moments.spread
        white = float(spread.max())
        gray = dataclasses.replace(done.photo, gray=True, alpha=None, icc_profile=None)
        writer.submit(results.write, (spread / (white or 1)).expand(-1, 3, -1, -1), gray, "_spread")
        record.update(spread_white=white, spread_mean=float(spread.mean()))
    record["seconds"] = round(time.perf_counter() - started, 3)
    return record


def _check_memory(model: Restorer, size: Tuple[int, int], samples: int) -> None:
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


def _give_up(source: str, failed: Dict[str, str]) -> None:
    if os.path.isfile(source):
        raise UserError(next(iter(failed.values())))
    for key, reason in failed.items():
        print(f"failed: {printable(named(key, reason))}", file=sys.stderr)
    raise UserError(f"none of the {len(failed)} images of {source} could be restored; the reasons are above")
