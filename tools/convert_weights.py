"""Convert published weights: python tools/convert_weights.py --from ucdir IN.pth OUT.pth"""

import argparse
import sys

from ucdir_plugin.errors import run_cli


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from", dest="source_kind", choices=["ucdir"], required=True, help="who published the file")
    parser.add_argument("source", help="the published file")
    parser.add_argument("target", help="the file to write, for path:pretrain_network_g")
    args = parser.parse_args()
    from ucdir_plugin.weights import convert_ucdir

    done = convert_ucdir(args.source, args.target)
    if done["dropped"]:
        print(f"dropped the schedule buffers {', '.join(done['dropped'])}")
    print(f"{args.target}: {done['tensors']} tensors, {done['parameters'] / 1e6:.2f} M parameters")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
