"""What BIR-D's paper claims, checked: all systems on the same degraded images, in one table. Stopped, it goes on.

S="python tools/study_bird.py --source BSDS500/val"
$S --only cbsd68_ids.txt -o study/                              16 of the 68, prior FFDNet
$S --only cbsd68_ids.txt -o study/ --priors natural64 ffdnet --parts main seeds sizes first
$S --without cbsd68_ids.txt -o settings/ --cases motion         other images, to choose settings on

Inputs, results and pictures are below the output folder; study.md there has the tables.
"""

import argparse
import sys

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import at_least_one


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def main() -> int:
    args = parse_args()
    counts = {name: getattr(args, name) for name in ("images", "steps", "seeds", "batch")}
    at_least_one(**counts, threads=args.threads or 1)
    import torch
    from ucdir_cli.studies.bird import cases, parts

    from ucdir_plugin.utils.memory import keep_freed_memory

    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = parts.study(
        args.source,
        args.output,
        parts=args.parts,
        priors=args.priors,
        cases=args.cases or tuple(cases.CASES),
        systems=args.systems,
        only=args.only,
        without=args.without,
        count=args.images,
        steps=args.steps,
        seeds=args.seeds,
        batch=args.batch,
    )
    print(f"tables: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
