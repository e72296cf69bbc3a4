"""Preparing a data set: many files in, many out, on all cores; stopped anywhere, a second run goes on."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Callable, NamedTuple, Sequence

import cv2
import lmdb
import numpy as np
from PIL import Image
from tqdm import tqdm

from ucdir_plugin.compat import make_lmdb_from_imgs
from ucdir_plugin.data.lmdbs import read_lmdb_names
from ucdir_plugin.data.raw import develop, read_pairs
from ucdir_plugin.utils.errors import UserError, WriteError, at_least_one, free_space
from ucdir_plugin.utils.files import remove_leftovers_of, write_atomically
from ucdir_plugin.utils.image_reading import MAX_PIXELS, image_size, list_images, read_photo


class Task(NamedTuple):
    """One file to read, and the files that come of it. Each is written whole or not at all: if there, it is done.

    Attributes:
        make: a function of a module (it is sent to other processes): ``source`` -> the images of ``targets``.
    """

    source: str
    targets: tuple[str, ...]
    make: Callable[[str], Sequence[np.ndarray]]


def crop_positions(length: int, size: int, step: int) -> list[int]:
    """Where crops of ``size`` start along an axis, ``step`` apart, the last one at the end; none if it is too short."""
    if length < size:
        return []
    starts = list(range(0, length - size + 1, step))
    return starts if starts[-1] == length - size else [*starts, length - size]


def write_png(image: np.ndarray, path: str) -> None:
    """(H, W, 3) BGR, uint8 or uint16, at a fast level of compression.

    Raises:
        WriteError: if it cannot be written.
    """
    write_atomically(cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes(), path)


def link_to(path: str, target: str) -> None:
    """Make ``target`` a link to a file, in the place of one to elsewhere; what else is there stays.

    Raises:
        WriteError: if it cannot be written.
    """
    path = os.path.abspath(path)
    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.islink(target) and os.readlink(target) != path:  # to where the images were before
            os.remove(target)
        if not os.path.lexists(target):
            os.symlink(path, target)
    except OSError as err:
        raise WriteError(f"cannot write {target}: {err.strerror}") from err


def middle_square(path: str, size: int) -> list:
    """The image's middle square, scaled to ``size`` as DGP and DDRM do: [(size, size, 3) BGR uint8].

    That is torchvision's ``center_crop`` and ``Resize`` of a Pillow image: bilinear, averaging where it shrinks.

    Raises:
        UserError: if it cannot be read, or has not 8 bits.
    """
    image = read_photo(path, MAX_PIXELS).pixels
    if image.dtype != "uint8":
        raise UserError(f"image {path} is of type {image.dtype}: 8 bits are expected")
    side = min(image.shape[:2])
    top, left = (round((n - side) / 2) for n in image.shape[:2])
    cut = Image.fromarray(image[top : top + side, left : left + side])
    return [np.asarray(cut.resize((size, size), Image.Resampling.BILINEAR))[..., ::-1]]


def same_settings(folder: str, **settings: Any) -> None:
    """Keep in ``folder`` with which settings it was prepared, so that files of others are not taken for finished.

    Raises:
        UserError: if it was prepared with others.
        WriteError: if it cannot be written.
    """
    path = os.path.join(folder, "prepared.json")
    try:
        with open(path, encoding="utf-8") as file:
            before = json.load(file)
    except FileNotFoundError:
        write_atomically(json.dumps(settings).encode(), path)
        return
    except (OSError, ValueError, RecursionError) as err:
        raise UserError(f"{path} cannot be read: remove the folder to prepare it again") from err
    if not isinstance(before, dict):
        raise UserError(f"{path} holds no settings: remove the folder to prepare it again")
    for key, value in settings.items():
        if before.get(key) != value:
            was, now = (f"no --{key}" if v is None else f"--{key} {v}" for v in (before.get(key), value))
            raise UserError(f"{folder} was prepared with {was}, not {now}: name another --out, or remove the folder")


def _check_targets(tasks: Sequence[Task]) -> None:
    sources: dict[str, str] = {}
    for task in tasks:
        for target in task.targets:
            other = sources.setdefault(target, task.source)
            if other != task.source:
                raise UserError(f"{other} and {task.source} would both become {target}: rename one of them")


def _run(task: Task) -> None:
    cv2.setNumThreads(1)
    for image, target in zip(task.make(task.source), task.targets):
        write_png(image, target)


def prepare(tasks: Sequence[Task], workers: int = 0) -> int:
    """Make the targets of all tasks that lack some, and say what was done.

    Args:
        tasks: what there is to do.
        workers: processes; 0: one for each core.

    Returns:
        exit code: 0, or 1 if some sources could not be used; each is named.

    Raises:
        UserError: if two sources would become one file; if a process was killed.
        WriteError: at the first file that cannot be written, as on a full disk; what is finished stays.
    """
    if workers < 0:
        raise UserError(f"--workers must be 0 (one for each core) or more, got {workers}")
    _check_targets(tasks)
    todo = [task for task in tasks if not all(os.path.isfile(target) for target in task.targets)]
    remove_leftovers_of([target for task in todo for target in task.targets])
    failed: dict[str, str] = {}
    workers = min(workers or os.cpu_count() or 1, len(todo))
    with contextlib.ExitStack() as stack:
        if workers > 1:
            # Not fork, which torch's threads do not survive; forkserver imports torch once for all.
            ways = multiprocessing.get_all_start_methods()
            context = multiprocessing.get_context("forkserver" if "forkserver" in ways else "spawn")
            context.set_forkserver_preload([__name__])
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=context))
            stack.callback(pool.shutdown, cancel_futures=True)
            futures = {pool.submit(_run, task): task for task in todo}
            results = ((futures[future], future.result) for future in as_completed(futures))
        else:
            results = ((task, functools.partial(_run, task)) for task in todo)
        for task, result in tqdm(results, total=len(todo), unit="file", disable=None, leave=False):
            try:
                result()
            except WriteError:
                raise
            except UserError as err:
                failed[task.source] = str(err)
            except (BrokenProcessPool, MemoryError) as err:
                raise UserError(
                    "a process ended before its work was done, perhaps for lack of memory; what is finished stays:"
                    f" run again, with fewer --workers than {workers}"
                ) from err
    for source in sorted(failed):
        print(f"failed: {failed[source]}", file=sys.stderr)
    done = sum(len(task.targets) for task in todo if task.source not in failed)
    kept = sum(len(task.targets) for task in tasks) - sum(len(task.targets) for task in todo)
    print(f"{done} images written, {kept} were there, {len(failed)} sources failed")
    return 1 if failed else 0


def cut(path: str, positions: Sequence[tuple[int, int]] = (), crop: int = 0) -> list[np.ndarray]:
    """The image in its own depth, (H, W, 3) BGR, or squares of ``crop`` pixels at these (top, left).

    Raises:
        UserError: if it cannot be read.
    """
    image = read_photo(path, MAX_PIXELS).pixels[..., ::-1]
    return [image[y : y + crop, x : x + crop].copy() for y, x in positions] or [image.copy()]


def gopro_tasks(
    source: str, out: str, part: str, crop: int | None, step: int | None, blur: str = "blur"
) -> tuple[int, list[Task]]:
    """What there is to do for a part (train, test) of GOPRO_Large.

    Args:
        blur: the folder of degraded images, beside ``sharp``.

    Returns:
        number of pairs; the tasks.

    Raises:
        UserError: for a missing folder, an image without its partner, images smaller than the crop.
    """
    root = os.path.join(source, part)
    kinds = {blur: "lq", "sharp": "gt"}
    names = [name for name in list_images(root, "--source") if os.path.basename(os.path.dirname(name)) in kinds]
    pairs: dict[str, dict[str, str]] = {}
    for name in names:
        scene, kind = os.path.split(os.path.dirname(name))
        key = f"{scene.replace('/', '_')}_{os.path.splitext(os.path.basename(name))[0]}"
        pairs.setdefault(key, {})[kinds[kind]] = os.path.join(root, name)
    if not pairs:
        raise UserError(f"--source {source}: no images in {root}/SCENE/{blur} and sharp; name the folder GOPRO_Large")
    tasks = []
    positions: list[tuple[int, int]] = []
    if crop:
        height, width = image_size(next(iter(next(iter(pairs.values())).values())))
        starts = [crop_positions(n, crop, step or default_step(crop)) for n in (height, width)]
        positions = [(y, x) for y in starts[0] for x in starts[1]]
        if not positions:
            raise UserError(f"--crop {crop} is larger than the images, {width}x{height}")
    make = functools.partial(cut, positions=tuple(positions), crop=crop or 0)
    for key, files in pairs.items():
        for kind, other in (("lq", "gt"), ("gt", "lq")):
            if kind not in files:
                raise UserError(
                    f"{files[other]} has no partner of the same name in {blur} and sharp; unpack the zip again"
                )
            if crop and image_size(files[kind]) != (height, width):
                raise UserError(f"{files[kind]} is of another size than {width}x{height}: leave out --crop")
            suffixes = [f"_y{y:04d}x{x:04d}" for y, x in positions] or [""]
            folder = os.path.join(out, part, kind)
            targets = tuple(os.path.join(folder, f"{key}{suffix}.png") for suffix in suffixes)
            tasks.append(Task(files[kind], targets, make))
    return len(pairs), tasks


def add_pair_arguments(parser: argparse.ArgumentParser) -> None:
    """What the scripts for data sets of pairs have in common on their command lines."""
    parser.add_argument("--crop", type=int, help="cut training pairs into squares of so many pixels")
    parser.add_argument("--step", type=int, help="from one square to the next (default: half of --crop)")
    parser.add_argument("--lmdb", action="store_true", help="LMDBs of the training pairs, train/lq.lmdb and gt.lmdb")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")


def check_pair_arguments(args: argparse.Namespace) -> None:
    """Look at the arguments of :func:`add_pair_arguments` together.

    Raises:
        UserError: for values that make no sense.
    """
    if args.step and not args.crop:
        raise UserError("--step goes with --crop")
    at_least_one(**{f"--{key}": getattr(args, key) for key in ("crop", "step") if getattr(args, key) is not None})


def pair_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`same_settings` compares of :func:`add_pair_arguments`."""
    return {"crop": args.crop, "step": args.step or default_step(args.crop) if args.crop else None}


def default_step(crop: int) -> int:
    """From one square to the next: half of it."""
    return max(crop // 2, 1)


def make_pair_lmdbs(out: str) -> None:
    """BasicSR's LMDBs of the training pairs below ``out``."""
    for kind in ("lq", "gt"):
        make_lmdb(os.path.join(out, "train", kind))


def make_lmdb(folder: str) -> None:
    """BasicSR's LMDB ``FOLDER.lmdb`` of the images in a folder; under another name until it is complete.

    One that is there, of images of these names, is kept.

    Raises:
        UserError: if the one that is there is of others; for a name that BasicSR's LMDBs cannot have.
        WriteError: if it cannot be written.
    """
    target, unfinished = f"{folder}.lmdb", f"{folder}.unfinished.lmdb"
    names = list_images(folder, "the folder of an LMDB")
    keys = [os.path.splitext(name)[0] for name in names]
    if os.path.exists(target):
        if read_lmdb_names(target).keys() != set(keys):
            raise UserError(f"{target} is there already, and of other images: remove it to make it again")
        print(f"{target} was there")
        return
    foreign = next((name for name in names if not name.isascii()), None)
    if foreign is not None:
        raise UserError(f"{os.path.join(folder, foreign)}: BasicSR's LMDBs take ASCII names only; rename it")
    # BasicSR's own guess is ten times the first image: too little where that one is dark.
    size = 4 * sum(os.path.getsize(os.path.join(folder, name)) + 8192 for name in names) + 2**24
    try:
        while not os.path.exists(target):
            shutil.rmtree(unfinished, ignore_errors=True)
            with contextlib.suppress(lmdb.MapFullError):  # a JPEG becomes a PNG, many times as large
                make_lmdb_from_imgs(folder, unfinished, names, keys, map_size=size)
                os.replace(unfinished, target)
            size *= 4
    except (lmdb.Error, OSError) as err:
        raise WriteError(f"cannot write {target}: {err} ({free_space(target)})") from err
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def developed(
    path: str, ratio: float, bits: int, copies: int = 1, positions: Sequence[tuple[int, int]] = (), crop: int = 0
) -> list[np.ndarray]:
    """A raw file's half-size sRGB or squares of it, all of them ``copies`` times (for as many short exposures).

    Raises:
        UserError: if it cannot be developed, or is of another size than the squares cover.
    """
    image = develop(path, ratio, bits)
    if positions and tuple(max(axis) + crop for axis in zip(*positions)) != image.shape[:2]:
        raise UserError(f"raw file {path} is of another size than the first: leave out --crop")
    return [image[y : y + crop, x : x + crop] for y, x in positions] * copies or [image] * copies


def sid_tasks(
    source: str, list_file: str, folder: str, ratio: float | None, bits: int, crop: int | None, step: int | None
) -> tuple[int, str, list[Task]]:
    """What there is to do for a part of SID. A long exposure is developed once for all of its short ones.

    Returns:
        number of pairs; a CSV of their ratios; the tasks.

    Raises:
        UserError: as :func:`ucdir_plugin.data.raw.read_pairs`; for a crop larger than the images.
    """
    pairs = read_pairs(list_file, source, None if ratio is None else (ratio, ratio))
    positions: tuple[tuple[int, int], ...] = ()
    if crop:
        height, width = develop(pairs[0].long, bits=8).shape[:2]
        starts = [crop_positions(n, crop, step or default_step(crop)) for n in (height, width)]
        positions = tuple((y, x) for y in starts[0] for x in starts[1])
        if not positions:
            raise UserError(f"--crop {crop} is larger than the images, {width}x{height}")
    suffixes = [f"_y{y:04d}x{x:04d}" for y, x in positions] or [""]

    def task(kind: str, path: str, keys: Sequence[str], amplify: float) -> Task:
        targets = (os.path.join(folder, kind, f"{key}{suffix}.png") for key in keys for suffix in suffixes)
        make = functools.partial(
            developed, ratio=amplify, bits=bits, copies=len(keys), positions=positions, crop=crop or 0
        )
        return Task(path, tuple(targets), make)

    longs: dict[str, list[str]] = {}
    for pair in pairs:
        longs.setdefault(pair.long, []).append(pair.key)
    tasks = [task("lq", pair.short, [pair.key], pair.ratio) for pair in pairs]
    tasks += [task("gt", path, keys, 1.0) for path, keys in longs.items()]
    lines = ["name,ratio", *(f"{pair.key}{suffix},{pair.ratio:g}" for pair in pairs for suffix in suffixes)]
    return len(pairs), "\n".join(lines) + "\n", tasks
