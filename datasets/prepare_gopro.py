"""Lay out the GoPro deblurring set, from the unpacked official zip (GOPRO_Large).

python datasets/prepare_gopro.py --source GOPRO_Large --out datasets/GoPro --crop 512 --step 256

GOPRO_Large/train/GOPR0372_07_00/blur/000047.png and .../sharp/000047.png become GoPro/train/lq/ and GoPro/train/gt/
GOPR0372_07_00_000047.png; --crop cuts the training pairs up, which reads faster; the test pairs stay whole. --lmdb
writes BasicSR's LMDBs of the training pairs besides. A second run goes on where the first was stopped.

The set has two kinds of blur: `blur`, which MPRNet, HINet and most networks since are trained and measured on, and
`blur_gamma`, of the set's own paper (--blur). UCDIR's paper does not say which it takes, but compares with the former.
"""

import argparse
import os
import sys

from ucdir_plugin.data.preparation import (
    add_pair_arguments,
    check_pair_arguments,
    gopro_tasks,
    make_pair_lmdbs,
    pair_settings,
    prepare,
    same_settings,
)
from ucdir_plugin.utils.cli import run_cli

PAIRS = {"train": 2103, "test": 1111}


def main() -> int:
    """Lay out the pairs as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the folder GOPRO_Large, with train and test in it")
    parser.add_argument("--out", default=os.path.join("datasets", "GoPro"), help="default: %(default)s")
    parser.add_argument("--blur", choices=["blur", "blur_gamma"], default="blur", help="default: %(default)s")
    add_pair_arguments(parser)
    args = parser.parse_args()
    check_pair_arguments(args)
    code = 0
    for part in PAIRS:
        crop = args.crop if part == "train" else None
        pairs, tasks = gopro_tasks(args.source, args.out, part, crop, args.step, args.blur)
        same_settings(args.out, **pair_settings(args), blur=args.blur)
        code = max(code, prepare(tasks, args.workers))
        complete = "complete" if pairs == PAIRS[part] else f"the official set has {PAIRS[part]}"
        print(f"{part}: {pairs} pairs ({complete})", flush=True)
    if args.lmdb and not code:
        make_pair_lmdbs(args.out)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
