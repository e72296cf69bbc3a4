"""A diffusion task under BasicSR, whatever it restores or generates."""

from __future__ import annotations

from collections import OrderedDict
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, ClassVar

import torch
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ucdir_plugin.training.steps import LossSums, parts_of, update_average
from ucdir_plugin.training.task import DiffusionTask
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.protocols import Averaged


class DiffusionModel(SRModel):
    """Steps, averages, logs and exact resume of a task's network; a subclass says which task, and what it tests.

    In ``feed_data`` a subclass calls :meth:`take`.
    """

    task_class: ClassVar[type[DiffusionTask]]

    def __init__(self, opt: dict):
        BaseModel.__init__(self, opt)
        self.task = self.task_class(opt, self.device)
        self.schedule, self.sampling = self.task.schedule, self.task.sampling
        net = self.task.network()
        self.net_g = self.model_to_device(self.task.compiled(net))
        self.print_network(self.net_g)
        self.task.load_first(self.get_bare_model(self.net_g), self.load_network)
        if self.is_train:
            self.init_training_settings()

    def init_training_settings(self) -> None:
        """Averages, losses, mixed precision, optimizers: what ``opt['train']`` asks for.

        Raises:
            UserError: for what this device or this network cannot do.
        """
        train = self.opt["train"]
        bare = self.get_bare_model(self.net_g)
        self.net_g.train()
        self.task.train_mode(bare)
        self.ema_decay, self.ema_start = train.get("ema_decay", 0), train.get("ema_start", 0)
        if self.ema_decay > 0:
            self.net_g_ema = self.task.compiled(deepcopy(bare)).eval().requires_grad_(False)
            pretrained = self.opt["path"].get("pretrain_network_g")
            if pretrained:
                self.load_network(self.net_g_ema, pretrained, self.opt["path"].get("strict_load_g", True), "params_ema")
        self.task.prepare_training()
        if train.get("amp") and isinstance(self.net_g, DataParallel):
            raise UserError("option train:amp: several GPUs in one process lose it; use torchrun, one process a GPU")
        self.setup_optimizers()
        self.stepper = self.task.stepper(self.optimizer_g, self.get_bare_model(self.net_g))
        if train.get("scheduler"):
            self.setup_schedulers()
        self.sums = LossSums(self.task.band_log)

    def setup_optimizers(self) -> None:
        """Build the optimizer of the task's parameters."""
        self.optimizer_g = self.task.optimizer(self.get_bare_model(self.net_g))
        self.optimizers.append(self.optimizer_g)

    def net_to_use(self) -> torch.nn.Module:
        """The averaged network if there is one; without any parallel wrapper."""
        return self.net_g_ema if isinstance(self, Averaged) else self.get_bare_model(self.net_g)

    def take(self, data: dict[str, Any]) -> None:
        """A batch of the data loader: sets ``batch``, and its samples' ``numbers`` (None under BasicSR's loop)."""
        self.batch = self.task.batch(data)
        self.numbers = data["sample_number"].tolist() if "sample_number" in data else None

    def optimize_parameters(self, current_iter: int) -> None:
        """One step; a step whose loss or gradient is not finite changes nothing and is counted.

        Raises:
            UserError: after ``max_bad_steps`` such steps in a row.
        """
        train = self.opt["train"]
        size = len(self.batch["gt"])
        numbers = self.numbers
        if numbers is None:  # under BasicSR's own loop
            first = ((current_iter - 1) * self.opt["world_size"] + self.opt["rank"]) * size
            numbers = list(range(first, first + size))
        drawn = self.task.draw(self.batch, numbers)
        self.optimizer_g.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        errors = []
        for rows in parts_of(size, train.get("accumulate", 1)):
            share = (rows.stop - rows.start) / size
            # DDP needs to exchange gradients only with the last part's.
            waits = rows.stop < size and isinstance(self.net_g, DistributedDataParallel)
            with self.net_g.no_sync() if waits else nullcontext():
                part = {name: None if value is None else value[rows] for name, value in drawn.items()}
                terms, error = self.task.terms(self.net_g, part)
                self.stepper.backward(sum(terms.values()) * share)
            errors.append(error)
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() * share
        if self.stepper.step(current_iter, losses, get_root_logger()):
            self.sums.add(losses, drawn["noise_level"], torch.cat(errors))
            if self.ema_decay > 0:
                live = self.get_bare_model(self.net_g)
                update_average(self.net_g_ema, live, current_iter, self.ema_start, self.ema_decay)

    def get_current_log(self) -> OrderedDict:
        """Losses averaged since the last call, over all ranks; a band without samples is left out."""
        return self.sums.read(self.opt["dist"])

    def save(self, epoch: int, current_iter: int) -> None:
        """Save networks and training state; to be called on all ranks."""
        if self.opt["dist"]:
            self.sums.gather(self.opt["rank"])
        super().save(epoch, current_iter)

    def extra_state(self) -> dict[str, Any]:
        """What a training state holds besides BasicSR's own entries."""
        return {**self.stepper.state_dict(), "log": self.sums.state_dict()}

    def resume_training(self, resume_state: dict) -> None:
        """Go on from a training state: optimizers, schedulers, scaling and log."""
        super().resume_training(resume_state)
        extra = resume_state.get("extra", {})
        self.stepper.load_state_dict(extra)
        self.sums.load_state_dict(extra.get("log", {}), self.opt["rank"], self.device)
