"""Measure speed and memory as ratios, on a machine that does nothing else.

python tools/benchmark.py akgm         AKGM against a plain convolution
python tools/benchmark.py forward      sampling with the released SID network against the release's formulation
python tools/benchmark.py train        training steps
python tools/benchmark.py complexity   growth with image size, batch, steps, bases and width
"""

import argparse
import sys
from pathlib import Path

from ucdir_plugin.errors import UserError, run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["akgm", "forward", "train", "complexity"])
    parser.add_argument("--size", type=int, default=256, help="forward: image height and width (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each variant (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument("--figure", metavar="FILE.png", help="complexity: draw the growth curves here")
    args = parser.parse_args()
    if args.size < 1 or args.repeats < 1 or (args.threads or 1) < 1:
        raise UserError("--size, --repeats and --threads must be at least 1")
    if args.figure and not Path(args.figure).absolute().parent.is_dir():
        raise UserError(f"--figure {args.figure}: there is no such folder")
    import torch

    from ucdir_plugin import benchmark
    from ucdir_plugin.memory import keep_freed_memory

    keep_freed_memory()  # as the other tools do
    if args.threads:
        torch.set_num_threads(args.threads)
    results = {
        "akgm": lambda: benchmark.akgm_alone(args.repeats),
        "forward": lambda: benchmark.forward(args.size, args.repeats),
        "train": lambda: benchmark.train(args.repeats),
        "complexity": lambda: benchmark.complexity(args.repeats),
    }[args.what]()
    for result in results:
        print(benchmark.table(result))
    if args.figure and args.what == "complexity":
        benchmark.draw_complexity(results[0], args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
