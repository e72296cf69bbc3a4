"""What training a diffusion network takes, whatever engine runs it: draws, losses, steps, averages, logs.

Under BasicSR models/ calls it, under MMEngine mm/.
"""

from __future__ import annotations

import inspect
import logging
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
import torch.distributed as dist
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from torch import nn

from ucdir_plugin import sampling
from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.errors import UserError, did_you_mean
from ucdir_plugin.weights import not_finite

BANDS = 4
"""The error of the noise is logged by noise level sqrt(alpha_bar): [0, 1/4), ... [3/4, 1]."""

Batch = Dict[str, Any]
"""What a network trains or works on: tensors of one row each sample, on the device, images in [-1, 1]."""


def signed(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], as data sets give them, in the [-1, 1] of diffusion; a new tensor."""
    return images * 2 - 1


def unsigned(images: torch.Tensor) -> torch.Tensor:
    """The reverse of :func:`signed`; a new tensor."""
    return (images + 1) / 2


def training_noise(
    schedule: NoiseSchedule,
    numbers: list[int],
    shape: tuple[int, ...],
    seed: int,
    draw: Callable[[NoiseSchedule, torch.Generator], float] = NoiseSchedule.sample_level,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level (B,) and noise (B, *shape) of training samples, each a function of the seed and its sample number.

    Args:
        draw: from the schedule, how noisy a sample is: a level, or a time step.
    """
    levels, noises = [], []
    for number in numbers:
        stream = generator(seed, "train", number)
        levels.append(draw(schedule, stream))
        noises.append(torch.randn(shape, generator=stream))
    return torch.tensor(levels, dtype=torch.float32), torch.stack(noises)


def parts_of(batch: int, parts: int) -> List[slice]:
    """Rows of a batch that is computed in ``parts`` (at most one each sample), one after the other."""
    chunks = torch.arange(batch).tensor_split(min(parts, batch))
    return [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]


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


def build_schedulers(scheduler: Optional[Dict[str, Any]], optimizers: list) -> list:
    """``train: scheduler`` of an option file, for each optimizer; none for None."""
    if not scheduler:
        return []
    holder = SimpleNamespace(opt={"train": {"scheduler": dict(scheduler)}}, optimizers=optimizers, schedulers=[])
    BaseModel.setup_schedulers(holder)
    return holder.schedulers


def update_average(averaged: nn.Module, live: nn.Module, iteration: int, start: int, decay: float) -> None:
    """A copy until iteration ``start``; then the decay is ramped up, so that short runs validate something."""
    updates = iteration - start
    decay = min(decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(live.parameters()), 1 - decay)
        for ema, buffer in zip(averaged.buffers(), live.buffers()):
            ema.copy_(buffer)


class Stepper:
    """An optimizer's steps: scaled (fp16) and clipped; one whose loss or gradient is not finite changes nothing.

    Args:
        optimizer: what steps.
        net: whose parameters are named in messages, those of the optimizer among them.
        device: the type of the device.
        grad_clip: largest norm of the gradient.
        amp: "fp16" needs a scaler.
        limit: so many bad steps in a row end the training.
        clip: (largest norm) -> norm; default: that of the optimizer's parameters.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        net: nn.Module,
        device: str = "cpu",
        grad_clip: Optional[float] = None,
        amp: Optional[str] = None,
        limit: int = 10,
        clip: Optional[Callable[[float], torch.Tensor]] = None,
    ):
        self.optimizer, self.net, self.limit, self.bad, self.bad_in_a_row = optimizer, net, limit, 0, 0
        self.scaler = torch.amp.GradScaler(device, enabled=amp == "fp16")
        self._largest, self._clip = grad_clip or float("inf"), clip or self._clip_parameters

    def _parameters(self) -> List[torch.Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _clip_parameters(self, largest: float) -> torch.Tensor:
        grads = [p.grad for p in self._parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if largest < math.inf and bool(norm.isfinite()):  # else all would become NaN, and none could be named
            torch.nn.utils.clip_grads_with_norm_(self._parameters(), largest, norm)
        return norm

    def backward(self, loss: torch.Tensor) -> None:
        # An infinite loss may have a finite gradient (L1); times inf - inf it has none, which all ranks see.
        self.scaler.scale(loss * (1 + (loss.detach() - loss.detach()))).backward()

    def step(self, iteration: int, losses: Mapping[str, Any], logger: logging.Logger) -> bool:
        """Whether the step was taken.

        Args:
            iteration, losses: for the log; the losses by name, scalars.

        Raises:
            UserError: after ``limit`` bad steps in a row, or at once where a weight has become NaN or infinite.
        """
        self.scaler.unscale_(self.optimizer)
        scale = self.scaler.get_scale()
        # Gradients are the same on all ranks, and not finite where any rank's loss is not: all take the same way here.
        good = bool(torch.isfinite(self._clip(self._largest)))
        if good:
            self.scaler.step(self.optimizer)
            self.bad_in_a_row = 0
            weights = self._parameters()
            # Before the average takes them over, or a checkpoint. The norm is one number for all; it may overflow.
            if not bool(torch.isfinite(torch.nn.utils.get_total_norm([p.detach() for p in weights]))):
                self._check_weights(iteration)
        self.scaler.update()
        # In fp16 it is mostly an overflow that a lower scale cures; not where the scale has stayed, or is 1 or less.
        if not good and (scale <= 1 or self.scaler.get_scale() >= scale):
            self._check_weights(iteration)
            self._count(iteration, losses, logger)
        return good

    def _check_weights(self, iteration: int) -> None:
        damaged = not_finite(self.net)
        if damaged is not None:
            raise UserError(
                f"training stopped at iteration {iteration}: the weight {damaged} is no longer finite; the last"
                " checkpoint is kept. Lower the learning rate, or set grad_clip"
            )

    def _count(self, iteration: int, losses: Mapping[str, Any], logger: logging.Logger) -> None:
        self.bad += 1
        self.bad_in_a_row += 1
        values = {name: float(value) for name, value in losses.items()}
        faults = [f"the loss {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        grads = ((n, p.grad) for n, p in self.net.named_parameters() if p.grad is not None)
        faults += [f"the gradient of {n} is not finite" for n, grad in grads if not bool(grad.isfinite().all())]
        what = faults[0] if faults else "the norm of the gradient is not finite"  # another rank's loss: all gradients
        logger.warning(f"iteration {iteration}: {what}; step skipped ({self.bad})")
        if self.bad_in_a_row >= self.limit:
            raise UserError(
                f"training stopped at iteration {iteration}: {self.bad_in_a_row} steps in a row without a finite loss"
                f" and gradient ({what}); the last checkpoint is kept. Lower the learning rate, set grad_clip, or check"
                " the data"
            )

    def state_dict(self) -> Dict[str, Any]:
        """All but the optimizer's."""
        return {
            "bad_steps": self.bad,
            "bad_steps_in_a_row": self.bad_in_a_row,
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.bad, self.bad_in_a_row = state.get("bad_steps", 0), state.get("bad_steps_in_a_row", 0)
        if state.get("scaler"):
            self.scaler.load_state_dict(state["scaler"])


class LossSums:
    """Losses, and errors by noise level, for the log: summed on the device, read once per print.

    Args:
        band_log: under this name, and the band's number, the errors are logged.
    """

    def __init__(self, band_log: str):
        self.band_log = band_log
        self.sums: Dict[str, torch.Tensor] = {}

    def add(self, losses: Mapping[str, torch.Tensor], levels: torch.Tensor, errors: torch.Tensor) -> None:
        """Losses (scalars) of a step, and noise level and error (B,) of each sample."""

        def add(name: str, value: torch.Tensor, count: torch.Tensor) -> None:
            pair = torch.stack((value.float(), count.float()))
            self.sums[name] = self.sums[name] + pair if name in self.sums else pair

        for name, value in losses.items():
            add(name, value, torch.ones_like(value))
        band = (levels * BANDS).long().clamp(max=BANDS - 1)
        for i in range(BANDS):
            mask = (band == i).float()
            add(f"{self.band_log}{i}", (errors * mask).sum(), mask.sum())

    def read(self, distributed: bool) -> OrderedDict:
        """Means since the last call, over all ranks; a band without samples is left out."""
        log: OrderedDict = OrderedDict()
        if self.sums:
            sums = torch.stack(list(self.sums.values()))
            if distributed:
                dist.all_reduce(sums)
            log.update((n, s / c) for n, (s, c) in zip(self.sums, sums.tolist()) if c)
        self.sums = {}
        return log

    def gather(self, rank: int) -> None:
        """Rank 0 gets the sums of all, as it alone writes them."""
        if self.sums:
            sums = torch.stack(list(self.sums.values()))
            dist.all_reduce(sums)
            self.sums = dict(zip(self.sums, sums * (rank == 0)))

    def state_dict(self) -> Dict[str, List[float]]:
        return {name: pair.tolist() for name, pair in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, List[float]], rank: int, device: torch.device) -> None:
        self.sums = {name: torch.tensor(pair, device=device) * float(rank == 0) for name, pair in state.items()}


class DiffusionTask(ABC):
    """What a sample is, what it trains with, and how the network is used; it holds no weights.

    Args:
        opt: an option file's, checked or as it is: ``network_g``, ``diffusion``, ``train``, ``val: sampling``,
            ``path``, ``manual_seed``, ``compile``.
        device: that the network is on.
    """

    band_log = "l_eps_l1_band"

    def __init__(self, opt: Dict[str, Any], device: torch.device):
        from ucdir_plugin.options import SamplingOptions  # not needed to import the package

        # Complete under tools/train.py; others hand over what they have.
        self.opt, self.device, self.train_opt = opt, device, opt.get("train") or {}
        self.schedule = self.schedule_options()(**opt.get("diffusion") or {}).schedule()
        self.sampling = SamplingOptions(**(opt.get("val") or {}).get("sampling") or {})
        self.sampling_dtype = sampling.amp_dtype(device, self.sampling.amp, "option val:sampling:amp")

    @property
    def seed(self) -> int:
        return self.opt.get("manual_seed") or 0

    # What a subclass says

    @abstractmethod
    def schedule_options(self) -> type:
        """The kind of options that ``diffusion`` is."""

    @abstractmethod
    def network(self) -> nn.Module:
        """Build ``network_g``, on the CPU.

        Raises:
            UserError: for one of another kind.
        """

    @abstractmethod
    def batch(self, data: Mapping[str, Any]) -> Batch:
        """A batch of the data loader, on the device, images in [-1, 1]."""

    @abstractmethod
    def draw(self, batch: Batch, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        """What a batch trains with: tensors of one row each sample, on the device; ``noise_level`` (B,) is one.

        Args:
            numbers: of the samples; everything random is a function of the seed and these.
        """

    @abstractmethod
    def terms(
        self, net: nn.Module, part: dict[str, Optional[torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Losses of some rows of :meth:`draw`'s result, by name; their sum is minimised. And each row's error (B,)."""

    # What all have

    def load_first(self, net: nn.Module, load: Callable[..., None]) -> None:
        """Weights to start from or go on with, if the options name some.

        Args:
            load: :func:`ucdir_plugin.weights.load_into`, or an engine's own.
        """
        path = self.opt.get("path") or {}
        if path.get("pretrain_network_g"):
            strict, key = path.get("strict_load_g", True), path.get("param_key_g", "params")
            load(net, path["pretrain_network_g"], strict, key)

    def prepare_training(self) -> None:
        """Losses and mixed precision: what ``train`` asks for.

        Raises:
            UserError: for what this device or this network cannot do.
        """
        self.cri_diffusion = build_loss(self.train_opt["diffusion_opt"]).to(self.device)
        # A loss of BasicSR may be used too; most do not know of noise levels.
        self.with_level = "noise_level" in inspect.signature(self.cri_diffusion.forward).parameters
        self.amp_dtype = sampling.amp_dtype(self.device, self.train_opt.get("amp"), "option train:amp")

    def compiled(self, net: nn.Module) -> nn.Module:
        """``net``, prepared for torch.compile if the options say so."""
        if self.opt.get("compile"):
            getattr(net, "compile_networks", net.compile)()
        return net

    def autocast(self, dtype: Optional[torch.dtype]) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def train_mode(self, net: nn.Module, training: bool = True) -> None:
        """``net.train``, without any parallel wrapper around ``net``."""
        net.train(training)

    def trained_parameters(self, net: nn.Module) -> list:
        """Parameters, or groups of them."""
        return [p for p in net.parameters() if p.requires_grad]

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """``train: optim_g`` of :meth:`trained_parameters`; Adam, AdamW fused unless the options say otherwise."""
        optim = dict(self.train_opt["optim_g"])
        kind = optim.pop("type")
        if kind in ("Adam", "AdamW") and not optim.get("foreach"):
            optim.setdefault("fused", True)
        return build_optimizer(kind, self.trained_parameters(net), **optim)

    def stepper(self, optimizer: torch.optim.Optimizer, net: nn.Module, clip: Optional[Callable] = None) -> Stepper:
        """The steps of an optimizer of ``net``'s parameters."""
        train = self.train_opt
        return Stepper(
            optimizer,
            net,
            self.device.type,
            train.get("grad_clip"),
            train.get("amp"),
            train.get("max_bad_steps", 10),
            clip,
        )

    def noise_loss(self, eps: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """``train: diffusion_opt`` of predicted and true noise (B, C, H, W) at noise levels (B,), a scalar."""
        extra = {"noise_level": level} if self.with_level else {}
        return self.cri_diffusion(eps, noise, **extra)
