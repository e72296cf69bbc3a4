"""From an option file to a run: processes, seeds, folders, log, data sets and model."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from typing import Any, Callable, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import torch
import torch.distributed as dist

from ucdir_plugin import compat
from ucdir_plugin.archs.sizing import check_network
from ucdir_plugin.compat import (
    build_dataset,
    dict2str,
    get_dist_info,
    get_root_logger,
    get_time_str,
    make_exp_dirs,
    mkdir_and_rename,
)
from ucdir_plugin.data.loader import seed_cpu
from ucdir_plugin.diffusion.noise import key_to_seed
from ucdir_plugin.evaluation.measure import reference_images
from ucdir_plugin.options.check import load_options, share_batch
from ucdir_plugin.options.reading import option_text
from ucdir_plugin.restoration import precision
from ucdir_plugin.training.stops import is_of_lost_rank, is_of_lost_worker
from ucdir_plugin.utils import files, memory
from ucdir_plugin.utils.errors import UserError, free_space
from ucdir_plugin.utils.training_states import remove_leftovers
from ucdir_plugin.utils.versions import __version__
from ucdir_plugin.zoo.model_files import find_weights


def setup(args: argparse.Namespace, is_train: bool, root_path: Optional[str] = None) -> dict:
    """Options, distributed processes, paths below the working directory or ``root_path``, seeds."""
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
    opt["root_path"] = root_path or os.getcwd()
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
    """A log file that says once that it cannot be written, where logging prints a traceback for each line."""

    complained = False

    def handleError(self, record: logging.LogRecord) -> None:
        err = sys.exc_info()[1]
        if not isinstance(err, OSError):
            super().handleError(record)
        elif not self.complained:
            self.complained = True
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
    """Build the option file's data sets of these phases; see that the images of ``val: reference`` are there."""
    reference_images((opt.get("val") or {}).get("reference"), "option val:reference")
    sets = {p: d for p, d in opt["datasets"].items() if d["phase"] in phases}
    return [build(f"option datasets:{p} ({d['type']})", build_dataset, d) for p, d in sets.items()]


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


class Saved(NamedTuple):
    """What a training goes on from.

    Attributes:
        iteration: that it is of.
        content: what the engine read: a training state, or the path of a checkpoint.
        folder: where it was found.
        words: how a line of the log calls it.
    """

    iteration: int
    content: Any
    folder: str
    words: str


class Engine(NamedTuple):
    """What the engines, BasicSR's and MMEngine's, do in their own way when a run begins.

    Attributes:
        find: options -> what to go on from, or None.
        build: options -> the model.
        load: puts what was found into the model; gives lines for the log.
        make_folders: of the run.
    """

    find: Callable[[dict], Optional[Saved]]
    build: Callable[[dict], Any]
    load: Callable[[Any, Saved], List[str]]
    make_folders: Callable[[dict], None]


def agreed_start(saved: Optional[Saved], opt: dict) -> None:
    """Compare what the ranks go on from.

    Raises:
        UserError: if they found different iterations.
    """
    if opt["dist"]:
        start = saved.iteration if saved else 0
        folder = saved.folder if saved else opt["path"]["experiments_root"]
        first = [start]
        dist.broadcast_object_list(first)
        if first[0] != start:
            raise UserError(
                f"rank {opt['rank']} finds iteration {start} in {folder}, rank 0 iteration {first[0]}:"
                " all machines need the same folder (a shared disk)"
            )


class Begun(NamedTuple):
    """A training that is ready for its first step."""

    train_set: Any
    val_sets: List[Any]
    model: Any
    saved: Optional[Saved]
    logger: logging.Logger


def begin_training(opt: dict, option_file: str, engine: Engine) -> Begun:
    """Build data sets and model, go on from what is saved, make the run's folder and start its log.

    Whatever can be wrong with data, weights and networks shows before any folder is made or moved away.

    Raises:
        UserError: naming what is wrong.
    """
    _speak(opt)
    text = option_text(option_file)
    (train_set,), val_sets = build_sets(opt, ("train",)), build_sets(opt, ("val",))
    saved = engine.find(opt)
    agreed_start(saved, opt)
    seed_everything(opt["manual_seed"], "init")
    model = engine.build(opt)
    lines = engine.load(model, saved) if saved else []
    _wait(opt)  # all have looked before rank 0 moves an earlier experiment away
    if saved is None:
        engine.make_folders(opt)
    root = opt["path"]["experiments_root"]
    if opt["rank"] == 0:
        remove_leftovers(root)
        head = f"# {time.asctime()}: {' '.join(sys.argv)}\n"
        files.write_text(head + text, os.path.join(root, os.path.basename(option_file)))
        print(f"resuming {opt['name']} {saved.words}" if saved else f"starting {opt['name']} from scratch", flush=True)
    _wait(opt)
    logger = start_log(opt, "train")
    for line in lines:
        logger.info(line)
    _warn_of_bf16("train:amp", opt["train"].get("amp"), model, logger)
    _warn_of_bf16("val:sampling:amp", (opt["val"].get("sampling") or {}).get("amp"), model, logger)
    return Begun(train_set, val_sets, model, saved, logger)


def _warn_of_bf16(option: str, amp: Optional[str], model: Any, logger: logging.Logger) -> None:
    """Say where bf16 is asked for, and slower than full precision."""
    warning = precision.slower(torch.device(model.device)) if amp == "bf16" and hasattr(model, "device") else None
    if warning:
        logger.warning(f"option {option}: {warning}: without it (~) this is faster")


def begin_test(opt: dict, overrides: List[str], engine: Engine) -> Tuple[Any, List[Any], logging.Logger]:
    """Find weights, build data sets and model, make the folder of results and start its log.

    Raises:
        UserError: naming what is wrong.
    """
    _speak(opt)
    if "network_g" in opt:
        find_weights(opt, overrides)
    sets = build_sets(opt, ("val", "test"))
    if not sets:
        raise UserError("option datasets: there is no val or test dataset")
    model = engine.build(opt)
    _wait(opt)
    engine.make_folders(opt)
    _wait(opt)
    logger = start_log(opt, "test")
    _warn_of_bf16("val:sampling:amp", (opt["val"].get("sampling") or {}).get("amp"), model, logger)
    return model, sets, logger


def _speak(opt: dict) -> None:
    """Let what is said before the log's file is there be seen; BasicSR's own commands start their log themselves."""
    if opt["rank"] == 0:
        get_root_logger().setLevel(logging.INFO)


def _wait(opt: dict) -> None:
    if opt["dist"]:
        dist.barrier()


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
