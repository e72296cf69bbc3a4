"""What training a diffusion network takes, whatever engine runs it: draws, losses, steps, averages, logs.

Under BasicSR models/ calls it, under MMEngine mm/.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Callable, Dict, Mapping, Optional

import torch
from torch import nn

from ucdir_plugin.compat import build_loss, build_optimizer
from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.options.schema import SamplingOptions
from ucdir_plugin.training.steps import Stepper
from ucdir_plugin.utils import devices

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


class DiffusionTask(ABC):
    """What a sample is, what it trains with, and how the network is used; it holds no weights.

    Args:
        opt: an option file's, checked or as it is: ``network_g``, ``diffusion``, ``train``, ``val: sampling``,
            ``path``, ``manual_seed``, ``compile``.
        device: that the network is on.
    """

    band_log = "l_eps_l1_band"
    loss_key = "diffusion_opt"
    """The option of ``train`` that says the loss."""

    def __init__(self, opt: Dict[str, Any], device: torch.device):
        # Complete under tools/train.py; others hand over what they have.
        self.opt, self.device, self.train_opt = opt, device, opt.get("train") or {}
        self.schedule = self.schedule_options()(**opt.get("diffusion") or {}).schedule()
        self.sampling = SamplingOptions(**(opt.get("val") or {}).get("sampling") or {})
        self.sampling_dtype = devices.amp_dtype(device, self.sampling.amp, "option val:sampling:amp")

    @property
    def seed(self) -> int:
        """The seed that noise and levels are functions of."""
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
            load: :func:`ucdir_plugin.utils.checkpoints.load_into`, or an engine's own.
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
        self.cri_diffusion = build_loss(self.train_opt[self.loss_key]).to(self.device)
        # A loss of BasicSR may be used too; most do not know of noise levels.
        self.with_level = "noise_level" in inspect.signature(self.cri_diffusion.forward).parameters
        self.amp_dtype = devices.amp_dtype(self.device, self.train_opt.get("amp"), "option train:amp")

    def compiled(self, net: nn.Module) -> nn.Module:
        """``net``, prepared for torch.compile if the options say so."""
        if self.opt.get("compile"):
            getattr(net, "compile_networks", net.compile)()
        return net

    def autocast(self, dtype: Optional[torch.dtype]) -> torch.autocast:
        """Autocast to a type; None computes in float32."""
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
