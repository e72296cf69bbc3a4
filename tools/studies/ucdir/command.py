"""What tools/study_ucdir.py runs, once its arguments are parsed."""

from __future__ import annotations

import argparse

import torch
from ucdir_cli.studies.ucdir import study
from ucdir_cli.studies.ucdir.plan import read_plan

from ucdir_plugin.utils.errors import at_least_one
from ucdir_plugin.utils.memory import keep_freed_memory


def run(args: argparse.Namespace) -> int:
    """Restore and measure what the plan lists; returns the exit code."""
    at_least_one(**{"--threads": 1 if args.threads is None else args.threads})
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    path = study.study(read_plan(args.plan), args.output, parts=args.parts, sets=args.sets, device=args.device)
    print(f"tables: {path}")
    return 0
