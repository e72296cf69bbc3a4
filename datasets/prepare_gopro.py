"""Lay out the GoPro deblurring set, from the unpacked official zip (GOPRO_Large).

python datasets/prepare_gopro.py --source GOPRO_Large --out datasets/GoPro --crop 512 --step 256

GOPRO_Large/train/GOPR0372_07_00/blur/000047.png and .../sharp/000047.png become GoPro/train/lq/ and GoPro/train/gt/
GOPR0372_07_00_000047.png; --crop cuts the training pairs up, which reads faster; the test pairs stay whole. --lmdb
writes BasicSR's LMDBs of the training pairs besides. A second run goes on where the first was stopped.
"""

import argparse
import os
import sys

from ucdir_plugin.data.preparation import gopro_tasks, make_lmdb, prepare
from ucdir_plugin.errors import UserError, run_cli

PAIRS = {"train": 2103, "test": 1111}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="the folder GOPRO_Large, with train and test in it")
    parser.add_argument("--out", default=os.path.join("datasets", "GoPro"), help="default: %(default)s")
    parser.add_argument("--crop", type=int, help="cut training pairs into squares of so many pixels")
    parser.add_argument("--step", type=int, help="from one square to the next (default: half of --crop)")
    parser.add_argument("--lmdb", action="store_true", help="LMDBs of the training pairs, train/lq.lmdb and gt.lmdb")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one for each core)")
    args = parser.parse_args()
    if args.step and not args.crop:
        raise UserError("--step goes with --crop")
    if any(value is not None and value < 1 for value in (args.crop, args.step)):
        raise UserError("--crop and --step must be at least 1")
    code = 0
    for part in PAIRS:
        crop = args.crop if part == "train" else None
        pairs, tasks = gopro_tasks(args.source, args.out, part, crop, args.step)
        code = max(code, prepare(tasks, args.workers))
        complete = "complete" if pairs == PAIRS[part] else f"the official set has {PAIRS[part]}"
        print(f"{part}: {pairs} pairs ({complete})", flush=True)
    if args.lmdb and not code:
        for kind in ("lq", "gt"):
            make_lmdb(os.path.join(args.out, "train", kind))
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
