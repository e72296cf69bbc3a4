"""UCDIR: joint training of predictor and denoiser, and restoring with them, whatever engine runs it."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import torch
from torch import nn

from ucdir_plugin.compat import build_loss
from ucdir_plugin.diffusion import conditions
from ucdir_plugin.diffusion.noise import image_noise
from ucdir_plugin.options.schema import ScheduleOptions
from ucdir_plugin.registry import build_arch
from ucdir_plugin.restoration import sampling
from ucdir_plugin.training.task import Batch, DiffusionTask, signed, training_noise
from ucdir_plugin.utils.errors import UserError


class UCDIRTask(DiffusionTask):
    """Trains and samples :class:`~ucdir_plugin.archs.UCDIR` (paper, section 3).

    Option keys besides those of all: ``train: initial_opt, predictor``, ``path: pretrain_network_predictor``.
    """

    def schedule_options(self) -> type:
        return ScheduleOptions

    def network(self) -> nn.Module:
        net = build_arch(self.opt["network_g"], "network_g")
        of_predictor = self.train_opt.get("predictor") or {}
        self.predictor_lr, self.frozen = of_predictor.get("lr"), bool(of_predictor.get("frozen"))
        if self.frozen:
            net.predictor.requires_grad_(False)  # before DistributedDataParallel looks for what to exchange
        sampling.check_tiles(net, self.sampling)
        self.declared, self.has_predictor = net.conditions, net.predictor is not None
        if self.device.type == "cpu":
            net = net.to(memory_format=torch.channels_last)  # the layers would convert else, step by step
        return net

    def load_first(self, net: nn.Module, load: Any) -> None:
        super().load_first(net, load)
        path = self.opt.get("path") or {}
        file = path.get("pretrain_network_predictor")
        if file and not path.get("pretrain_network_g") and self.train_opt:
            load(net.predictor, file, True, path.get("param_key_predictor", "params"))

    def prepare_training(self) -> None:
        super().prepare_training()
        initial = self.train_opt.get("initial_opt")
        if initial and not self.has_predictor:
            raise UserError("option train:initial_opt: there is no predictor to train with it; remove it")
        self.cri_initial = build_loss(initial).to(self.device) if initial else None

    def train_mode(self, net: nn.Module, training: bool = True) -> None:
        super().train_mode(net, training)
        if self.frozen:
            net.predictor.eval()

    def trained_parameters(self, net: nn.Module) -> list:
        """The predictor in a group of its own where it has a learning rate of its own."""
        if self.predictor_lr is None:
            return super().trained_parameters(net)
        return [
            {"params": list(net.denoise_fn.parameters())},
            {"params": list(net.predictor.parameters()), "lr": self.predictor_lr},
        ]

    def batch(self, data: Mapping[str, Any]) -> Batch:
        """``lq``, perhaps ``gt``, (B, 3, H, W) in [0, 1]; ``condition``, name -> values, where the network has some.

        Raises:
            UserError: for a condition that is missing or out of its range.
        """
        batch: Batch = {
            name: signed(data[name].to(self.device, non_blocking=True)) for name in ("lq", "gt") if name in data
        }
        batch["condition"] = conditions.encode(self.declared, data.get("condition", {}), len(batch["lq"]))
        return batch

    def draw(self, batch: Batch, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        level, noise = training_noise(self.schedule, numbers, batch["lq"].shape[1:], self.seed)
        condition = batch["condition"]
        if condition is not None:
            condition = conditions.leave_out(self.declared, condition, self.seed, numbers).to(self.device)
        return {
            "lq": batch["lq"],
            "hr": batch["gt"],
            "noise_level": level.to(self.device),
            "noise": noise.to(self.device),
            "condition": condition,
        }

    def terms(
        self, net: nn.Module, part: dict[str, Optional[torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with self.autocast(self.amp_dtype):
            eps, initial = net(part["lq"], part["hr"], part["noise_level"], part["noise"], part["condition"])
        eps, initial = eps.float(), initial.float()
        terms = {"l_eps": self.noise_loss(eps, part["noise"], part["noise_level"])}
        if self.cri_initial is not None:
            terms["l_initial"] = self.cri_initial(initial, part["hr"])
        return terms, (eps.detach() - part["noise"]).abs().flatten(1).mean(1)

    @torch.no_grad()
    def restore(self, net: nn.Module, batch: Batch, keys: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Initial prediction and restored images, (B, 3, H, W) in [-1, 1] up to overshoot.

        The noise of an image is a function of the seed and the image's key alone.
        """
        condition = batch["condition"]
        return sampling.restore(
            net,
            batch["lq"],
            self.schedule,
            self.sampling,
            image_noise(self.seed, keys, self.device),
            lambda: self.autocast(self.sampling_dtype),
            condition=None if condition is None else condition.to(self.device),
        )
