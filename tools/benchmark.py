"""Measure speed and memory as ratios: python tools/benchmark.py forward"""

import argparse
import sys

from ucdir_plugin.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["forward"])
    parser.add_argument("--size", type=int, default=256, help="image height and width (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns of each variant (default: %(default)s)")
    args = parser.parse_args()
    from ucdir_plugin import benchmark

    print(benchmark.table(benchmark.forward(args.size, args.repeats)))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
