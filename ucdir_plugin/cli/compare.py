"""The command that compares runs: tools/compare.py once its arguments are parsed."""

from __future__ import annotations

import argparse
import os

from ucdir_plugin.evaluation import compare
from ucdir_plugin.utils.errors import at_least_one


def run(args: argparse.Namespace) -> int:
    """Compare the runs that the arguments of tools/compare.py name; returns the exit code."""
    at_least_one(**{"--count": args.count})
    runs = compare.read_runs(args.runs)
    text, pictured = compare.write_comparison(runs, args.output, args.stage, args.images, args.count)
    print(text)
    stem = os.path.join(args.output, "comparison")
    print(
        f"table: {stem}.md .csv .tex .json; "
        + (f"pictures: {stem}.png" if pictured else "no pictures: none of the files is there")
    )
    return 0
