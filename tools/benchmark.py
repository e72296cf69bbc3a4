"""Measure speed and memory as ratios, on a machine that does nothing else. Each prints Markdown tables and JSON.

python tools/benchmark.py akgm         AKGM against a plain convolution
python tools/benchmark.py forward      sampling with the released SID network against the release's formulation
python tools/benchmark.py train        training steps
python tools/benchmark.py train -opt FILE.yml ...        memory of a training step of these option files
python tools/benchmark.py complexity   growth with image size, batch, steps, bases and width
python tools/benchmark.py complexity -opt FILE.yml ...   parameters, multiply-adds and memory of these networks
python tools/benchmark.py restore -opt FILE.yml   memory and time over image sizes; samplers and steps; seams
python tools/benchmark.py calibration -opt FILE.yml   does the network denoise as it should? where samples lose texture
python tools/benchmark.py bird         a step of BIR-D against its network alone; with --source, what it restores there
"""

import argparse
import sys
from pathlib import Path

from ucdir_cli.benchmarks import timing

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError, at_least_one


def parse_args() -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--repeats", type=int, default=5, help="measured turns of each variant (default: %(default)s)")
    common.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("akgm", parents=[common])
    train = what.add_parser("train", parents=[common])
    train.add_argument("-opt", nargs="+", metavar="FILE.yml", help="option files of which the memory is to be measured")
    train.add_argument("--size", type=int, default=64, help="-opt: height and width of a crop (default: %(default)s)")
    train.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="-opt: crops of a step (default: 4 8)")
    forward = what.add_parser("forward", parents=[common])
    forward.add_argument("--size", type=int, default=256, help="image height and width (default: %(default)s)")
    complexity = what.add_parser("complexity", parents=[common])
    complexity.add_argument("--figure", metavar="FILE.png", help="draw the growth curves here")
    complexity.add_argument(
        "-opt", nargs="+", metavar="FILE.yml", help="option files whose networks are to be compared"
    )
    complexity.add_argument("--size", type=int, default=256, help="-opt: height and width (default: %(default)s)")
    restore = what.add_parser("restore", parents=[common])
    restore.add_argument("-opt", required=True, metavar="FILE.yml", help="option file of a UCDIR network")
    restore.add_argument("--weights", metavar="FILE", help="default: what the option file trained last")
    restore.add_argument("--only", choices=["growth", "quality", "seams"], help="one of the three tables")
    restore.add_argument("--tile", type=int, help="longest side of a patch (default: growth 512, seams 128)")
    restore.add_argument("--overlap", type=int, help="overlap of patches (default: growth 32, seams 16)")
    restore.add_argument("--samplers", nargs="+", metavar="NAME[:SPACING]", help="quality: of these (default: all)")
    restore.add_argument("--seeds", type=int, default=1, help="quality: mean over so many seeds (default: %(default)s)")
    restore.add_argument("--figure", metavar="FILE.png", help="seams: patches on their own, inter-step, whole")
    calibration = what.add_parser("calibration", parents=[common])
    calibration.add_argument("-opt", required=True, metavar="FILE.yml", help="option file of a UCDIR network")
    calibration.add_argument("--weights", metavar="FILE", help="default: what the option file trained last")
    calibration.add_argument("--size", type=int, help="of crops (default: gt_size of the training set, else 64)")
    calibration.add_argument("--only", choices=["denoising", "texture"], help="one of the two tables")
    bird = what.add_parser("bird", parents=[common])
    bird.add_argument("--size", type=int, default=256, help="height and width, of crops 128 (default: %(default)s)")
    bird.add_argument("--source", metavar="DIR", help="photographs to blur and restore, instead of the cost")
    bird.add_argument("--images", type=int, default=12, help="--source: the first so many (default: %(default)s)")
    bird.add_argument("--prior", default="ffdnet", help="--source: as of tools/restore.py (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    size = getattr(args, "size", None)
    at_least_one(repeats=args.repeats, threads=args.threads or 1, size=1 if size is None else size)
    figure = getattr(args, "figure", None)
    if figure and not Path(figure).absolute().parent.is_dir():
        raise UserError(f"--figure {figure}: there is no such folder")
    import torch
    from ucdir_cli.benchmarks import akgm

    from ucdir_plugin.utils.memory import keep_freed_memory

    keep_freed_memory()  # as the other tools do
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.what == "restore":
        results = restore(args)
    elif args.what == "calibration":
        results = calibration(args)
    elif args.what == "bird":
        from ucdir_cli.benchmarks import bird as benchmark_bird

        at_least_one(images=args.images)
        if args.source:
            results = benchmark_bird.quality(args.source, args.images, min(args.size, 128), args.prior)
        else:
            results = benchmark_bird.cost(args.size, args.repeats)
    elif args.what == "train" and args.opt:
        from ucdir_cli.benchmarks import networks as benchmark_networks

        at_least_one(batch=min(args.batch))
        results = benchmark_networks.training_table(args.opt, args.batch, args.size)
    elif args.what == "complexity" and args.opt:
        if figure:
            raise UserError("--figure draws the growth curves: leave out -opt")
        from ucdir_cli.benchmarks import networks as benchmark_networks

        results = benchmark_networks.table(args.opt, args.size)
    else:
        results = {
            "akgm": lambda: akgm.akgm_alone(args.repeats),
            "forward": lambda: akgm.forward(args.size, args.repeats),
            "train": lambda: akgm.train(args.repeats),
            "complexity": lambda: akgm.complexity(args.repeats),
        }[args.what]()
    for result in results:
        print(timing.table(result), flush=True)
    if figure and args.what == "complexity":
        akgm.draw_complexity(results[0], figure)
    return 0


def calibration(args: argparse.Namespace) -> list:
    from ucdir_cli.benchmarks import calibration as benchmark_calibration

    from ucdir_plugin.options.check import load_options

    trained_on = load_options(args.opt, is_train=False)["datasets"].get("train") or {}
    size = args.size or trained_on.get("gt_size", 64)
    parts = {
        "denoising": lambda: benchmark_calibration.denoising(args.opt, args.weights, size),
        "texture": lambda: benchmark_calibration.texture(args.opt, args.weights),
    }
    return [table for name, part in parts.items() if args.only in (None, name) for table in part()]


def restore(args: argparse.Namespace) -> list:
    from ucdir_cli.benchmarks import restore as benchmark_restore

    from ucdir_plugin.diffusion.samplers import SAMPLERS

    at_least_one(seeds=args.seeds)
    tile, overlap, source = args.tile, args.overlap, (args.opt, args.weights)
    parts = {
        "growth": lambda: benchmark_restore.growth(*source, tile or 512, overlap or 32, args.repeats),
        "quality": lambda: benchmark_restore.quality(*source, args.samplers or list(SAMPLERS), args.seeds),
        "seams": lambda: benchmark_restore.seams(*source, tile or 128, overlap or 16, args.figure),
    }
    return [table for name, part in parts.items() if args.only in (None, name) for table in part()]


if __name__ == "__main__":
    sys.exit(run_cli(main))
