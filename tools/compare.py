"""Compare runs of tools/test.py and tools/evaluate.py, image by image.

python tools/compare.py results/mine results/demo_ucdir
python tools/compare.py results/mine/metrics_set14.json results/other/metrics_set14.json --images baboon

Means over the images that all runs have, paired differences from the first run, with 95% intervals, and one grid of
pictures. Numbers share a column only if they were measured in the same way.
"""

import argparse
import os
import sys

from ucdir_cli.command_line import Parser, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="metrics_*.json, or a folder that has one")
    add("--stage", default="restored", help="what is compared: restored (default), initial, input")
    add("--images", nargs="+", metavar="NAME", default=[], help="in the grid (default: from worst to best difference)")
    add("--count", type=int, default=3, help="images in the grid, if none are named (default: %(default)s)")
    add("-o", "--output", metavar="DIR", default=os.path.join("results", "comparison"), help="default: %(default)s")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.compare:run", parse_args()))
