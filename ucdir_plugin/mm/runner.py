"""``engine: mmengine`` of option files: tools/train.py and tools/test.py on MMEngine's runners.

What only MMEngine has is in the section ``mmengine`` (:class:`ucdir_plugin.options.schema.MMEngineOptions`).
"""

from __future__ import annotations

import argparse
import copy
import os
import traceback
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Optional

import torch
from mmengine.config import Config
from mmengine.runner import FlexibleRunner, Runner
from torch.utils.data import DataLoader

from ucdir_plugin import compat
from ucdir_plugin.data.loader import training_loader
from ucdir_plugin.mm import models  # noqa: F401  (registers them)
from ucdir_plugin.mm.data import KeyedSampler
from ucdir_plugin.mm.hooks import stop_hook
from ucdir_plugin.options.reading import apply_overrides
from ucdir_plugin.registry import MODELS, SCOPE
from ucdir_plugin.training import setup, stops
from ucdir_plugin.utils.checkpoints import load_into, numbered, read_checkpoint
from ucdir_plugin.utils.errors import UserError


@contextmanager
def mmengine_errors(what: str) -> Iterator[None]:
    """What MMEngine itself says against options, before or in a run, as one line.

    Raises:
        UserError: for an exception of MMEngine's code, or of torch where MMEngine called it; others pass.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as err:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(err.__traceback__)]
        ours = [name for name in frames if not name.startswith("torch.") or name.startswith("torch.utils.data")]
        owner = ours[-1] if ours else ""
        if owner.split(".")[0] != "mmengine" or stops.is_of_lost_rank(err):
            raise
        raise UserError(f"{what}: {type(err).__name__}: {err}") from err


def runner_of(opt: Dict[str, Any], root: str, launcher: str, parts: Dict[str, Any]) -> Any:
    """A Runner, or with ``mmengine: strategy`` a FlexibleRunner.

    Args:
        opt: complete options.
        root: its folder.
        parts: arguments of MMEngine's runners: loops, loaders, hooks.
    """
    own = opt["mmengine"]
    hooks = [{"type": f"{SCOPE}.PlainCheckpointHook"}, *parts.pop("custom_hooks", []), *own["hooks"]]
    log = opt["logger"]
    default_hooks = {
        "logger": {"type": "LoggerHook", "interval": log["print_freq"], "log_metric_by_epoch": False},
        "param_scheduler": {"type": "ParamSchedulerHook"} if own["param_scheduler"] else None,
        "checkpoint": {"type": "CheckpointHook", "interval": log["save_checkpoint_freq"], "by_epoch": False},
        **own["default_hooks"],
    }
    backends = ["LocalVisBackend", *(["TensorboardVisBackend"] if log["use_tb_logger"] else [])]
    visualizer = own["visualizer"] or {"type": "Visualizer", "vis_backends": [{"type": name} for name in backends]}
    cpu = not torch.cuda.is_available()
    settings = {
        "work_dir": root,
        "experiment_name": opt["name"],
        "launcher": launcher,
        "default_hooks": default_hooks,
        "custom_hooks": hooks,
        "visualizer": copy.deepcopy(visualizer),
        "log_processor": own["log_processor"] or {"by_epoch": False},
        "default_scope": "mmengine",
        "randomness": {"seed": opt["manual_seed"]},
        "env_cfg": {"cudnn_benchmark": True, "dist_cfg": {"backend": "gloo" if cpu else "nccl"}},
        **parts,
    }
    cfg: Dict[str, Any] = {}
    if own["activation_checkpointing"] and not own["strategy"]:
        cfg["activation_checkpointing"] = own["activation_checkpointing"]
    if own["strategy"]:
        strategy = copy.deepcopy(own["strategy"])
        return FlexibleRunner(strategy=strategy, auto_scale_lr=own["auto_scale_lr"], cfg=Config(cfg), **settings)
    wrapper = {"type": "MMDistributedDataParallel", **(own["model_wrapper"] or {})}
    if wrapper["type"] == "MMDistributedDataParallel":  # others do not take these
        wrapper.setdefault("broadcast_buffers", False)
        wrapper.setdefault("find_unused_parameters", opt["find_unused_parameters"])
        if cpu:
            wrapper["device_ids"] = None
    cfg["model_wrapper_cfg"] = wrapper
    return Runner(auto_scale_lr=own["auto_scale_lr"], cfg=Config(cfg), **settings)


def build_model(opt: Dict[str, Any]) -> torch.nn.Module:
    """The model of mm/ that ``model_type`` names, its weights a function of the seed."""
    setup.seed_everything(opt["manual_seed"], "init")
    return setup.build("model", MODELS.module_dict[opt["model_type"]], opt)


def optim_wrapper(opt: Dict[str, Any]) -> Dict[str, Any]:
    """This package's wrapper; or MMEngine's that ``mmengine: optim_wrapper`` names, with the optimizer of ``train``."""
    own, train = opt["mmengine"]["optim_wrapper"], opt["train"]
    if own is None:
        return {"constructor": f"{SCOPE}.DiffusionOptimConstructor"}
    clip = {"clip_grad": {"max_norm": train["grad_clip"]}} if train["grad_clip"] else {}
    return {"optimizer": dict(train["optim_g"]), **clip, **copy.deepcopy(own)}


def find_saved(opt: Dict[str, Any]) -> Optional[setup.Saved]:
    """The checkpoint to go on from, with its iteration."""
    root = opt["path"]["experiments_root"]
    checkpoint = find_checkpoint(opt, root)
    return setup.Saved(_check(checkpoint), checkpoint, root, f"from {checkpoint}") if checkpoint else None


def load_saved(model: torch.nn.Module, saved: setup.Saved) -> List[str]:
    """Weights of a checkpoint, all of them: MMEngine leaves out, without an error, what does not fit."""
    load_into(model.net_g, saved.content, True, "params")
    if model.averaged:
        load_into(model.net_g_ema, saved.content, True, "params_ema")
    return []


def make_folder(opt: Dict[str, Any]) -> None:
    """The folder of the run; an older one is renamed."""
    if opt["rank"] == 0:
        compat.mkdir_and_rename(opt["path"]["log"])


def find_checkpoint(opt: Dict[str, Any], root: str) -> Optional[str]:
    """The checkpoint of MMEngine to go on from: the newest that can be read, or the one that is named.

    Raises:
        UserError: if the folder is of another engine's run, or none of its checkpoints can be read.
    """
    if not opt["auto_resume"]:
        file = opt["path"].get("resume_state")
        if file:
            _check(file)
        return file
    found = numbered(root, "iter_")
    states = os.path.join(root, "training_states")
    if not found and os.path.isdir(states) and os.listdir(states):
        raise UserError(
            f"{root} was trained with engine: basicsr, whose training states MMEngine cannot go on from;"
            " name its weights in path:pretrain_network_g, or start without --auto_resume"
        )
    for iteration in sorted(found, reverse=True):
        try:
            _check(found[iteration])
            return found[iteration]
        except UserError as err:
            if opt["rank"] == 0:
                print(f"passed over: {err}", flush=True)
    if found:
        raise UserError(f"no checkpoint in {root} can be read; move that folder away to start from scratch")
    return None


def _check(file: str) -> int:
    """The iteration of a checkpoint that training can go on from."""
    content = read_checkpoint(file)
    if not isinstance(content, dict) or not {"meta", "state_dict", "optimizer"} <= content.keys():
        raise UserError(f"{file} is no checkpoint of MMEngine that training can go on from")
    return content["meta"]["iter"]


def loops_of(opt: Dict[str, Any], phase: str, sets: List[Any]) -> Dict[str, Any]:
    """Loader, loop and evaluator for validation or test of data sets."""
    if not sets:
        return {}
    loop = {"type": f"{SCOPE}.RestorationLoop", "datasets": sets, "opt": opt, "phase": phase}
    return {f"{phase}_dataloader": DataLoader(sets[0]), f"{phase}_cfg": loop, f"{phase}_evaluator": []}


MMENGINE = setup.Engine(find_saved, build_model, load_saved, make_folder)


def train(opt: Dict[str, Any], args: argparse.Namespace) -> int:
    """Train as complete options say; returns the exit code (128 + signal after a stop that was asked for).

    Raises:
        UserError: naming what is wrong.
    """
    root, own, options = opt["path"]["experiments_root"], opt["mmengine"], opt["train"]
    if opt["model_type"] == "BIRDModel":
        raise UserError("BIRDModel restores without training: use tools/test.py or tools/restore.py")
    begun = setup.begin_training(opt, args.opt, MMENGINE)
    model, train_set, val_sets = begun.model, begun.train_set, begun.val_sets
    checkpoint = begun.saved.content if begun.saved else None
    data = opt["datasets"]["train"]
    sampler = KeyedSampler(train_set, data["batch_size_per_gpu"], opt["manual_seed"])
    hooks = [{"type": f"{SCOPE}.SeedHook", "seed": opt["manual_seed"]}]
    if not own["param_scheduler"]:
        schedule = {"scheduler": options.get("scheduler"), "warmup_iter": options["warmup_iter"]}
        hooks.append({"type": f"{SCOPE}.LearningRateHook", **schedule})
    if options["ema_decay"]:
        hooks.append({"type": f"{SCOPE}.AverageHook", "decay": options["ema_decay"], "start": options["ema_start"]})
    hooks.append({"type": f"{SCOPE}.NoiseBandsHook", "interval": opt["logger"]["print_freq"]})
    hooks += [{"type": f"{SCOPE}.PicturesHook"}, {"type": f"{SCOPE}.StopHook"}]
    loop = {
        "type": f"{SCOPE}.KeyedTrainLoop",
        "max_iters": options["total_iter"],
        "val_interval": opt["val"]["val_freq"],
        "accumulate": options["accumulate"],
    }
    parts = {
        "model": model,
        "train_dataloader": training_loader(train_set, data, sampler),
        "train_cfg": loop,
        "optim_wrapper": optim_wrapper(opt),
        "param_scheduler": own["param_scheduler"],
        "load_from": checkpoint,
        "resume": checkpoint is not None,
        "custom_hooks": hooks,
        **loops_of(opt, "val", val_sets),
    }
    with mmengine_errors("option mmengine"):
        runner = runner_of(opt, root, args.launcher, parts)
        runner.train()
    stop = stop_hook(runner).stop
    return 128 + stop.signal if stop.signal else 0


def test(opt: Dict[str, Any], args: argparse.Namespace) -> int:
    """Test on the option file's val and test datasets, as under BasicSR; returns the exit code.

    Raises:
        UserError: naming what is wrong.
    """
    root = opt["path"]["results_root"]
    model, sets, _ = setup.begin_test(opt, args.force_yml or [], MMENGINE)
    with mmengine_errors("option mmengine"):
        runner = runner_of(opt, root, args.launcher, {"model": model, **loops_of(opt, "test", sets)})
        runner.test()
    return runner.test_loop.code


def run_config(args: argparse.Namespace, is_train: bool) -> int:
    """Train or test a configuration of MMEngine's own (.py), which runs as code.

    Raises:
        UserError: without ``--trust-config``, or if it is none.
    """
    path = args.opt
    if not args.trust_config:
        raise UserError(f"{path}: MMEngine's .py configurations run code; if you trust this one, add --trust-config")
    if not os.path.isfile(path):
        raise UserError(f"option file {path} cannot be read: No such file or directory")
    try:
        cfg = Config.fromfile(path)
    except Exception as err:  # whatever the file does
        raise UserError(f"{path}: {type(err).__name__}: {err}") from err
    changes: Dict[str, Any] = {}
    apply_overrides(changes, args.force_yml)
    cfg.merge_from_dict(changes)
    cfg.launcher, cfg.resume = args.launcher, args.auto_resume or cfg.get("resume", False)
    cfg.setdefault("work_dir", os.path.join("experiments", os.path.splitext(os.path.basename(path))[0]))
    if "model" not in cfg:
        raise UserError(f"{path}: a configuration of MMEngine has a model")
    cpu = not torch.cuda.is_available()
    if args.launcher != "none" and not torch.distributed.is_initialized():
        compat.init_dist(args.launcher, **({"backend": "gloo"} if cpu else {}))
    if cpu and args.launcher != "none":
        cfg.setdefault("model_wrapper_cfg", {"type": "MMDistributedDataParallel", "broadcast_buffers": False})
        cfg.model_wrapper_cfg.device_ids = None
    kind = FlexibleRunner if "strategy" in cfg else Runner
    with mmengine_errors(path):
        runner = kind.from_cfg(cfg)
        runner.train() if is_train else runner.test()
    return 0
