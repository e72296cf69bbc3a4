"""What training a diffusion network takes under BasicSR, whatever it restores or generates."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Callable, Optional

import torch
import torch.distributed as dist
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ucdir_plugin import sampling
from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.errors import UserError

BANDS = 4
"""The error of the noise is logged by noise level sqrt(alpha_bar): [0, 1/4), ... [3/4, 1]."""


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


class DiffusionModel(SRModel, ABC):
    """Steps, averages, faults, logs and exact resume of a diffusion network; subclasses say what a sample is.

    A subclass sets ``net_g``, ``schedule`` and, in ``feed_data``, ``sample_numbers`` (None under BasicSR's own loop).
    """

    # What a subclass says

    @abstractmethod
    def draw(self, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        """What the fed batch trains with: tensors of one row each sample, on the device; ``noise_level`` (B,) is one.

        Args:
            numbers: of the samples; everything random is a function of the seed and these.
        """

    @abstractmethod
    def terms(self, part: dict[str, Optional[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Losses of some rows of :meth:`draw`'s result, by name; their sum is minimised. And each row's error (B,)."""

    band_log = "l_eps_l1_band"
    """Under this name, and the band's number, the rows' errors are logged."""

    # What all have

    def init_training_settings(self) -> None:
        """Averages, losses, mixed precision, optimizers: what ``opt['train']`` asks for.

        Raises:
            UserError: for what this device or this network cannot do.
        """
        train = self.opt["train"]
        self._train_mode(self.net_g)
        self.ema_decay, self.ema_start = train.get("ema_decay", 0), train.get("ema_start", 0)
        if self.ema_decay > 0:
            self.net_g_ema = self._compiled(deepcopy(self.get_bare_model(self.net_g))).eval().requires_grad_(False)
            pretrained = self.opt["path"].get("pretrain_network_g")
            if pretrained:
                self.load_network(self.net_g_ema, pretrained, self.opt["path"].get("strict_load_g", True), "params_ema")
        self.init_losses()
        amp = train.get("amp")
        if amp and isinstance(self.net_g, DataParallel):
            raise UserError("option train:amp: several GPUs in one process lose it; use torchrun, one process a GPU")
        self.amp_dtype = sampling.amp_dtype(self.device, amp, "option train:amp")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
        self.bad_steps = self.bad_steps_in_a_row = 0
        self.setup_optimizers()
        if train.get("scheduler"):
            self.setup_schedulers()
        self._reset_log()

    def init_losses(self) -> None:
        self.cri_diffusion = build_loss(self.opt["train"]["diffusion_opt"]).to(self.device)
        # A loss of BasicSR may be used too; most do not know of noise levels.
        self.with_level = "noise_level" in inspect.signature(self.cri_diffusion.forward).parameters

    def _load_pretrained(self) -> bool:
        """Weights to start from or go on with; returns whether there are some."""
        path = self.opt["path"]
        pretrained = path.get("pretrain_network_g")
        if pretrained:
            strict, key = path.get("strict_load_g", True), path.get("param_key_g", "params")
            self.load_network(self.net_g, pretrained, strict, key)
        return bool(pretrained)

    def _compiled(self, net: torch.nn.Module) -> torch.nn.Module:
        if self.opt.get("compile"):
            getattr(net, "compile_networks", net.compile)()
        return net

    def _autocast(self, dtype: Optional[torch.dtype]) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _train_mode(self, net: torch.nn.Module, training: bool = True) -> None:
        net.train(training)

    def setup_optimizers(self) -> None:
        optim = dict(self.opt["train"]["optim_g"])
        self.optimizer_g = self.get_optimizer(optim.pop("type"), self.trained_parameters(), **optim)
        self.optimizers.append(self.optimizer_g)

    def trained_parameters(self) -> list:
        """Parameters, or groups of them."""
        return [p for p in self.net_g.parameters() if p.requires_grad]

    def get_optimizer(self, optim_type: str, params: list, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        """BasicSR's; Adam and AdamW in their fused form unless the options say otherwise."""
        if optim_type in ("Adam", "AdamW") and not kwargs.get("foreach"):
            kwargs.setdefault("fused", True)
        return super().get_optimizer(optim_type, params, lr, **kwargs)

    def noise_loss(self, eps: torch.Tensor, noise: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """``train: diffusion_opt`` of predicted and true noise (B, C, H, W) at noise levels (B,), a scalar."""
        extra = {"noise_level": level} if self.with_level else {}
        return self.cri_diffusion(eps, noise, **extra)

    def optimize_parameters(self, current_iter: int) -> None:
        """One step; a step whose loss or gradient is not finite changes nothing and is counted.

        Raises:
            UserError: after ``max_bad_steps`` such steps in a row.
        """
        train = self.opt["train"]
        batch = len(self.gt)
        numbers = self.sample_numbers
        if numbers is None:  # under BasicSR's own loop
            first = ((current_iter - 1) * self.opt["world_size"] + self.opt["rank"]) * batch
            numbers = list(range(first, first + batch))
        drawn = self.draw(numbers)
        parts = min(train.get("accumulate", 1), batch)

        self.optimizer_g.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        errors = []
        for i, chunk in enumerate(torch.arange(batch).tensor_split(parts)):
            rows = slice(int(chunk[0]), int(chunk[-1]) + 1)
            share = len(chunk) / batch
            # DDP needs to exchange gradients only with the last part's.
            waits = i < parts - 1 and isinstance(self.net_g, DistributedDataParallel)
            with self.net_g.no_sync() if waits else nullcontext():
                part = {name: None if value is None else value[rows] for name, value in drawn.items()}
                terms, error = self.terms(part)
                self.scaler.scale(sum(terms.values()) * share).backward()
            errors.append(error)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() * share

        self.scaler.unscale_(self.optimizer_g)
        norm = torch.nn.utils.clip_grad_norm_(self.net_g.parameters(), train.get("grad_clip") or float("inf"))
        # Gradients are the same on all ranks, and not finite where any rank's loss is not: all take the same way here.
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer_g)
            self.bad_steps_in_a_row = 0
            self._update_log(losses, drawn["noise_level"], torch.cat(errors))
            if self.ema_decay > 0:
                self._update_ema(current_iter)
        elif self.scaler.get_scale() <= 1:  # above 1, in fp16 only, it is an overflow that a lower scale cures
            self._count_bad_step(current_iter, float(sum(losses.values())))
        self.scaler.update()

    def _count_bad_step(self, current_iter: int, loss: float) -> None:
        self.bad_steps += 1
        self.bad_steps_in_a_row += 1
        logger = get_root_logger()
        logger.warning(
            f"iteration {current_iter}: loss {loss} or its gradient is not finite; step skipped ({self.bad_steps})"
        )
        if self.bad_steps_in_a_row >= self.opt["train"].get("max_bad_steps", 10):
            raise UserError(
                f"training stopped at iteration {current_iter}: {self.bad_steps_in_a_row} steps in a row without"
                " a finite loss; the last checkpoint is kept. Lower the learning rate, set grad_clip, or check the data"
            )

    @torch.no_grad()
    def _update_ema(self, current_iter: int) -> None:
        """A copy until ``ema_start``; then the decay is ramped up, so that short runs validate something."""
        updates = current_iter - self.ema_start
        decay = min(self.ema_decay, (1 + updates) / (10 + updates)) if updates > 0 else 0.0
        live = self.get_bare_model(self.net_g)
        averaged, current = list(self.net_g_ema.parameters()), list(live.parameters())
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for ema, buffer in zip(self.net_g_ema.buffers(), live.buffers()):
            ema.copy_(buffer)

    # Logging: sums on the device, read once per print

    def _reset_log(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}

    def _update_log(self, losses: dict, levels: torch.Tensor, errors: torch.Tensor) -> None:
        def add(name: str, value: torch.Tensor, count: torch.Tensor) -> None:
            pair = torch.stack((value.float(), count.float()))
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

        for name, value in losses.items():
            add(name, value, torch.ones_like(value))
        band = (levels * BANDS).long().clamp(max=BANDS - 1)
        for i in range(BANDS):
            mask = (band == i).float()
            add(f"{self.band_log}{i}", (errors * mask).sum(), mask.sum())

    def get_current_log(self) -> OrderedDict:
        """Losses averaged since the last call, over all ranks; a band without samples is left out."""
        names = list(self._sums)
        log: OrderedDict = OrderedDict()
        if names:
            sums = torch.stack([self._sums[name] for name in names])
            if self.opt["dist"]:
                dist.all_reduce(sums)
            log.update((n, s / c) for n, (s, c) in zip(names, sums.tolist()) if c)
        self._reset_log()
        return log

    def save(self, epoch: int, current_iter: int) -> None:
        """Save networks and training state; to be called on all ranks."""
        if self.opt["dist"] and self._sums:  # rank 0 writes the sums of all
            sums = torch.stack(list(self._sums.values()))
            dist.all_reduce(sums)
            self._sums = dict(zip(self._sums, sums * (self.opt["rank"] == 0)))
        super().save(epoch, current_iter)

    def extra_state(self) -> dict[str, Any]:
        """What a training state holds besides BasicSR's own entries."""
        return {
            "bad_steps": self.bad_steps,
            "bad_steps_in_a_row": self.bad_steps_in_a_row,
            "scaler": self.scaler.state_dict(),
            "log": {name: pair.tolist() for name, pair in self._sums.items()},
        }

    def resume_training(self, resume_state: dict) -> None:
        super().resume_training(resume_state)
        extra = resume_state.get("extra", {})
        self.bad_steps = extra.get("bad_steps", 0)
        self.bad_steps_in_a_row = extra.get("bad_steps_in_a_row", 0)
        mine = float(self.opt["rank"] == 0)
        self._sums = {n: torch.tensor(pair, device=self.device) * mine for n, pair in extra.get("log", {}).items()}
        if extra.get("scaler"):
            self.scaler.load_state_dict(extra["scaler"])
