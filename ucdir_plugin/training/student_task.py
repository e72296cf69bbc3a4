"""Distillation: a UCDIR network that restores in one network call what its teacher samples in many.

With the same noise a deterministic sampler always gives the same sample. So the map from noise to sample is a function,
which a network can learn by regression without becoming smooth (knowledge distillation of diffusion, Luhman and Luhman,
arXiv 2101.02388). It is beyond the UCDIR paper; docs/study.md has what it gives.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn

from ucdir_plugin.archs import UCDIR
from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.options.schema import SamplingOptions, sampling_schedule
from ucdir_plugin.restoration import sampling
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.restoration.network import NetworkRestorer
from ucdir_plugin.training.task import Batch
from ucdir_plugin.training.ucdir_task import UCDIRTask
from ucdir_plugin.utils.errors import UserError


class StudentTask(UCDIRTask):
    """Trains a UCDIR network to give in one step what a teacher of the same kind samples.

    The one step is that of ``val: sampling``: from its level, with sqrt(1 - level^2) eps for the noisy residual. The
    teacher samples from the same eps. The initial predictor is the teacher's and stays as it is.

    Option keys besides UCDIR's: ``train: teacher`` (``model``, ``sampling``), ``train: distillation_opt``.
    """

    band_log = "l_distillation_l1_band"
    loss_key = "distillation_opt"

    def network(self) -> nn.Module:
        if self.train_opt and self.opt["network_g"].get("predictor") is not None:
            self.train_opt = {**self.train_opt, "predictor": {"frozen": True}}
        net = super().network()
        self.level = float(sampling_schedule(self.schedule, self.sampling).levels[-1])
        return net

    def load_first(self, net: nn.Module, load: Any) -> None:
        """The teacher's weights, unless the options name others or this is no training.

        Raises:
            UserError: if the teacher is missing, or its network is another one.
        """
        super().load_first(net, load)
        if not self.opt.get("is_train", bool(self.train_opt)):
            return
        told = self.train_opt["teacher"]
        teacher = load_model(told["model"], device=str(self.device), sampling=told.get("sampling"))
        if not (isinstance(teacher, NetworkRestorer) and isinstance(teacher.net, UCDIR)):
            raise UserError(
                f"option train:teacher:model: {told['model']} does not sample; a teacher is a UCDIR network"
            )
        ranges = [[(c.name, c.limits, c.classes) for c in network.conditions] for network in (net, teacher.net)]
        if ranges[0] != ranges[1] or net.residual_scale != teacher.net.residual_scale:
            raise UserError(
                f"option network_g: the teacher {told['model']} has other conditions or another residual_scale:"
                " take over those of its network"
            )
        options = teacher.options
        if SAMPLERS[options.sampler].noisy if options.eta is None else options.eta > 0:
            raise UserError(
                f"option train:teacher:sampling: {options.sampler} draws new noise in its steps, so that its sample is"
                " no function of the first noise: take ddim, dpmpp_2m or heun"
            )
        mine, its = (net, teacher.net)
        if (self.opt.get("path") or {}).get("pretrain_network_g"):
            mine, its = net.predictor, teacher.net.predictor
        try:
            if (mine is None) != (its is None):
                raise RuntimeError("one of the networks has no predictor")
            if mine is not None:
                mine.load_state_dict(its.state_dict())
        except RuntimeError as err:
            part = "network" if mine is net else "predictor"
            raise UserError(
                f"option network_g: it is not the {part} of the teacher {told['model']}: take that over"
            ) from err
        self.teacher = teacher.net
        self.teacher_schedule = teacher.schedule
        # A crop is sampled whole, and needs no border: its edges are compared with the student's own.
        self.teacher_sampling = SamplingOptions(**{**teacher.options.model_dump(), "border": 0, "tile": None})

    def draw(self, batch: Batch, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        drawn = super().draw(batch, numbers)
        drawn["noise_level"] = torch.full_like(drawn["noise_level"], self.level)
        return drawn

    @torch.no_grad()
    def teach(self, part: dict[str, Optional[torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The teacher's initial prediction and its sample's residual, (B, 3, H, W) in [-1, 1]."""
        initial, restored = sampling.restore(
            self.teacher,
            part["lq"],
            self.teacher_schedule,
            self.teacher_sampling,
            lambda shape, draw, *key: part["noise"].clone(),
            lambda: self.autocast(self.amp_dtype),
            condition=part["condition"],
        )
        return initial, restored - initial

    def terms(
        self, net: nn.Module, part: dict[str, Optional[torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        initial, taught = self.teach(part)
        with self.autocast(self.amp_dtype):
            # The initial prediction in the place of the truth: what is noised is a residual of 0.
            eps, _ = net(part["lq"], initial, part["noise_level"], part["noise"], part["condition"])
        level = part["noise_level"].view(-1, 1, 1, 1)
        spread = (1 - level**2).sqrt()
        scale = self.teacher.residual_scale
        residual = spread * (part["noise"] - eps.float()) / (level * scale)
        terms = {"l_distillation": self.cri_diffusion(residual, taught)}
        return terms, (residual.detach() - taught).abs().flatten(1).mean(1)
