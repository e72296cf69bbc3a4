"""The command that measures images: tools/evaluate.py once its arguments are parsed."""

from __future__ import annotations

import argparse
import os
import sys

from ucdir_plugin.evaluation import folders, tables
from ucdir_plugin.evaluation.measure import Evaluation, reference_images
from ucdir_plugin.utils.errors import UserError, named, printable


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments of tools/evaluate.py name; returns the exit code.

    Raises:
        UserError: if none of the metrics can be measured.
    """
    given = folders.metrics_of(args.opt, args.trust_config) if args.opt else None
    folder, where = args.reference, "--reference"
    if given and folder is None:
        folder, where = given.reference, "option val:reference"
    reference = reference_images(folder, where)
    items = folders.find_items(args.restored, args.truth, args.input, args.suffix)
    weights_dir = args.weights_dir
    if given:
        metrics, weights_dir = given.metrics, weights_dir or given.weights_dir
    else:
        names = args.metrics or folders.default_metrics(bool(args.truth), bool(args.input), bool(reference))
        metrics = folders.parse_metrics(names)
    metrics, lacking = folders.measurable(metrics, bool(args.truth), bool(args.input), bool(reference))
    name = args.name or os.path.basename(os.path.abspath(args.restored))
    output = args.output or os.path.join("results", f"evaluate_{name}")
    about = {"name": name, "restored": args.restored, "truth": args.truth, "input": args.input}
    if reference:
        about["reference"] = folder
    evaluation = Evaluation(metrics, weights_dir, args.download, reference=reference)
    evaluation.unavailable.update(lacking)
    if not evaluation.protocols:
        raise UserError("none of the metrics is available: the lines above say what to put where")
    results, failed = folders.evaluate(items, evaluation, output, about)
    print(tables.markdown_table(results))
    print(f"table: {os.path.join(output, 'metrics')}.md .csv .json; report: {os.path.join(output, 'report.html')}")
    for key, reason in failed.items():
        print(f"error: {printable(named(key, reason))}", file=sys.stderr)
    return 1 if failed else 0
