"""From an option file to a run: processes, seeds, folders, log, data sets and model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from typing import Any, Iterator, Mapping

import torch
import torch.distributed as dist
from basicsr.data import build_dataset
from basicsr.utils import get_root_logger, get_time_str, make_exp_dirs, mkdir_and_rename
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.options import dict2str

from ucdir_plugin import compat
from ucdir_plugin.archs.sizing import check_network
from ucdir_plugin.data.loader import seed_cpu
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.options.check import load_options, share_batch
from ucdir_plugin.training.stops import is_of_lost_rank, is_of_lost_worker
from ucdir_plugin.utils import memory
from ucdir_plugin.utils.errors import UserError, free_space
from ucdir_plugin.utils.versions import __version__


def setup(args: argparse.Namespace, is_train: bool) -> dict:
    """Options, distributed processes, paths below the working directory, seeds."""
    opt = load_options(args.opt, args.force_yml, is_train, args.trust_config)
    if args.weights_dir:
        opt["val"]["weights_dir"] = args.weights_dir
    opt["val"]["download"] = args.download or opt["val"]["download"]
    opt["dist"] = args.launcher != "none"
    if not opt["dist"] and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("several processes were started (WORLD_SIZE is set): add --launcher pytorch")
    available = torch.cuda.device_count()
    given = opt["num_gpu"]
    opt["num_gpu"] = available if given == "auto" else given
    if opt["engine"] == "mmengine" and opt["num_gpu"] == 0 < available:
        raise UserError(
            "option num_gpu: 0: MMEngine takes the GPU that it finds; hide it: CUDA_VISIBLE_DEVICES= python ..."
        )
    if opt["engine"] == "mmengine" and not opt["dist"] and opt["num_gpu"] > 1:
        if given != "auto":
            raise UserError(
                f"option num_gpu: {given}: a process of MMEngine uses one GPU; start as many by torchrun, with"
                " --launcher pytorch, or take num_gpu: auto"
            )
        opt["num_gpu"] = 1
    if opt["num_gpu"] > available:
        raise UserError(f"option num_gpu: {opt['num_gpu']} asked for, {available} found; use auto, or 0 for the CPU")
    if opt["dist"] and not dist.is_initialized():
        cpu = {"backend": "gloo"} if opt["num_gpu"] == 0 else {}
        compat.init_dist(args.launcher, **{**opt["dist_params"], **cpu})
    opt["rank"], opt["world_size"] = get_dist_info()
    opt["auto_resume"], opt["is_train"] = args.auto_resume, is_train
    if args.debug and not opt["name"].startswith("debug"):
        opt["name"] = f"debug_{opt['name']}"
    if is_train:
        share_batch(opt["datasets"]["train"], opt["world_size"] if opt["dist"] else max(1, opt["num_gpu"]))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase.split("_")[0], scale=opt["scale"])
        for key in ("dataroot_gt", "dataroot_lq", "meta_info_file", "condition_file"):
            if dataset.get(key):
                dataset[key] = os.path.expanduser(dataset[key])
    path = opt["path"]
    for key, value in path.items():
        if isinstance(value, str):
            path[key] = os.path.expanduser(value)
    check_options_fit(opt, is_train)
    opt["root_path"] = os.getcwd()
    root = os.path.join(opt["root_path"], "experiments" if is_train else "results", opt["name"])
    path.update(log=root, visualization=os.path.join(root, "visualization"))
    if is_train:
        path.update(
            experiments_root=root,
            models=os.path.join(root, "models"),
            training_states=os.path.join(root, "training_states"),
        )
        if "debug" in opt["name"]:
            opt["val"]["val_freq"] = opt["logger"]["save_checkpoint_freq"] = 8
            opt["logger"]["print_freq"] = 1
    else:
        path["results_root"] = root
    if opt["rank"] == 0:
        get_root_logger().setLevel(logging.INFO)
    torch.backends.cudnn.benchmark = True
    memory.keep_freed_memory()
    seed_everything(opt["manual_seed"], "start")
    return opt


def seed_everything(*key: Any) -> None:
    """Seed python, numpy and torch on every device from a key."""
    seed_cpu(*key)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(key_to_seed(*key))


class LogFile(logging.FileHandler):
    """One that says once that it cannot be written, where logging prints a traceback for each line."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        err = sys.exc_info()[1]
        if not isinstance(err, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            print(
                f"warning: the log {self.baseFilename} cannot be written: {err.strerror}"
                f" ({free_space(self.baseFilename)}); training goes on",
                file=sys.stderr,
                flush=True,
            )


def start_log(opt: dict, kind: str) -> logging.Logger:
    """BasicSR's logger with a file in the run's folder (its building functions have created it without one by now)."""
    logger = get_root_logger()
    if opt["rank"] == 0:
        for handler in [h for h in logger.handlers if isinstance(h, logging.FileHandler)]:  # of an earlier run
            logger.removeHandler(handler)
            handler.close()
        handler = LogFile(os.path.join(opt["path"]["log"], f"{kind}_{opt['name']}_{get_time_str()}.log"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    logger.info(f"ucdir-plugin {__version__}, torch {torch.__version__}, world size {opt['world_size']}")
    logger.info(dict2str(opt))
    return logger


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """What is raised about the user's options, by code that does not check them, becomes one line; not a loss.

    Raises:
        UserError: with ``what`` in front.
    """
    kinds = (AssertionError, ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError)
    try:
        yield
    except (*kinds, TypeError, ValueError) as err:
        if is_of_lost_rank(err) or is_of_lost_worker(err):
            raise
        raise UserError(f"{what}: {type(err).__name__}: {err}") from err


def build(what: str, builder: Any, opt: dict) -> Any:
    """Call a builder of BasicSR.

    Raises:
        UserError: as :func:`one_line`.
    """
    with one_line(what):
        return builder(opt)


def first_step(first: bool) -> contextlib.AbstractContextManager:
    """Around a training step: of the first, what is raised is about options that do not go together."""
    return one_line("the first training step failed") if first else contextlib.nullcontext()


def build_sets(opt: dict, phases: tuple[str, ...]) -> list[Any]:
    sets = {p: d for p, d in opt["datasets"].items() if d["phase"] in phases}
    return [build(f"option datasets:{p} ({d['type']})", build_dataset, d) for p, d in sets.items()]


def agreed_start(start: int, folder: str, opt: dict) -> int:
    """The iteration that all ranks resume at.

    Args:
        start: that this rank found in ``folder``, or 0.

    Raises:
        UserError: if they found different ones.
    """
    if opt["dist"]:
        first = [start]
        dist.broadcast_object_list(first)
        if first[0] != start:
            raise UserError(
                f"rank {opt['rank']} finds iteration {start} in {folder}, rank 0 iteration {first[0]}:"
                " all machines need the same folder (a shared disk)"
            )
    return start


def make_folders(opt: dict) -> None:
    """BasicSR's; an older folder is renamed after the second, which another may have been renamed after already."""
    roots = [opt["path"]["experiments_root" if opt["is_train"] else "results_root"]]
    if opt["is_train"] and opt["logger"]["use_tb_logger"]:
        roots.append(os.path.join(opt["root_path"], "tb_logger", opt["name"]))
    while opt["rank"] == 0 and any(os.path.exists(f"{root}_archived_{get_time_str()}") for root in roots):
        time.sleep(0.1)
    make_exp_dirs(opt)
    for root in roots[1:] if opt["rank"] == 0 else ():
        mkdir_and_rename(root)


_MOMENTS = {"Adam": 2, "AdamW": 2, "NAdam": 2, "RAdam": 2, "Adamax": 2, "RMSprop": 1, "Adagrad": 1, "Adadelta": 2}
"""Tensors of the weights' size that an optimizer of torch keeps; of others none is counted."""


def check_options_fit(opt: Mapping[str, Any], is_train: bool) -> None:
    """Networks and batches of checked options; on a GPU the main memory holds the weights alone.

    Raises:
        UserError: with the estimate, if they do not fit into the memory that is free.
    """
    train = (opt.get("train") or {}) if is_train else {}
    on_gpu = bool(opt.get("num_gpu")) and torch.cuda.is_available()
    tensors = 1
    if train and not on_gpu:
        tensors = 2 + _MOMENTS.get(train["optim_g"]["type"], 0) + bool(train.get("ema_decay"))
    for key, cfg in opt.items():
        if key.startswith("network_"):
            check_network(cfg, key, tensors)
    free = memory.available()
    for phase, dataset in opt["datasets"].items() if train and free is not None else ():
        if dataset["phase"] == "train" and dataset.get("gt_size"):
            batch, side = dataset["batch_size_per_gpu"], dataset["gt_size"]
            need = 2 * 3 * 4 * batch * side**2  # degraded and true, of float32
            if need > free:
                raise UserError(
                    f"option datasets:{phase}: {batch} crops of {side}x{side} pixels need {need / 2**30:.3g} GB,"
                    f" {free / 2**30:.1f} GB of memory are free: lower batch_size_per_gpu or gt_size"
                )
