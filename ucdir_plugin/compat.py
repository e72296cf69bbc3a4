"""The only file that patches the ecosystem, and what the rest of the package uses of BasicSR.

BasicSR 1.4.2, its last release, is made to run on a current torch and torchvision and on the CPU; one function of
MMEngine is patched too. Import it before anything of BasicSR. The aliases of vanished modules are made at import, so
that spawned workers have them too. Each patch names the fault that it cures, and stands aside where upstream has mended
it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import math
import os
import subprocess
import sys
from typing import Any, Callable

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DataParallel, DistributedDataParallel

if (
    "torchvision.transforms.functional_tensor" not in sys.modules  # a script may have its own stand-in
    and importlib.util.find_spec("torchvision.transforms.functional_tensor") is None
):
    # Gone since torchvision 0.17; BasicSR 1.4.2 imports rgb_to_grayscale from it.
    import torchvision.transforms.functional as _functional

    sys.modules["torchvision.transforms.functional_tensor"] = _functional

# isort: split
import basicsr
import basicsr.data.degradations
import basicsr.models.lr_scheduler
import basicsr.models.sr_model
import basicsr.models.video_base_model
import basicsr.test
import basicsr.train
import basicsr.utils.dist_util
import basicsr.utils.options

# What the rest of the package uses of BasicSR: nothing else imports it but registry.py and models/.
from basicsr.data import build_dataloader, build_dataset
from basicsr.data.prefetch_dataloader import CPUPrefetcher, CUDAPrefetcher
from basicsr.data.transforms import augment, paired_random_crop
from basicsr.losses import build_loss
from basicsr.metrics import calculate_metric, calculate_niqe
from basicsr.models import build_model, lr_scheduler
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.train import init_tb_loggers
from basicsr.utils import (
    AvgTimer,
    FileClient,
    MessageLogger,
    get_root_logger,
    get_time_str,
    img2tensor,
    make_exp_dirs,
    mkdir_and_rename,
    tensor2img,
)
from basicsr.utils.dist_util import get_dist_info
from basicsr.utils.lmdb_util import make_lmdb_from_imgs
from basicsr.utils.options import dict2str
from mmengine.fileio import LocalBackend

from ucdir_plugin.utils import checkpoints, training_states
from ucdir_plugin.utils.errors import NotMeasurable, UserError, did_you_mean
from ucdir_plugin.utils.files import write_atomically

__all__ = [
    "AvgTimer",
    "BaseModel",
    "CPUPrefetcher",
    "CUDAPrefetcher",
    "FileClient",
    "MessageLogger",
    "SRModel",
    "augment",
    "build_dataloader",
    "build_dataset",
    "build_loss",
    "build_model",
    "build_optimizer",
    "calculate_metric",
    "calculate_niqe",
    "dict2str",
    "get_dist_info",
    "get_root_logger",
    "get_time_str",
    "img2tensor",
    "init_dist",
    "init_tb_loggers",
    "lr_scheduler",
    "make_exp_dirs",
    "make_lmdb_from_imgs",
    "mkdir_and_rename",
    "paired_random_crop",
    "set_learning_rates",
    "take_over_option_files",
    "tensor2img",
]

_PATCHED_VERSION = "1.4.2"


def init_dist(launcher: str, backend: str = "nccl", port: int | None = None, timeout: float | None = None) -> None:
    """BasicSR's ``init_dist``, which divides by the number of GPUs, also without any: gloo on the CPU.

    Args:
        launcher: pytorch (torchrun), or slurm, whose variables are made torchrun's.
        port: of slurm's meeting point, instead of ``$MASTER_PORT`` or 29500.
        timeout: seconds that ranks wait for each other; default: torch's, 1800, or 600 with NCCL.

    Raises:
        UserError: if the launcher's variables are missing, the port is taken, or the ranks do not find each other.
    """
    needed = {"pytorch": ("RANK", "WORLD_SIZE"), "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODELIST")}[launcher]
    for name in needed:
        if name not in os.environ:
            start = {"pytorch": "torchrun --nproc_per_node=N", "slurm": "srun python"}[launcher]
            raise UserError(f"--launcher {launcher}: {name} is not set; start with {start} tools/train.py ...")
    if launcher == "slurm":
        _take_over_slurm(port)
    limit = {} if timeout is None else {"timeout": datetime.timedelta(seconds=timeout)}
    try:
        if torch.cuda.is_available() and backend != "gloo":
            return _upstream_init_dist("pytorch", backend, **limit)
        dist.init_process_group(backend="gloo", **limit)
    except dist.DistError as err:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if "EADDRINUSE" in str(err):
            cure = "dist_params: port (or MASTER_PORT)" if launcher == "slurm" else "MASTER_PORT"
            raise UserError(f"{place}: the port is in use, perhaps by another run; set {cure} to a free one") from err
        reason = str(err).splitlines()[0]
        raise UserError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not find the others at {place} ({reason}):"
            " were all started, and does nothing else answer at that port?"
        ) from err
    return None


def _take_over_slurm(port: int | None) -> None:
    """Slurm's variables as torchrun's; the meeting point is ``$MASTER_ADDR``, else the job's first machine."""
    environment = os.environ
    environment["RANK"], environment["WORLD_SIZE"] = environment["SLURM_PROCID"], environment["SLURM_NTASKS"]
    environment["LOCAL_RANK"] = environment.get("SLURM_LOCALID", "0")
    environment["MASTER_PORT"] = str(port or environment.get("MASTER_PORT") or 29500)
    if "MASTER_ADDR" not in environment:
        command = ["scontrol", "show", "hostname", environment["SLURM_NODELIST"]]
        try:
            environment["MASTER_ADDR"] = subprocess.check_output(command, text=True).split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as err:
            raise UserError(
                f"--launcher slurm: {' '.join(command)} does not tell the first machine ({err}); set MASTER_ADDR to it"
            ) from err


def _load_resume_state(opt: dict) -> dict | None:
    """Upstream calls ``torch.cuda.current_device()`` on a CPU and looks below the working directory only."""
    return training_states.find_resume_state(opt)


def build_optimizer(optim_type: str, params: list, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
    """Any optimizer of ``torch.optim``.

    Raises:
        UserError: for an unknown one.
    """
    cls = getattr(torch.optim, optim_type, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        known = [n for n, c in vars(torch.optim).items() if isinstance(c, type)]
        raise UserError(f"there is no optimizer {optim_type!r} in torch.optim; {did_you_mean(optim_type, known)}")
    return cls(params, lr=lr, **kwargs)


def _get_optimizer(self: BaseModel, optim_type: str, params, lr: float, **kwargs) -> torch.optim.Optimizer:
    """Upstream knows only Adam."""
    return build_optimizer(optim_type, params, lr, **kwargs)


def _model_to_device(self: BaseModel, net: torch.nn.Module) -> torch.nn.Module:
    """Upstream asks for the current CUDA device; without one, DistributedDataParallel takes no device."""
    if self.opt["dist"] and self.device.type == "cpu":
        unused = self.opt.get("find_unused_parameters", False)
        return DistributedDataParallel(
            net.to(self.device), device_ids=None, broadcast_buffers=False, find_unused_parameters=unused
        )
    return _upstream_model_to_device(self, net)


def set_learning_rates(optimizers: list, schedulers: list, current_iter: int, warmup_iter: int = -1) -> None:
    """Upstream's warm-up overwrites the rate that a multi-step scheduler goes on from: (warmup - 1) / warmup remains.

    Here the warm-up factor is taken off before the scheduler's step and put on after it.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for group in groups:
        group["lr"] = group.pop("lr_without_warmup", group["lr"])
    if current_iter > 1:
        for scheduler in schedulers:
            scheduler.step()
    if current_iter < warmup_iter:
        for group in groups:
            group["lr_without_warmup"] = group["lr"]
            group["lr"] *= current_iter / warmup_iter


def _update_learning_rate(self: BaseModel, current_iter: int, warmup_iter: int = -1) -> None:
    set_learning_rates(self.optimizers, self.schedulers, current_iter, warmup_iter)


def _cosine_get_lr(self) -> list[float]:
    """Upstream finds no period past the last one, a TypeError in training: hold the end of the last."""
    last = self.last_epoch
    self.last_epoch = min(last, self.cumulative_period[-1])
    try:
        return _upstream_cosine_get_lr(self)
    finally:
        self.last_epoch = last


def _add_jpg_compression(img, quality=90):
    """Upstream passes OpenCV a float quality, which OpenCV 4.14 and 5 refuse."""
    return _upstream_add_jpg(img, int(quality))


def _print_network(self: BaseModel, net: torch.nn.Module) -> None:
    """Upstream prints every layer of the network; its name and size are what a log needs."""
    if isinstance(net, (DataParallel, DistributedDataParallel)):
        net = net.module
    count = sum(p.numel() for p in net.parameters())
    get_root_logger().info(f"Network: {type(net).__name__}, with parameters: {count:,d}")


def _model_ema(self: BaseModel, decay: float = 0.999) -> None:
    """Upstream averages parameters and forgets buffers (the statistics of batch norm): copy these."""
    _upstream_model_ema(self, decay)
    for ema, live in zip(self.net_g_ema.buffers(), self.get_bare_model(self.net_g).buffers()):
        ema.copy_(live)


def _calculate_metric(data: dict, opt: dict) -> float:
    """Upstream's loop ends with the first image that a metric has no number for, as NIQE of 128x128 pixels."""
    failures: tuple = (NotMeasurable,)
    if opt["type"] == "calculate_niqe":
        failures += (np.linalg.LinAlgError, ValueError, IndexError, RuntimeError, AssertionError)
    try:
        return calculate_metric(data, opt)
    except failures as err:
        size = "x".join(str(side) for side in data["img"].shape[1::-1])
        get_root_logger().warning(f"{opt['type']} has no number for an image of {size} pixels: {err or type(err)}")
        return math.nan


class _OptionFile:
    """What ``yaml.load`` takes for a loader; the reader that was handed to :func:`take_over_option_files` reads."""

    read: Callable[[str], dict]
    value: Callable[[str], Any]

    def __init__(self, stream: Any):
        self.stream = stream

    def get_single_data(self) -> Any:
        if hasattr(self.stream, "name"):
            return self.read(self.stream.name)
        return self.value(self.stream if isinstance(self.stream, str) else self.stream.read())

    def dispose(self) -> None:
        """Nothing is held."""


def take_over_option_files(
    read: Callable[[str], dict],
    value: Callable[[str], Any],
    complete: Callable[[dict, argparse.Namespace, str, bool], dict],
) -> None:
    """Let BasicSR's own commands read option files as this package does.

    Upstream runs python tags, evaluates ``--force_yml``, and takes 1e-2 for text.

    Args:
        read: a file's path -> its options.
        value: a value of ``--force_yml`` as it was typed -> the value.
        complete: options, arguments, the run's root folder and whether it trains -> the options to run with.
    """
    if basicsr.__version__ != _PATCHED_VERSION:
        return
    options = basicsr.utils.options
    _, dumper = _upstream_yaml()
    _OptionFile.read, _OptionFile.value = staticmethod(read), staticmethod(value)

    def parse_options(root_path: str, is_train: bool = True) -> tuple[dict, argparse.Namespace]:
        opt, args = _upstream_parse_options(root_path, is_train)
        return complete(opt, args, root_path, is_train), args

    options.ordered_yaml = lambda: (_OptionFile, dumper)
    options._postprocess_yml_value = value
    options.parse_options = basicsr.train.parse_options = basicsr.test.parse_options = parse_options


def _put(self: LocalBackend, obj: bytes | memoryview, filepath: str | os.PathLike) -> None:
    """MMEngine 0.10 writes checkpoints in place: a kill leaves half of one under its name."""
    write_atomically(obj, filepath)


LocalBackend.put = _put

if basicsr.__version__ == _PATCHED_VERSION and not hasattr(BaseModel, "_ucdir_plugin_patched"):
    BaseModel._ucdir_plugin_patched = True
    _upstream_init_dist = basicsr.utils.dist_util.init_dist
    basicsr.utils.dist_util.init_dist = basicsr.utils.options.init_dist = init_dist
    basicsr.train.load_resume_state = _load_resume_state
    _upstream_parse_options, _upstream_yaml = basicsr.utils.options.parse_options, basicsr.utils.options.ordered_yaml
    basicsr.models.sr_model.calculate_metric = basicsr.models.video_base_model.calculate_metric = _calculate_metric
    _upstream_model_to_device = BaseModel.model_to_device
    _upstream_model_ema = BaseModel.model_ema
    BaseModel.get_optimizer = _get_optimizer
    BaseModel.model_to_device = _model_to_device
    BaseModel.update_learning_rate = _update_learning_rate
    BaseModel.print_network = basicsr.utils.dist_util.master_only(_print_network)
    BaseModel.model_ema = _model_ema
    # Atomic files and refused pickles for every model, ours or not.
    BaseModel.save_network = basicsr.utils.dist_util.master_only(training_states.save_network)
    BaseModel.save_training_state = basicsr.utils.dist_util.master_only(training_states.save_training_state)
    BaseModel.load_network = checkpoints.load_network
    _schedulers = basicsr.models.lr_scheduler
    _upstream_cosine_get_lr = _schedulers.CosineAnnealingRestartLR.get_lr
    _schedulers.CosineAnnealingRestartLR.get_lr = _cosine_get_lr
    _upstream_add_jpg = basicsr.data.degradations.add_jpg_compression
    basicsr.data.degradations.add_jpg_compression = _add_jpg_compression
