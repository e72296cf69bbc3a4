"""Which benchmark tools/benchmark.py runs, once its arguments are parsed."""

from __future__ import annotations

import argparse

import torch
from ucdir_cli.benchmarks import akgm, bird, calibration, gpu, networks, restore, start, timing

from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.options.check import load_options
from ucdir_plugin.utils.errors import UserError, at_least_one
from ucdir_plugin.utils.memory import keep_freed_memory


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments name and print its tables; returns the exit code.

    Raises:
        UserError: for arguments that make no sense.
    """
    size = getattr(args, "size", None)
    at_least_one(repeats=args.repeats, threads=args.threads or 1, size=1 if size is None else size)
    keep_freed_memory()  # as the other tools do
    if args.threads:
        torch.set_num_threads(args.threads)
    benchmarks = {
        "akgm": lambda: akgm.akgm_alone(args.repeats),
        "start": lambda: start.table(args.repeats),
        "gpu": lambda: gpu.tables(args.device),
        "forward": lambda: akgm.forward(args.size, args.repeats),
        "train": lambda: _train(args),
        "complexity": lambda: _complexity(args),
        "restore": lambda: _restore(args),
        "calibration": lambda: _calibration(args),
        "bird": lambda: _bird(args),
    }
    results = benchmarks[args.what]()
    for result in results:
        print(timing.table(result), flush=True)
    if args.what == "complexity" and args.figure:
        akgm.draw_complexity(results[0], args.figure)
    return 1 if args.what == "gpu" and gpu.failed(results) else 0


def _train(args: argparse.Namespace) -> list:
    if not args.opt:
        return akgm.train(args.repeats)
    at_least_one(batch=min(args.batch))
    return networks.training_table(args.opt, args.batch, args.size)


def _complexity(args: argparse.Namespace) -> list:
    if not args.opt:
        return akgm.complexity(args.repeats)
    if args.figure:
        raise UserError("--figure draws the growth curves: leave out -opt")
    return networks.table(args.opt, args.size)


def _bird(args: argparse.Namespace) -> list:
    at_least_one(images=args.images)
    if args.presets and not args.source:
        raise UserError("--presets restore photographs: add --source, the folder of them")
    if args.presets:
        return bird.presets(args.source, args.images, args.size, args.prior, args.presets)
    if args.source:
        return bird.quality(args.source, args.images, min(args.size, 128), args.prior)
    return bird.cost(args.size, args.repeats)


def _calibration(args: argparse.Namespace) -> list:
    trained_on = load_options(args.opt, is_train=False)["datasets"].get("train") or {}
    size = args.size or trained_on.get("gt_size", 64)
    parts = {
        "denoising": lambda: calibration.denoising(args.opt, args.weights, size),
        "texture": lambda: calibration.texture(args.opt, args.weights),
    }
    return [table for name, part in parts.items() if args.only in (None, name) for table in part()]


def _restore(args: argparse.Namespace) -> list:
    at_least_one(seeds=args.seeds)
    tile, overlap, source = args.tile, args.overlap, (args.opt, args.weights)
    parts = {
        "growth": lambda: restore.growth(*source, tile or 512, overlap or 32, args.repeats),
        "quality": lambda: restore.quality(*source, args.samplers or list(SAMPLERS), args.seeds),
        "seams": lambda: restore.seams(*source, tile or 128, overlap or 16, args.figure),
    }
    return [table for name, part in parts.items() if args.only in (None, name) for table in part()]
