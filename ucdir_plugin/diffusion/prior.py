"""Priors of images, all with one interface: networks that predict noise, Gaussian denoisers, a closed-form Gaussian.

A prior is called like a sampler's denoiser, ``prior(x_t, level) -> eps``, of images in [-1, 1]. One that has learned
the variance returns twice the channels: eps, then v (Improved DDPM, arXiv 2102.09672, eq. 15).
"""

from __future__ import annotations

import abc
import math
from types import MappingProxyType
from typing import Callable, Mapping, Optional

import numpy as np
import torch

from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.utils.errors import UserError

PREDICTIONS = ("epsilon", "sample", "v_prediction")

DDPM = NoiseSchedule.linear(1000, 1e-4, 0.02)
"""The schedule of DDPM and of OpenAI's networks."""


class Prior(abc.ABC):
    """What every prior has; subclasses say what it predicts.

    Attributes:
        channels: of its images.
        schedule: the noise levels that it knows; its last is where a reverse process may start.
        learned_variance: it predicts v too.
        stride: sizes of patches should be its multiples.
        size: side of the images that it was trained with, where that matters; larger ones are taken in patches of it.
        generates: it can start from pure noise.
        receptive_field: how far it looks, where that is known: patches that overlap by it equal the whole.
        file: its weights, for the record; set by who loads them.
        notes: what its user should be told, such as its licence; likewise.
    """

    receptive_field: Optional[int] = None
    file: Optional[str] = None
    notes: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        schedule: NoiseSchedule,
        channels: int = 3,
        learned_variance: bool = False,
        stride: int = 1,
        size: Optional[int] = None,
        generates: bool = True,
    ):
        self.schedule, self.channels, self.learned_variance = schedule, channels, learned_variance
        self.stride, self.size, self.generates = stride, size, generates

    @property
    def sigma_max(self) -> float:
        """The largest noise that it knows, of x_t / sqrt(alpha_bar) on the scale of [0, 1] images."""
        return float((1 / self.schedule.alpha_bar[-1] - 1) ** 0.5 / 2)

    @abc.abstractmethod
    def __call__(self, x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """Predicted noise, differentiable in x_t: who needs no gradient says so, as the solver of BIR-D does.

        Args:
            x_t: (B, C, H, W).
            level: (B,), sqrt(alpha_bar) in (0, 1).

        Returns:
            eps (B, C, H, W), or eps and v (B, 2 C, H, W); a new tensor.
        """


def _column(level: torch.Tensor) -> torch.Tensor:
    return level.view(-1, 1, 1, 1)


def noise_of(x_t: torch.Tensor, x0: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """eps with x_t = level x0 + sqrt(1 - level^2) eps: (B, C, H, W), level (B,) in (0, 1)."""
    level = _column(level).to(x_t.dtype)
    return (x_t - level * x0) / (1 - level.square()).clamp(min=1e-12).sqrt()


class NetworkPrior(Prior):
    """A network of discrete time steps: ADM, or any called as ``net(x_t, timesteps)``.

    Args:
        net: (B, C, H, W), (B,) -> (B, C or 2 C, H, W); in evaluation mode.
        schedule: of its training.
        prediction: what it predicts: ``epsilon``, ``sample`` (x_0) or ``v_prediction`` (arXiv 2202.00512).
        channels, learned_variance, stride, size: see :class:`Prior`.

    Raises:
        UserError: for an unknown prediction; when called, for channels that do not fit.
    """

    def __init__(
        self,
        net: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        schedule: NoiseSchedule = DDPM,
        prediction: str = "epsilon",
        channels: int = 3,
        learned_variance: bool = False,
        stride: int = 1,
        size: Optional[int] = None,
    ):
        if prediction not in PREDICTIONS:
            raise UserError(f"prior: prediction {prediction!r} is not known: take one of {', '.join(PREDICTIONS)}")
        super().__init__(schedule, channels, learned_variance, stride, size)
        self.net, self.prediction = net, prediction
        self._snr = np.log(schedule.alpha_bar / (1 - schedule.alpha_bar))[::-1]

    def timestep(self, level: torch.Tensor) -> torch.Tensor:
        """The time step of each noise level, (B,) -> (B,); between two, interpolated in log(SNR)."""
        square = level.double().cpu().numpy() ** 2
        steps = np.interp(np.log(square / (1 - square)), self._snr, np.arange(len(self.schedule))[::-1])
        whole = np.round(steps)
        steps = np.where(np.abs(steps - whole) < 0.02, whole, steps)  # levels come in float32
        return torch.from_numpy(steps).to(level.device, torch.float32)

    def __call__(self, x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        out = self.net(x_t, self.timestep(level)).to(x_t.dtype)
        expected = self.channels * (2 if self.learned_variance else 1)
        if out.shape != (len(x_t), expected, *x_t.shape[-2:]):
            raise UserError(
                f"prior: the network turns {tuple(x_t.shape[1:])} into {tuple(out.shape[1:])}, not into {expected}"
                f" channels of that size: {'with' if self.learned_variance else 'without'} learned variance is wrong"
            )
        if self.prediction == "epsilon":
            return out
        first, column = out[:, : self.channels], _column(level).to(x_t.dtype)
        if self.prediction == "sample":
            eps = noise_of(x_t, first, level)
        else:  # v = level eps - sqrt(1 - level^2) x_0
            eps = column * first + (1 - column.square()).sqrt() * x_t
        return torch.cat((eps, out[:, self.channels :]), 1)


class DenoiserPrior(Prior):
    """Any Gaussian denoiser that is told the noise level: x_0 = D(x_t / sqrt(alpha_bar), sigma) (Tweedie's formula).

    It covers its own range of noise, so that a reverse process starts there, warm, from a guess.

    Args:
        denoise: (B, C, H, W) in [0, 1] plus noise, sigma (B,) on that scale -> the image without noise.
        sigma_max: the largest noise it was trained for, on the scale of [0, 1].
        channels, stride: see :class:`Prior`.

    Raises:
        UserError: for a ``sigma_max`` out of range.
    """

    def __init__(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        sigma_max: float,
        channels: int = 3,
        stride: int = 1,
    ):
        if not 0 < sigma_max < 50:
            raise UserError(f"prior: sigma_max is for images in [0, 1], so between 0 and 50: got {sigma_max}")
        known = int(np.searchsorted((1 / DDPM.alpha_bar - 1) ** 0.5 / 2, sigma_max, "right"))
        super().__init__(DDPM.truncate(max(known, 1)), channels, stride=stride, generates=False)
        self.denoise, self._sigma_max = denoise, sigma_max

    @property
    def sigma_max(self) -> float:
        """Most noise that the denoiser was trained on, on the scale of [0, 1]."""
        return self._sigma_max

    def __call__(self, x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        level = level.to(x_t.dtype)
        sigma = (1 / level.square() - 1).clamp(min=0).sqrt() / 2
        x0 = self.denoise((x_t / _column(level) + 1) / 2, sigma).to(x_t.dtype) * 2 - 1
        if x0.shape != x_t.shape:
            raise UserError(f"prior: the denoiser turns {tuple(x_t.shape[1:])} into {tuple(x0.shape[1:])}")
        return noise_of(x_t, x0, level)


class ExpertsPrior(Prior):
    """Two priors, each for the noise that it knows best, as the experts of eDiff-I (arXiv 2211.01324).

    A small network trained for all levels is a worse denoiser than one made for little noise, which in turn cannot
    start from pure noise.

    Args:
        high: for the levels above those of ``low``.
        low: up to its ``sigma_max``. A variance that one of them has learned is not used.

    Raises:
        UserError: if their channels differ, or ``low`` leaves nothing to ``high``.
    """

    def __init__(self, high: Prior, low: Prior):
        if high.channels != low.channels:
            raise UserError(f"prior: experts of {high.channels} and {low.channels} channels do not go together")
        if low.sigma_max >= high.sigma_max:
            raise UserError("prior: the second of two experts is for less noise than the first: change their order")
        stride = math.lcm(high.stride, low.stride)
        super().__init__(high.schedule, high.channels, stride=stride, size=high.size, generates=high.generates)
        self.high, self.low = high, low

    def __call__(self, x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        sigma = (1 / level.double().square() - 1).sqrt() / 2
        little = sigma <= self.low.sigma_max * (1 + 1e-6)
        found = [
            p(x_t, level)[:, : self.channels] for p, used in ((self.high, ~little), (self.low, little)) if used.any()
        ]
        return found[0] if len(found) == 1 else torch.where(_column(little), found[1], found[0])


class GaussianPrior(Prior):
    """x_0 ~ N(mean, spectrum) of periodic images, in closed form: its denoiser is Wiener's filter.

    Args:
        spectrum: (H, W), the power of each frequency of ``fft2`` (divided by H W), on the scale of [-1, 1].
        mean: of all pixels.
        channels: independent of each other.
    """

    def __init__(self, spectrum: torch.Tensor, mean: float = 0.0, channels: int = 3):
        super().__init__(DDPM, channels)
        self.spectrum, self.mean = spectrum, mean

    @classmethod
    def natural(cls, height: int, width: int, std: float = 0.5, channels: int = 3) -> GaussianPrior:
        """Power 1/f^2, as of photographs, with the given standard deviation of pixels."""
        fy, fx = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
        power = 1 / (fy.square() + fx.square() + 1 / (height * width))
        return cls(power * std**2 / power.mean(), 0.0, channels)

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """x_0 of standard normal noise, both (B, C, H, W)."""
        spread = self.spectrum.to(noise.dtype).sqrt()
        return self.mean + torch.fft.ifft2(torch.fft.fft2(noise) * spread).real

    def __call__(self, x_t: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        column = _column(level).to(x_t.dtype)
        power = self.spectrum.to(x_t)
        gain = column * power / (column.square() * power + 1 - column.square())
        x0 = self.mean + torch.fft.ifft2(gain * torch.fft.fft2(x_t - column * self.mean)).real
        return noise_of(x_t, x0, level)
