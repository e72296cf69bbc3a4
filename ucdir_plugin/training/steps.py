"""Parts of a training step: losses by noise level, schedulers, averaged weights, accumulation."""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Mapping, Optional

import torch
import torch.distributed as dist
from torch import nn

from ucdir_plugin.compat import BaseModel
from ucdir_plugin.utils.checkpoints import not_finite
from ucdir_plugin.utils.errors import UserError

BANDS = 4
"""The error of the noise is logged by noise level sqrt(alpha_bar): [0, 1/4), ... [3/4, 1]."""


def parts_of(batch: int, parts: int) -> List[slice]:
    """Rows of a batch that is computed in ``parts`` (at most one each sample), one after the other."""
    chunks = torch.arange(batch).tensor_split(min(parts, batch))
    return [slice(int(chunk[0]), int(chunk[-1]) + 1) for chunk in chunks]


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
        """Compute the gradients of a loss, scaled where the precision needs it."""
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
        """Take over what :meth:`state_dict` gave."""
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
        """Sums and counts since the last line of the log, as plain lists."""
        return {name: pair.tolist() for name, pair in self.sums.items()}

    def load_state_dict(self, state: Mapping[str, List[float]], rank: int, device: torch.device) -> None:
        """Take over what :meth:`state_dict` gave; rank 0 has the sums of all."""
        self.sums = {name: torch.tensor(pair, device=device) * float(rank == 0) for name, pair in state.items()}
