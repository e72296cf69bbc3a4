"""Measure images that are there already, whoever made them.

python tools/evaluate.py restored/ truths/
python tools/evaluate.py restored/ truths/ --input degraded/ --metrics psnr fid:network=efficientnet_lite0
python tools/evaluate.py restored/ --metrics niqe

Images belong together by their path below the folders, without extension. The tables metrics.json, .md and .csv and
report.html, for any browser, are written to -o.
"""

import argparse
import os
import sys

from ucdir_plugin.utils.cli import run_cli
from ucdir_plugin.utils.errors import UserError, named, printable


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("restored", metavar="RESTORED", help="folder of results, with folders in it, or one image")
    add("truth", metavar="GT", nargs="?", help="true images of the same names; without them only NIQE and the like")
    add(
        "--input",
        metavar="DIR",
        help="degraded images of the same names: measured too, and LOE and Consistency need them",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME[:KEY=VALUE,...]",
        help="docs/metrics.md has them (default: lpips stlpips niqe fid kid psnr ssim, with --input loe)",
    )
    which.add_argument("-opt", metavar="FILE.yml", help="metrics as in this option file's val:metrics")
    add("--suffix", default="", help="that names of results end in, as tools/test.py writes them")
    add("-o", "--output", metavar="DIR", help="folder for tables and report (default: results/evaluate_NAME)")
    add("--name", help="in tables and comparisons (default: RESTORED's)")
    add("--weights-dir", metavar="DIR", help="where metrics' weights are looked for first")
    add("--download", action="store_true", help="get metrics' weights that are not there")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    from ucdir_plugin.evaluation import folders, tables
    from ucdir_plugin.evaluation.measure import Evaluation

    items = folders.find_items(args.restored, args.truth, args.input, args.suffix)
    weights_dir = args.weights_dir
    if args.opt:
        metrics, folder = folders.metrics_of(args.opt)
        weights_dir = weights_dir or folder
    else:
        names = args.metrics or folders.default_metrics(bool(args.truth), bool(args.input))
        metrics = folders.parse_metrics(names)
    metrics, lacking = folders.measurable(metrics, bool(args.truth), bool(args.input))
    name = args.name or os.path.basename(os.path.abspath(args.restored))
    output = args.output or os.path.join("results", f"evaluate_{name}")
    about = {"name": name, "restored": args.restored, "truth": args.truth, "input": args.input}
    evaluation = Evaluation(metrics, weights_dir, args.download)
    evaluation.unavailable.update(lacking)
    if not evaluation.protocols:
        raise UserError("none of the metrics is available: the lines above say what to put where")
    results, failed = folders.evaluate(items, evaluation, output, about)
    print(tables.markdown_table(results))
    print(f"table: {os.path.join(output, 'metrics')}.md .csv .json; report: {os.path.join(output, 'report.html')}")
    for key, reason in failed.items():
        print(f"error: {printable(named(key, reason))}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
