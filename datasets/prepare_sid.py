"""Half-size sRGB pairs of the Sony part of "Learning to See in the Dark" (SID), from its raw files; with [raw].

python datasets/prepare_sid.py --source SID --out datasets/SID --ratio 300 --crop 512 --step 256

--source holds Sony/short, Sony/long and the official lists Sony_train_list.txt and Sony_test_list.txt. Short exposures
are multiplied by the exposure ratio of their pair. --crop cuts the training pairs up, which reads faster. Beside each
part's lq and gt, ratios.csv names the ratio of each pair, for condition_file. A second run goes on where the first was
stopped. Whole images must come out as 2120x1416; the data set's authors found 10034, 10045 and 10172 of the test out of
line with their long exposures.
"""

import argparse
import os
import sys

from ucdir_plugin.data.preparation import (
    add_pair_arguments,
    check_pair_arguments,
    make_pair_lmdbs,
    pair_settings,
    prepare,
    same_settings,
    sid_tasks,
)
from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_reading import image_size

PAIRS = {"train": 1865, "test": 598}


def main() -> int:
    """Develop and lay out the pairs as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder with Sony/ and the lists in it")
    parser.add_argument("--out", default=os.path.join("datasets", "SID"), help="default: %(default)s")
    parser.add_argument("--ratio", type=float, help="only pairs of this exposure ratio: 100, 250 or 300 (default: all)")
    parser.add_argument("--bits", type=int, choices=[8, 16], default=16, help="of the PNGs (default: %(default)s)")
    add_pair_arguments(parser)
    args = parser.parse_args()
    check_pair_arguments(args)
    if args.ratio is not None and args.ratio <= 0:
        raise UserError(f"--ratio must be above 0, got {args.ratio:g}")
    code = 0
    for part in ("train", "test"):
        list_file = os.path.join(args.source, f"Sony_{part}_list.txt")
        crop = args.crop if part == "train" else None
        folder = os.path.join(args.out, part)
        pairs, table, tasks = sid_tasks(args.source, list_file, folder, args.ratio, args.bits, crop, args.step)
        same_settings(args.out, **pair_settings(args), bits=args.bits, ratio=args.ratio)
        code = max(code, prepare(tasks, args.workers))
        write_atomically(table.encode(), os.path.join(folder, "ratios.csv"))
        official = "" if args.ratio else f", the official list has {PAIRS[part]}"
        complete = ", complete" if pairs == PAIRS[part] else official
        made = next((path for path in tasks[-1].targets if os.path.isfile(path)), None)
        size = "{1}x{0}".format(*image_size(made)) if made else "none made"
        print(f"{part}: {pairs} pairs ({size}{complete})", flush=True)
    if args.lmdb and not code:
        make_pair_lmdbs(args.out)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
