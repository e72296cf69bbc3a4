"""Restore and measure what a plan lists: trained systems on the same test images, in tables. Stopped, it goes on.

python tools/study_ucdir.py options/study/jpeg.yaml -o study/ --parts main grid    with the package's weights
python tools/study_ucdir.py options/study/jpeg.yaml -o study/       all parts: also those that need what you trained
python tools/compare.py study/SET/RUN/metrics_68.json study/SET/OTHER/metrics_68.json    worst, median and best image

Restored images lie in study/SET/RUN/, tables in study/study.md; runs of several iterations give curves besides.
"""

import argparse
import sys

from ucdir_cli.studies.ucdir.plan import read_plan

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import at_least_one


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("plan", metavar="PLAN.yaml", help="which runs there are, such as options/study/jpeg.yaml")
    add("-o", "--output", required=True, metavar="DIR", help="everything goes there")
    add("--parts", nargs="+", help="default: all of the plan")
    add("--sets", nargs="+", help="test sets, by their names in the plan's option file (default: all)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--threads", type=int, help="of torch (default: its own choice)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    at_least_one(**{"--threads": 1 if args.threads is None else args.threads})
    import torch
    from ucdir_cli.studies.ucdir import study

    from ucdir_plugin.utils.memory import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    plan = read_plan(args.plan)
    path = study.study(plan, args.output, parts=args.parts, sets=args.sets, device=args.device)
    print(f"tables: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
