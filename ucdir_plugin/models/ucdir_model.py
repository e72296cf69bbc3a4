"""UCDIR under BasicSR: joint training of predictor and denoiser, EMA, sampling."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Optional

import torch
import torch.distributed as dist
from basicsr.losses import build_loss
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ucdir_plugin import conditions, sampling
from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.errors import UserError
from ucdir_plugin.registry import build_arch, register
from ucdir_plugin.validation import validate

BANDS = 4
"""The mean absolute error of the noise is logged by noise level sqrt(alpha_bar): [0, 1/4), ... [3/4, 1]."""


def training_noise(
    schedule: NoiseSchedule, numbers: list[int], shape: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise level (B,) and noise (B, *shape) of training samples, each a function of the seed and its sample number."""
    levels, noises = [], []
    for number in numbers:
        stream = generator(seed, "train", number)
        levels.append(schedule.sample_level(stream))
        noises.append(torch.randn(shape, generator=stream))
    return torch.tensor(levels, dtype=torch.float32), torch.stack(noises)


@register("model")
class UCDIRModel(SRModel):
    """Trains and samples :class:`~ucdir_plugin.archs.UCDIR` (paper, section 3).

    Images enter and leave in [0, 1] RGB; between they are in [-1, 1]. Option keys besides BasicSR's: ``diffusion`` (the
    training schedule), ``train: diffusion_opt, initial_opt, ema_start, grad_clip, accumulate, amp, max_bad_steps`` and
    ``val: sampling``; see options/sid_ucdir.yml.
    """

    def __init__(self, opt: dict):
        BaseModel.__init__(self, opt)
        from ucdir_plugin.options import SamplingOptions, ScheduleOptions  # not needed to import the package

        # Complete under tools/train.py; BasicSR's own loop hands over what the file says.
        diffusion = ScheduleOptions(**opt.get("diffusion") or {})
        self.schedule = NoiseSchedule.linear(diffusion.timesteps, diffusion.start, diffusion.end)
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
        pretrained = opt["path"].get("pretrain_network_g")
        if pretrained:
            self.load_network(
                self.net_g, pretrained, opt["path"].get("strict_load_g", True), opt["path"].get("param_key_g", "params")
            )
        elif self.is_train and opt["path"].get("pretrain_network_predictor"):
            key = opt["path"].get("param_key_predictor", "params")
            self.load_network(net.predictor, opt["path"]["pretrain_network_predictor"], True, key)
        if self.is_train:
            self.init_training_settings()

    def init_training_settings(self) -> None:
        train = self.opt["train"]
        self._train_mode(self.net_g)
        self.ema_decay, self.ema_start = train.get("ema_decay", 0), train.get("ema_start", 0)
        if self.ema_decay > 0:
            self.net_g_ema = self._compiled(deepcopy(self.get_bare_model(self.net_g))).eval().requires_grad_(False)
            pretrained = self.opt["path"].get("pretrain_network_g")
            if pretrained:
                self.load_network(self.net_g_ema, pretrained, self.opt["path"].get("strict_load_g", True), "params_ema")
        self.cri_diffusion = build_loss(train["diffusion_opt"]).to(self.device)
        # A loss of BasicSR may be used too; most do not know of noise levels.
        self.with_level = "noise_level" in inspect.signature(self.cri_diffusion.forward).parameters
        if train.get("initial_opt") and not self.has_predictor:
            raise UserError("option train:initial_opt: there is no predictor to train with it; remove it")
        self.cri_initial = build_loss(train["initial_opt"]).to(self.device) if train.get("initial_opt") else None
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

    def _compiled(self, net: torch.nn.Module) -> torch.nn.Module:
        if self.opt.get("compile"):
            net.compile_networks()
        return net

    def _autocast(self, dtype: Optional[torch.dtype]) -> torch.autocast:
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    # Training

    def _train_mode(self, net: torch.nn.Module, training: bool = True) -> None:
        net.train(training)
        if self.frozen:
            self.get_bare_model(net).predictor.eval()

    def setup_optimizers(self) -> None:
        """BasicSR's; the predictor in a group of its own where it has a learning rate of its own."""
        if self.predictor_lr is None:
            trained = [p for p in self.net_g.parameters() if p.requires_grad]
        else:
            net = self.get_bare_model(self.net_g)
            trained = [
                {"params": list(net.denoise_fn.parameters())},
                {"params": list(net.predictor.parameters()), "lr": self.predictor_lr},
            ]
        optim = dict(self.opt["train"]["optim_g"])
        self.optimizer_g = self.get_optimizer(optim.pop("type"), trained, **optim)
        self.optimizers.append(self.optimizer_g)

    def get_optimizer(self, optim_type: str, params: list, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        """BasicSR's; Adam and AdamW in their fused form unless the options say otherwise."""
        if optim_type in ("Adam", "AdamW") and not kwargs.get("foreach"):
            kwargs.setdefault("fused", True)
        return super().get_optimizer(optim_type, params, lr, **kwargs)

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

    def optimize_parameters(self, current_iter: int) -> None:
        """One step; a step whose loss or gradient is not finite changes nothing and is counted.

        Raises:
            UserError: after ``max_bad_steps`` such steps in a row.
        """
        train = self.opt["train"]
        batch = len(self.lq)
        numbers = self.sample_numbers
        if numbers is None:  # under BasicSR's own loop
            first = ((current_iter - 1) * self.opt["world_size"] + self.opt["rank"]) * batch
            numbers = list(range(first, first + batch))
        levels, noises = training_noise(self.schedule, numbers, self.lq.shape[1:], self.opt["manual_seed"])
        levels, noises = levels.to(self.device), noises.to(self.device)
        condition = None
        if self.condition is not None:
            condition = conditions.leave_out(self.declared, self.condition, self.opt["manual_seed"], numbers)
            condition = condition.to(self.device)
        lq, hr = self.lq * 2 - 1, self.gt * 2 - 1
        parts = min(train.get("accumulate", 1), batch)

        self.optimizer_g.zero_grad(set_to_none=True)
        losses: dict[str, torch.Tensor] = {}
        errors = []
        for i, chunk in enumerate(torch.arange(batch).tensor_split(parts)):
            part = slice(int(chunk[0]), int(chunk[-1]) + 1)
            share = len(chunk) / batch
            # DDP needs to exchange gradients only with the last part's.
            waits = i < parts - 1 and isinstance(self.net_g, DistributedDataParallel)
            with self.net_g.no_sync() if waits else nullcontext():
                with self._autocast(self.amp_dtype):
                    told = None if condition is None else condition[part]
                    eps, initial = self.net_g(lq[part], hr[part], levels[part], noises[part], told)
                eps, initial = eps.float(), initial.float()
                extra = {"noise_level": levels[part]} if self.with_level else {}
                terms = {"l_eps": self.cri_diffusion(eps, noises[part], **extra)}
                if self.cri_initial is not None:
                    terms["l_initial"] = self.cri_initial(initial, hr[part])
                self.scaler.scale(sum(terms.values()) * share).backward()
            errors.append((eps.detach() - noises[part]).abs().flatten(1).mean(1))
            for name, term in terms.items():
                losses[name] = losses.get(name, 0) + term.detach() * share

        self.scaler.unscale_(self.optimizer_g)
        norm = torch.nn.utils.clip_grad_norm_(self.net_g.parameters(), train.get("grad_clip") or float("inf"))
        # Gradients are the same on all ranks, and not finite where any rank's loss is not: all take the same way here.
        if torch.isfinite(norm):
            self.scaler.step(self.optimizer_g)
            self.bad_steps_in_a_row = 0
            self._update_log(losses, levels, torch.cat(errors))
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
            add(f"l_eps_l1_band{i}", (errors * mask).sum(), mask.sum())

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
