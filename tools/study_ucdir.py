"""Restore and measure what a plan lists: trained systems on the same test images, in tables. Stopped, it goes on.

python tools/study_ucdir.py options/study/jpeg.yaml -o study/ --parts main grid    with the package's weights
python tools/study_ucdir.py options/study/jpeg.yaml -o study/       all parts: also those that need what you trained
python tools/compare.py study/SET/RUN/metrics_68.json study/SET/OTHER/metrics_68.json    worst, median and best image

Restored images lie in study/SET/RUN/, tables in study/study.md; runs of several iterations give curves besides.
"""

import argparse
import sys

from ucdir_cli.command_line import Parser, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("plan", metavar="PLAN.yaml", help="which runs there are, such as options/study/jpeg.yaml")
    add("-o", "--output", required=True, metavar="DIR", help="everything goes there")
    add("--parts", nargs="+", help="default: all of the plan")
    add("--sets", nargs="+", help="test sets, by their names in the plan's option file (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=int, help="of torch (default: its own choice)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run("ucdir_cli.studies.ucdir.command:run", parse_args()))
