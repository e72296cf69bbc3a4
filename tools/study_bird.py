"""What BIR-D's paper claims, checked: all systems on the same degraded images, in one table. Stopped, it goes on.

S="python tools/study_bird.py --source BSDS500/val"
$S --only cbsd68_ids.txt -o study/                              16 of the 68, prior FFDNet
$S --only cbsd68_ids.txt -o study/ --priors natural64 ffdnet --parts main seeds sizes first
$S --without cbsd68_ids.txt -o settings/ --cases motion         other images, to choose settings on

Inputs, results and pictures are below the output folder; study.md there has the tables.
"""

import argparse
import sys

from ucdir_cli.command_line import Parser, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--source", required=True, metavar="DIR", help="photographs; centre crops of 128x128 are taken")
    add("--only", metavar="FILE", help="text file: names of those to take, without extension")
    add("--without", metavar="FILE", help="text file: names of those to leave out")
    add("-o", "--output", required=True, metavar="DIR", help="everything goes there")
    add("--parts", nargs="+", default=["main"], help="main, seeds, sizes, first (default: main)")
    add("--priors", nargs="+", default=["ffdnet"], help="as of tools/restore.py --prior (default: ffdnet)")
    add("--cases", nargs="+", help="default: all")
    add("--systems", nargs="+", help="only these, such as input default known (default: all)")
    add("--images", type=int, default=16, help="of all parts but seeds, which has all (default: %(default)s)")
    add("--steps", type=int, default=100, help="of the systems that start from noise (default: %(default)s)")
    add("--seeds", type=int, default=3, help="of the part seeds (default: %(default)s)")
    add("--batch", type=int, default=16, help="images that share a call of the network (default: %(default)s)")
    add("--threads", type=int, help="of torch (default: its own choice)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("ucdir_cli.studies.bird.command:run", parse_args()))
