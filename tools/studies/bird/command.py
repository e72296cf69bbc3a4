"""What tools/study_bird.py runs, once its arguments are parsed."""

from __future__ import annotations

import argparse

import torch
from ucdir_cli.studies.bird import cases, parts

from ucdir_plugin.utils.errors import at_least_one
from ucdir_plugin.utils.memory import keep_freed_memory


def run(args: argparse.Namespace) -> int:
    """Run the study that the arguments name; returns the exit code."""
    counts = {name: getattr(args, name) for name in ("images", "steps", "seeds", "batch")}
    at_least_one(**counts, threads=args.threads or 1)
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
