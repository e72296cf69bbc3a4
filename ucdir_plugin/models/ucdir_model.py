"""UCDIR under BasicSR: joint training of predictor and denoiser, EMA, sampling."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Optional

import torch
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel

from ucdir_plugin import conditions, sampling
from ucdir_plugin.errors import UserError
from ucdir_plugin.models.diffusion_model import DiffusionModel, training_noise
from ucdir_plugin.registry import build_arch, register
from ucdir_plugin.validation import validate


@register("model")
class UCDIRModel(DiffusionModel):
    """Trains and samples :class:`~ucdir_plugin.archs.UCDIR` (paper, section 3).

    Images enter and leave in [0, 1] RGB; between they are in [-1, 1]. Option keys besides BasicSR's: ``diffusion`` (the
    training schedule), ``train: diffusion_opt, initial_opt, ema_start, grad_clip, accumulate, amp, max_bad_steps`` and
    ``val: sampling``; see options/sid_ucdir.yml.
    """

    def __init__(self, opt: dict):
        BaseModel.__init__(self, opt)
        from ucdir_plugin.options import SamplingOptions, ScheduleOptions  # not needed to import the package

        # Complete under tools/train.py; BasicSR's own loop hands over what the file says.
        self.schedule = ScheduleOptions(**opt.get("diffusion") or {}).schedule()
        self.sampling = SamplingOptions(**(opt.get("val") or {}).get("sampling") or {})
        self.sampling_dtype = sampling.amp_dtype(self.device, self.sampling.amp, "option val:sampling:amp")
        net = build_arch(opt["network_g"], "network_g")
        of_predictor = (opt.get("train") or {}).get("predictor") or {}
        self.predictor_lr, self.frozen = of_predictor.get("lr"), bool(of_predictor.get("frozen"))
        if self.frozen:
            net.predictor.requires_grad_(False)  # before DistributedDataParallel looks for what to exchange
        self.net_g = self.model_to_device(self._compiled(net))
        sampling.check_tiles(self.get_bare_model(self.net_g), self.sampling)
        bare = self.get_bare_model(self.net_g)
        self.declared, self.has_predictor = bare.conditions, bare.predictor is not None
        self.print_network(self.net_g)
        if not self._load_pretrained() and self.is_train and opt["path"].get("pretrain_network_predictor"):
            key = opt["path"].get("param_key_predictor", "params")
            self.load_network(net.predictor, opt["path"]["pretrain_network_predictor"], True, key)
        if self.is_train:
            self.init_training_settings()

    def init_losses(self) -> None:
        super().init_losses()
        initial = self.opt["train"].get("initial_opt")
        if initial and not self.has_predictor:
            raise UserError("option train:initial_opt: there is no predictor to train with it; remove it")
        self.cri_initial = build_loss(initial).to(self.device) if initial else None

    # Training

    def _train_mode(self, net: torch.nn.Module, training: bool = True) -> None:
        super()._train_mode(net, training)
        if self.frozen:
            self.get_bare_model(net).predictor.eval()

    def trained_parameters(self) -> list:
        """The predictor in a group of its own where it has a learning rate of its own."""
        if self.predictor_lr is None:
            return super().trained_parameters()
        net = self.get_bare_model(self.net_g)
        return [
            {"params": list(net.denoise_fn.parameters())},
            {"params": list(net.predictor.parameters()), "lr": self.predictor_lr},
        ]

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch: ``lq`` and perhaps ``gt`` (B, 3, H, W) in [0, 1]; ``sample_number`` or, in test, ``key``.

        And ``condition``, name -> values of the batch, where the network declares conditions.

        Raises:
            UserError: for a condition that is missing or out of its range.
        """
        self.lq = data["lq"].to(self.device, non_blocking=True)
        self.__dict__.pop("gt", None)
        if "gt" in data:
            self.gt = data["gt"].to(self.device, non_blocking=True)
        self.condition = conditions.encode(self.declared, data.get("condition", {}), len(self.lq))
        self.sample_numbers = data["sample_number"].tolist() if "sample_number" in data else None
        self.keys = list(data["key"]) if "key" in data else [str(p) for p in data.get("lq_path", [""] * len(self.lq))]

    def draw(self, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        seed = self.opt["manual_seed"]
        level, noise = training_noise(self.schedule, numbers, self.lq.shape[1:], seed)
        condition = None
        if self.condition is not None:
            condition = conditions.leave_out(self.declared, self.condition, seed, numbers).to(self.device)
        return {
            "lq": self.lq * 2 - 1,
            "hr": self.gt * 2 - 1,
            "noise_level": level.to(self.device),
            "noise": noise.to(self.device),
            "condition": condition,
        }

    def terms(self, part: dict[str, Optional[torch.Tensor]]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with self._autocast(self.amp_dtype):
            eps, initial = self.net_g(part["lq"], part["hr"], part["noise_level"], part["noise"], part["condition"])
        eps, initial = eps.float(), initial.float()
        terms = {"l_eps": self.noise_loss(eps, part["noise"], part["noise_level"])}
        if self.cri_initial is not None:
            terms["l_initial"] = self.cri_initial(initial, part["hr"])
        return terms, (eps.detach() - part["noise"]).abs().flatten(1).mean(1)

    # Sampling

    @torch.no_grad()
    def test(self) -> None:
        """Restore ``self.lq``: sets ``self.initial`` and ``self.output``, (B, 3, H, W) in [0, 1] up to overshoot.

        The noise of an image is a function of the seed and the image's key alone.
        """
        net = self.net_g_ema if hasattr(self, "net_g_ema") else self.get_bare_model(self.net_g)
        training, net = net.training, net.eval()

        noise = sampling.image_noise(self.opt["manual_seed"], self.keys, self.device)
        initial, output = sampling.restore(
            net,
            self.lq * 2 - 1,
            self.schedule,
            self.sampling,
            noise,
            lambda: self._autocast(self.sampling_dtype),
            condition=None if self.condition is None else self.condition.to(self.device),
        )
        self.initial, self.output = (initial + 1) / 2, (output + 1) / 2
        self._train_mode(net, training)

    def get_current_visuals(self) -> OrderedDict:
        visuals = super().get_current_visuals()
        if self.has_predictor:
            visuals["initial"] = self.initial.detach().cpu()
        return visuals

    def validation(self, dataloader, current_iter, tb_logger, save_img: bool = False) -> None:
        """BasicSR's entry point; the work is in :func:`ucdir_plugin.validation.validate`."""
        validate(self, dataloader.dataset, current_iter, tb_logger, save_img)
