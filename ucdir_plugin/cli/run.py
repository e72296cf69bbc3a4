"""The commands that train and test: tools/train.py and tools/test.py once their arguments are parsed."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from types import ModuleType
from typing import Iterator

import torch.distributed as dist
import yaml

from ucdir_plugin.options.check import load_options
from ucdir_plugin.options.reading import apply_overrides, read_options
from ucdir_plugin.training import loop
from ucdir_plugin.training.setup import setup
from ucdir_plugin.training.stops import is_of_lost_rank, is_of_lost_worker
from ucdir_plugin.utils import files
from ucdir_plugin.utils.errors import UserError, WriteError


def train(args: argparse.Namespace) -> int:
    """Train as the option file says, under the engine that it names; returns the exit code.

    Args:
        args: of BasicSR's command line, as tools/train.py parses it.

    Raises:
        UserError: naming what is wrong.
    """
    kept = "what is saved is kept: once it can be written, go on with --auto_resume"
    with _one_line(kept, "start all ranks again with --auto_resume, from the last checkpoint"):
        return _run(args, is_train=True)


def test(args: argparse.Namespace) -> int:
    """Restore and measure the option file's val and test sets, under the engine that it names; returns the exit code.

    Args:
        args: of BasicSR's command line, as tools/test.py parses it.

    Raises:
        UserError: naming what is wrong.
    """
    kept = "what is restored is kept: run the same command again"
    with _one_line(kept, "start all ranks again: what is restored is kept"):
        return _run(args, is_train=False)


def _run(args: argparse.Namespace, is_train: bool) -> int:
    if args.write:
        return _write(args, is_train)
    if args.opt.endswith(".py"):
        return _mmengine().run_config(args, is_train)
    try:
        opt = setup(args, is_train)
        engine = _mmengine() if opt["engine"] == "mmengine" else loop
        return engine.train(opt, args) if is_train else engine.test(opt, args)
    except UserError as err:
        if not str(err).startswith(("option ", "unknown option ")):
            raise
        raise type(err)(f"{os.path.basename(args.opt)}: {err}") from err


def _write(args: argparse.Namespace, is_train: bool) -> int:
    """Write the checked option file as one that needs no other."""
    if os.path.exists(args.write):
        raise UserError(f"--write {args.write}: it is there already; remove it, or name another file")
    load_options(args.opt, args.force_yml, is_train, args.trust_config)
    opt = read_options(args.opt)
    apply_overrides(opt, args.force_yml)
    files.write_text(f"# {args.opt}, complete\n{yaml.safe_dump(opt, sort_keys=False)}", args.write)
    print(f"written: {args.write}")
    return 0


def _mmengine() -> ModuleType:
    from ucdir_plugin.mm import runner  # takes a second to import, and is not needed under BasicSR

    return runner


@contextlib.contextmanager
def _one_line(disk: str, rank: str) -> Iterator[None]:
    """Turn the loss of a disk, of another rank or of a process that reads data into one line.

    Args:
        disk, rank: what to do then.

    Raises:
        UserError: for these; all else passes.
    """
    try:
        yield
    except WriteError as err:
        raise UserError(f"{err}; {disk}") from err
    except RuntimeError as err:
        if is_of_lost_worker(err):
            raise UserError(
                f"a process that reads data was killed ({str(err).splitlines()[0]}), perhaps for lack of memory: go"
                " on with --auto_resume, and fewer num_worker_per_gpu if it comes again"
            ) from err
        if not is_of_lost_rank(err):
            raise
        text = str(err)
        if "timed out" in text.lower() or "timeout" in text.lower():
            rank += " (one that is only slow needs a larger dist_params: timeout, in seconds)"
        reason = re.sub(r"^\[[^]]*\] ", "", text.splitlines()[0]).split(". ")[0]  # without gloo's file and advice
        raise UserError(
            f"rank {dist.get_rank()} has lost another rank, which ended or does not answer ({reason}):"
            f" its own output or the launcher says why; {rank}"
        ) from err
