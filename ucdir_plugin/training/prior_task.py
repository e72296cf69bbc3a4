"""Unconditional diffusion, whatever engine runs it: training the prior of BIR-D on a folder of images."""

from __future__ import annotations

import csv
import io
import math
import os
from typing import Any, Callable, Mapping, Optional

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset
from torchvision.utils import make_grid
from tqdm import tqdm

from ucdir_plugin.compat import build_loss, tensor2img
from ucdir_plugin.data.samples import sample_key
from ucdir_plugin.diffusion.noise import generator, image_noise
from ucdir_plugin.diffusion.samplers import SAMPLERS
from ucdir_plugin.diffusion.schedule import NoiseSchedule, diffuse
from ucdir_plugin.losses.diffusion_loss import variational_terms
from ucdir_plugin.options import schema
from ucdir_plugin.options.schema import PriorScheduleOptions
from ucdir_plugin.registry import build_arch
from ucdir_plugin.training.steps import BANDS
from ucdir_plugin.training.task import Batch, DiffusionTask, signed, training_noise, unsigned
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.files import write_atomically
from ucdir_plugin.utils.image_writing import write_image
from ucdir_plugin.zoo.priors import network_prior


class PriorTask(DiffusionTask):
    """Trains a network to predict the noise in images, with or without the variance (DDPM; Improved DDPM).

    The network is called as ``net(x_t, timesteps)`` and says what it is, as :class:`~ucdir_plugin.archs.ADMUNet` does.
    Option keys besides those of all: ``train: variance_opt`` (the loss on learned variances), ``val: samples``.
    """

    band_log = "l_eps_l2_band"

    def schedule_options(self) -> type:
        return PriorScheduleOptions

    def network(self) -> nn.Module:
        net = build_arch(self.opt["network_g"], "network_g")
        kind = type(net).__name__
        lacking = [name for name in ("in_channels", "learn_sigma", "stride", "image_size") if not hasattr(net, name)]
        if lacking:
            raise UserError(f"option network_g: {kind} does not say its {', '.join(lacking)}; a prior is an ADMUNet")
        if self.opt["network_g"].get("class_cond"):
            raise UserError("option network_g:class_cond: a prior is unconditional; remove it")
        if net.in_channels != 3 or net.out_channels != 3:
            raise UserError(f"option network_g: a prior of RGB images has 3 channels, {kind} has {net.in_channels}")
        self.learned = net.learn_sigma
        if self.device.type == "cpu":
            net = net.to(memory_format=torch.channels_last)  # a fifth faster
        return net

    def prepare_training(self) -> None:
        super().prepare_training()
        variance = self.train_opt.get("variance_opt")
        if bool(variance) != self.learned:
            if self.learned:
                raise UserError(
                    "option train:variance_opt is missing: network_g learns the variance;"
                    " add {type: VariationalBoundLoss}, or set learn_sigma to false"
                )
            raise UserError("option train:variance_opt: network_g has no variance (learn_sigma); remove it")
        self.cri_variance = build_loss(variance).to(self.device) if variance else None

    def batch(self, data: Mapping[str, Any]) -> Batch:
        """``gt`` (B, 3, H, W) in [0, 1]."""
        return {"gt": signed(data["gt"].to(self.device, non_blocking=True))}

    def draw(self, batch: Batch, numbers: list[int]) -> dict[str, Optional[torch.Tensor]]:
        x0 = batch["gt"]
        timestep, noise = training_noise(self.schedule, numbers, x0.shape[1:], self.seed, NoiseSchedule.sample_timestep)
        return self._noisy(x0, timestep, noise)

    def _noisy(self, x0: torch.Tensor, timestep: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        level = torch.from_numpy(self.schedule.levels)[timestep.long() + 1].float().to(self.device)
        noise = noise.to(self.device)
        x_t = diffuse(x0, level, noise)
        return {"x0": x0, "x_t": x_t, "timestep": timestep.to(self.device), "noise_level": level, "noise": noise}

    def _predict(
        self, net: nn.Module, part: dict[str, torch.Tensor], dtype: Optional[torch.dtype]
    ) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        with self.autocast(dtype):
            out = net(part["x_t"], part["timestep"]).float()
        return (out[:, :3], out[:, 3:]) if self.learned else (out, None)

    def terms(
        self, net: nn.Module, part: dict[str, Optional[torch.Tensor]]
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        eps, v = self._predict(net, part, self.amp_dtype)
        terms = {"l_eps": self.noise_loss(eps, part["noise"], part["noise_level"])}
        if self.learned:
            terms["l_variance"] = self.cri_variance(eps, v, part["noise"], part["x0"], part["timestep"], self.schedule)
        return terms, (eps.detach() - part["noise"]).square().flatten(1).mean(1)

    # Validation

    def validate(
        self, net: nn.Module, dataset: Dataset, current_iter: Any, save_img: bool, log: Callable[[str], None]
    ) -> dict[str, float]:
        """Loss by noise level over the images, and a grid of samples; all ranks share in the loss, rank 0 samples.

        Args:
            net: in evaluation mode.
            log: called with the results on rank 0.
        """
        name = dataset.opt["name"]
        losses = self.validation_losses(net, dataset)
        if self.opt["rank"]:
            return losses
        lines = "".join(f"\n\t # {key}: {value:.5f}" for key, value in losses.items())
        log(f"Validation {name}{lines}")
        if self.opt["is_train"]:
            path = os.path.join(self.opt["path"]["experiments_root"], f"losses_{name}.csv")
            _write_row(path, {"iteration": current_iter, **losses})
        count = self.opt["val"].get("samples", 16)
        if save_img and count:
            grid = make_grid(self.samples(net, count), math.ceil(count**0.5), padding=2, pad_value=1.0)
            folder = os.path.join(self.opt["path"]["visualization"], name)
            write_image(tensor2img([grid]), os.path.join(folder, f"samples_{current_iter}.png"))
        return losses

    @torch.no_grad()
    def validation_losses(self, net: torch.nn.Module, dataset: Dataset) -> dict[str, float]:
        """Means over images: squared error of eps by band of noise level, over all time steps, and the bound.

        In each band an image has one time step and one noise, functions of the seed and its key alone: losses of two
        iterations differ by what the network has learned.

        Returns:
            ``l_eps``, ``l_eps_l2_band0`` ... (a band without time steps is left out) and, with learned variance,
            ``bound``, bits per number of an image, without the term of x_T. From so few time steps it is a rough
            likelihood: good for comparing iterations, as the draws are the same, not for comparing with papers.
        """
        bands = np.minimum(self.schedule.levels[1:] * BANDS, BANDS - 1).astype(int)
        members = {band: np.flatnonzero(bands == band) for band in range(BANDS) if (bands == band).any()}
        share = torch.tensor([len(steps) / len(bands) for steps in members.values()], dtype=torch.float64)
        errors, bounds = (torch.zeros(len(members), dtype=torch.float64) for _ in range(2))
        rank, world, seed = self.opt["rank"], self.opt["world_size"], self.seed
        mine = range(rank, len(dataset), world)
        quiet = rank != 0 or not self.opt["val"].get("pbar", True)
        for index in tqdm(mine, unit="image", desc=dataset.opt["name"], leave=False, disable=quiet or None):
            sample = dataset[index]
            key = sample_key({k: [v] for k, v in sample.items()}, dataset.opt) if "key" in sample else str(index)
            x0 = signed(sample["gt"].unsqueeze(0).to(self.device))
            streams = [generator(seed, "validation", key, band) for band in members]
            picks = [int(torch.randint(len(m), (1,), generator=s)) for m, s in zip(members.values(), streams)]
            timestep = torch.tensor([float(m[i]) for m, i in zip(members.values(), picks)])
            noise = torch.stack([torch.randn(x0.shape[1:], generator=stream) for stream in streams])
            part = self._noisy(x0.expand(len(streams), -1, -1, -1), timestep, noise)
            eps, v = self._predict(net, part, self.sampling_dtype)
            errors += (eps - part["noise"]).square().flatten(1).mean(1).double().cpu()
            if self.learned:
                bound = variational_terms(eps, v, part["noise"], part["x0"], part["timestep"], self.schedule)
                bounds += bound.double().cpu()
        sums = torch.stack((errors, bounds))
        if self.opt["dist"]:
            sums = sums.to(self.device)
            dist.all_reduce(sums)
        errors, bounds = sums.cpu() / len(dataset)
        losses = {"l_eps": float((share * errors).sum())}
        losses.update({f"{self.band_log}{band}": float(error) for band, error in zip(members, errors)})
        if self.learned:
            losses["bound"] = float(len(bands) * (share * bounds).sum())
        return losses

    @torch.no_grad()
    def samples(self, net: torch.nn.Module, count: int) -> torch.Tensor:
        """Images from pure noise, a function of the seed and their number alone: (count, 3, S, S) in [0, 1]."""
        prior = network_prior(net, self.schedule)
        options, size = self.sampling, prior.size
        draw = image_noise(self.seed, [f"samples/{i}" for i in range(count)], self.device)

        def denoise(x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            with self.autocast(self.sampling_dtype):
                return prior(x_t, level)[:, :3].float()

        further = {} if options.eta is None else {"eta": options.eta}
        result = SAMPLERS[options.sampler].sample(
            denoise,
            schema.sampling_schedule(self.schedule, options),
            lambda step: draw((count, 3, size, size), step),
            options.clip_x0,
            dynamic_threshold=options.dynamic_threshold,
            **further,
        )
        return unsigned(result).clamp(0, 1)


def _write_row(path: str, row: dict[str, Any]) -> None:
    """Put a row at the end of a table, in place of rows from this iteration on, which a resumed run makes again."""
    rows = []
    if os.path.isfile(path):
        with open(path, encoding="utf-8", newline="") as file:
            rows = [old for old in csv.DictReader(file) if int(old["iteration"]) < row["iteration"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(row), restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, row])
    write_atomically(text.getvalue().encode(), path)
