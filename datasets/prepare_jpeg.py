"""Lay out photographs for JPEG restoration; the JPEGs themselves are made on the fly.

python datasets/prepare_jpeg.py --source ILSVRC2012/train --out datasets/ImageNet/train
    for training: links to the images of at least --least pixels a side, subfolders and all
python datasets/prepare_jpeg.py --source ILSVRC2012/val --out datasets/ImageNet/val_1k --size 256 --list val_1k.txt
    for the test: the images of a list (a name or path below --source a line, with extension or without; a number behind
    it is ignored: DGP's list fits), their middle squares scaled to --size as DGP and DDRM do, as PNG

A second run goes on where the first was stopped.
"""

import argparse
import functools
import os
import sys

from ucdir_plugin.data.preparation import Task, link_to, middle_square, prepare, same_settings
from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError, WriteError, at_least_one, did_you_mean
from ucdir_plugin.utils.image_reading import EXTENSIONS, image_size, list_images


def read_list(path: str) -> list:
    """Read the list file: one image a line."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as err:
        raise UserError(f"--list {path} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}") from err
    if not lines:
        raise UserError(f"--list {path} names no image")
    return lines


def stem(name: str) -> str:
    """A path without the extension of an image."""
    name = os.path.normpath(name)
    return os.path.splitext(name)[0] if name.lower().endswith(EXTENSIONS) else name


def choose(lines: list, names: list, where: str, source: str) -> list:
    """Choose those images below --source that a list names: by path, or by file name where only one has it."""
    by_path, by_file = {}, {}
    for name in names:
        by_path[name] = [name]
        by_path.setdefault(stem(name), []).append(name)
        by_file.setdefault(os.path.basename(stem(name)), []).append(name)
    chosen = {}
    for line in lines:
        words = line, line.split()[0]  # a name may have spaces, or a number behind it
        keys = [*map(os.path.normpath, words), *map(stem, words)]
        found = next((by_path[key] for key in keys if key in by_path), None)
        if found is None:
            found = next((by_file[key] for key in keys if key in by_file), None)
        if found is None:  # a list with folders, images without
            flat = {stem(name): [name] for name in names if "/" not in name}
            found = flat.get(os.path.basename(keys[-1]))
        if found is None:
            hint = did_you_mean(os.path.basename(keys[-1]), by_file)
            raise UserError(f"--list {where}: {keys[-1]} is not below {source}; {hint}")
        if len(found) > 1:
            raise UserError(f"--list {where}: {line} may be {found[0]} or {found[1]}: give its path and extension")
        chosen[found[0]] = None
    return list(chosen)


def main() -> int:
    """Lay out the images as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of images")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--list", metavar="FILE", help="only these, by name below --source (with or without extension)")
    parser.add_argument("--size", type=int, help="cut out the middle at this size, as PNG; else images are linked")
    parser.add_argument("--least", type=int, default=256, help="leave out smaller images (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    args = parser.parse_args()
    at_least_one(**{"--size": 1 if args.size is None else args.size, "--least": args.least})
    if os.path.realpath(args.source) == os.path.realpath(args.out):
        raise UserError(f"--out {args.out} is the folder of the images: name another one")
    names = list_images(args.source, "--source", skip=args.out)
    if args.list:
        names = choose(read_list(args.list), names, args.list, args.source)
    if args.size:
        stems = [os.path.join(args.out, os.path.splitext(name)[0].replace(os.sep, "_")) for name in names]
        same_settings(args.out, size=args.size)
        make = functools.partial(middle_square, size=args.size)
        tasks = [Task(os.path.join(args.source, name), (f"{stem}.png",), make) for name, stem in zip(names, stems)]
        return prepare(tasks, args.workers)
    return link(args.source, args.out, names, args.least)


def link(source: str, out: str, names: list, least: int) -> int:
    """Link the chosen images into the set, without those below the least size; returns the exit code."""
    linked = small = 0
    failed = []
    for name in names:
        path, target = os.path.abspath(os.path.join(source, name)), os.path.join(out, name)
        try:
            if min(image_size(path)) < least:
                small += 1
                continue
            link_to(path, target)
            linked += 1
        except WriteError:
            raise
        except UserError as err:
            failed.append(str(err))
    for reason in failed:
        print(f"failed: {reason}", file=sys.stderr)
    print(f"{linked} images linked, {small} below {least} pixels a side left out, {len(failed)} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
