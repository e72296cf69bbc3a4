"""Measure images that are there already, whoever made them.

python tools/evaluate.py restored/ truths/
python tools/evaluate.py restored/ truths/ --input degraded/ --metrics psnr fid:network=efficientnet_lite0
python tools/evaluate.py restored/ --metrics niqe
python tools/evaluate.py restored/ --reference faces/ --metrics fid kid niqe

Images belong together by their path below the folders, without extension. The tables metrics.json, .md and .csv and
report.html, for any browser, are written to -o.
"""

import argparse
import sys

from ucdir_cli.command_line import Parser, add_imports, option_file, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("restored", metavar="RESTORED", help="folder of results, with folders in it, or one image")
    add("truth", metavar="GT", nargs="?", help="true images of the same names; without them only NIQE and the like")
    add(
        "--input",
        metavar="DIR",
        help="degraded images of the same names: measured too, and LOE and Consistency need them",
    )
    add(
        "--reference",
        metavar="DIR",
        help="images that are not the truths, such as sharp faces: FID and KID are against these as a whole",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME[:KEY=VALUE,...]",
        help="docs/metrics.md has them (default: lpips stlpips niqe fid kid psnr ssim, with --input loe)",
    )
    which.add_argument(
        "-opt", metavar="FILE.yml", type=option_file, help="metrics as in this option file's val:metrics"
    )
    add("--suffix", default="", help="that names of results end in, as tools/test.py writes them")
    add("-o", "--output", metavar="DIR", help="folder for tables and report (default: results/evaluate_NAME)")
    add("--name", help="in tables and comparisons (default: RESTORED's)")
    add("--weights-dir", metavar="DIR", help="where metrics' weights are looked for first")
    add("--download", action="store_true", help="get metrics' weights that are not there")
    add_imports(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("ucdir_plugin.cli.evaluate:run", parse_args()))
