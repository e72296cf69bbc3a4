"""Measure speed and memory as ratios, on a machine that does nothing else. Each prints Markdown tables and JSON.

python tools/benchmark.py akgm         AKGM against a plain convolution
python tools/benchmark.py start        seconds and memory until a command answers -h or a wrong argument; of the import
python tools/benchmark.py forward      sampling with the released SID network against the release's formulation
python tools/benchmark.py gpu          all that a GPU should be asked, in at most four minutes (without one a dry run)
python tools/benchmark.py train        training steps
python tools/benchmark.py train -opt FILE.yml ...        memory of a training step of these option files
python tools/benchmark.py complexity   growth with image size, batch, steps, bases and width
python tools/benchmark.py complexity -opt FILE.yml ...   parameters, multiply-adds and memory of these networks
python tools/benchmark.py restore -opt FILE.yml   memory and time over image sizes; samplers and steps; seams
python tools/benchmark.py calibration -opt FILE.yml   does the network denoise as it should? where samples lose texture
python tools/benchmark.py bird         a step of BIR-D against its network alone; with --source, what it restores there
"""

import argparse
import os
import sys

from ucdir_cli.command_line import Parser, add_imports, option_file, run


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    common = Parser(add_help=False)
    common.add_argument("--repeats", type=int, default=5, help="measured turns of each variant (default: %(default)s)")
    common.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    add_imports(common)
    parser = Parser(description=__doc__)
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("akgm", parents=[common])
    what.add_parser("start", parents=[common])
    gpu = what.add_parser("gpu", parents=[common])
    gpu.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu, a dry run (default: %(default)s)")
    train = what.add_parser("train", parents=[common])
    train.add_argument(
        "-opt",
        nargs="+",
        metavar="FILE.yml",
        type=option_file,
        help="option files of which the memory is to be measured",
    )
    train.add_argument("--size", type=int, default=64, help="-opt: height and width of a crop (default: %(default)s)")
    train.add_argument("--batch", type=int, nargs="+", default=[4, 8], help="-opt: crops of a step (default: 4 8)")
    forward = what.add_parser("forward", parents=[common])
    forward.add_argument("--size", type=int, default=256, help="image height and width (default: %(default)s)")
    complexity = what.add_parser("complexity", parents=[common])
    complexity.add_argument("--figure", metavar="FILE.png", help="draw the growth curves here")
    complexity.add_argument(
        "-opt", nargs="+", metavar="FILE.yml", type=option_file, help="option files whose networks are to be compared"
    )
    complexity.add_argument("--size", type=int, default=256, help="-opt: height and width (default: %(default)s)")
    restore = what.add_parser("restore", parents=[common])
    restore.add_argument(
        "-opt", required=True, metavar="FILE.yml", type=option_file, help="option file of a UCDIR network"
    )
    restore.add_argument("--weights", metavar="FILE", help="default: what the option file trained last")
    restore.add_argument("--only", choices=["growth", "quality", "seams"], help="one of the three tables")
    restore.add_argument("--tile", type=int, help="longest side of a patch (default: growth 512, seams 128)")
    restore.add_argument("--overlap", type=int, help="overlap of patches (default: growth 32, seams 16)")
    restore.add_argument("--samplers", nargs="+", metavar="NAME[:SPACING]", help="quality: of these (default: all)")
    restore.add_argument("--seeds", type=int, default=1, help="quality: mean over so many seeds (default: %(default)s)")
    restore.add_argument("--figure", metavar="FILE.png", help="seams: patches on their own, inter-step, whole")
    calibration = what.add_parser("calibration", parents=[common])
    calibration.add_argument(
        "-opt", required=True, metavar="FILE.yml", type=option_file, help="option file of a UCDIR network"
    )
    calibration.add_argument("--weights", metavar="FILE", help="default: what the option file trained last")
    calibration.add_argument("--size", type=int, help="of crops (default: gt_size of the training set, else 64)")
    calibration.add_argument("--only", choices=["denoising", "texture"], help="one of the two tables")
    bird = what.add_parser("bird", parents=[common])
    bird.add_argument("--size", type=int, default=256, help="height and width, of crops 128 (default: %(default)s)")
    bird.add_argument("--source", metavar="DIR", help="photographs to blur and restore, instead of the cost")
    bird.add_argument("--images", type=int, default=12, help="--source: the first so many (default: %(default)s)")
    bird.add_argument("--prior", default="ffdnet", help="--source: as of tools/restore.py (default: %(default)s)")
    bird.add_argument(
        "--presets", nargs="+", metavar="NAME", help="--source: compare these, with a prior that generates (natural64)"
    )
    args = parser.parse_args()
    figure = getattr(args, "figure", None)
    if figure and not os.path.isdir(os.path.dirname(os.path.abspath(figure))):
        parser.error(f"--figure {figure}: there is no such folder")
    return args


if __name__ == "__main__":
    sys.exit(run("ucdir_cli.benchmarks.commands:run", parse_args()))
