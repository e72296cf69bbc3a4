"""Samplers: one function each, the same signature, any denoiser given as a callable.

All predict x_0 from the denoiser's eps, clamp it, and use the eps that goes with the clamped x_0. All end at x_0.
Notation: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps; sigma = sqrt(1 / alpha_bar - 1) is the noise of
x_t / sqrt(alpha_bar); lambda = -log(sigma).

An image may be larger than all else in memory. So a sampler works in the tensor that the denoiser returned, and holds
two tensors of the image's size (ddpm, ddim) or three (the others), the noise of a step included.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, NamedTuple, Optional, Union

import numpy as np
import torch

from ucdir_plugin.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_t of shape (B, C, H, W), noise level sqrt(alpha_bar) of shape (B,)) -> predicted noise eps, shape of x_t.

The result must be a new tensor: the sampler overwrites it. x_t must stay as it is."""

StepNoise = Callable[[int], torch.Tensor]
"""draw number -> standard normal noise with the shape of x_t. Draw 0 is x_T, draw k the noise of the k-th step."""

Callback = Callable[[int, torch.Tensor, torch.Tensor], None]
"""(step from 0, x_t, x_0 predicted from it), once a step. Valid during the call only: clone what is to be kept."""

Start = Union[torch.Tensor, float, None]
"""A guess at x_0 to start from, noised to the schedule's last level; None to start from pure noise."""


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: Union[bool, float] = True,
    callback: Optional[Callback] = None,
    *,
    dynamic_threshold: Optional[float] = None,
    start: Start = None,
) -> torch.Tensor:
    """Ancestral sampling with the posterior variance (DDPM, arXiv 2006.11239, algorithm 2).

    The arguments are those of every sampler.

    Args:
        denoise: predicts the noise in x_t.
        schedule: one step for each of its levels, from the last to the first.
        noise: all the randomness; draws 0 .. len(schedule) - 1.
        clip_x0: clamp each prediction of x_0 to [-1, 1]; a number c: to [-c, c].
        callback: called as ``callback(step, x_t, x0)`` after the prediction of each step.
        dynamic_threshold: a quantile in (0, 1], such as 0.995. With s this quantile of |x_0| / c in each image, at
            least 1, clamp to [-s c, s c] and divide by s instead (Imagen, arXiv 2205.11487, section 2.3).
        start: warm start from x_0 = start, e.g. 0.0 for a zero residual: x_t = sqrt(alpha_bar) start +
            sqrt(1 - alpha_bar) noise(0) at the schedule's last level; see :meth:`NoiseSchedule.truncate`.

    Returns:
        x_0, (B, C, H, W), in the range of the training data ([-1, 1] for images; residuals too, as clamped).

    Raises:
        ValueError: for a ``dynamic_threshold`` outside (0, 1] or without ``clip_x0``.
    """
    predict = _predictor(denoise, schedule, clip_x0, dynamic_threshold)
    x = _first(schedule, noise, start)
    for step, t in enumerate(reversed(range(len(schedule)))):
        x0 = predict(x, t)
        if callback is not None:
            callback(step, x, x0)
        x = _combine(x0, schedule.posterior_mean_coef1[t], x, schedule.posterior_mean_coef2[t])
        if t > 0:
            x = _combine(x, 1, noise(step + 1), schedule.posterior_variance[t] ** 0.5)
    return x


@torch.no_grad()
def ddim(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: Union[bool, float] = True,
    callback: Optional[Callback] = None,
    *,
    eta: float = 0.0,
    dynamic_threshold: Optional[float] = None,
    start: Start = None,
) -> torch.Tensor:
    """Deterministic at eta 0, DDPM's ancestral sampling at eta 1 (DDIM, arXiv 2010.02502, eqs. 12 and 16).

    Arguments and result as for :func:`ddpm`; noise beyond draw 0 only with ``eta`` > 0.

    Raises:
        ValueError: also for an ``eta`` outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    predict = _predictor(denoise, schedule, clip_x0, dynamic_threshold)
    x = _first(schedule, noise, start)
    for step, t in enumerate(reversed(range(len(schedule)))):
        x0 = predict(x, t)
        if callback is not None:
            callback(step, x, x0)
        alpha_bar, alpha_bar_prev = schedule.alpha_bar[t], schedule.alpha_bar_prev[t]
        variance = eta**2 * schedule.posterior_variance[t]
        # x_{t-1} = sqrt(alpha_bar_prev) x0 + sqrt(1 - alpha_bar_prev - variance) eps, with eps from x and x0
        from_x = ((1 - alpha_bar_prev - variance) / (1 - alpha_bar)) ** 0.5
        x = _combine(x0, alpha_bar_prev**0.5 - from_x * alpha_bar**0.5, x, from_x)
        if variance > 0:
            x = _combine(x, 1, noise(step + 1), variance**0.5)
    return x


@torch.no_grad()
def dpmpp_2m_sde(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: Union[bool, float] = True,
    callback: Optional[Callback] = None,
    *,
    eta: float = 1.0,
    dynamic_threshold: Optional[float] = None,
    start: Start = None,
) -> torch.Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, section 6): second order from the last two predictions of x_0.

    Between the SDE (eta 1) and the ODE (eta 0) the noise is scaled as in k-diffusion. The first step and the last,
    to sigma 0, are of first order. Respace with ``trailing``: ``uniform`` has a long step in lambda to its cleanest
    level, where the extrapolation overshoots. Arguments and result as for :func:`ddpm`.

    Raises:
        ValueError: also for an ``eta`` outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, got {eta}")
    predict = _predictor(denoise, schedule, clip_x0, dynamic_threshold)
    x = _first(schedule, noise, start)
    lam = np.log(schedule.alpha_bar / (1 - schedule.alpha_bar)) / 2
    x0_last, h_last = None, 1.0
    for step, t in enumerate(reversed(range(len(schedule)))):
        x0 = predict(x, t)
        if callback is not None:
            callback(step, x, x0)
        if t == 0:
            return x0
        h = lam[t - 1] - lam[t]
        extra = 0.0 if x0_last is None else h / (2 * h_last)
        if x0_last is None:
            x0_last = x0.clone()
        alpha_next, sigma_next = schedule.alpha_bar[t - 1] ** 0.5, (1 - schedule.alpha_bar[t - 1]) ** 0.5
        from_x = sigma_next / (1 - schedule.alpha_bar[t]) ** 0.5 * np.exp(-eta * h)
        from_x0 = -alpha_next * np.expm1(-(1 + eta) * h)
        # x <- from_x x + from_x0 ((1 + extra) x0 - extra x0_last)
        x = _combine(_combine(x0_last, -from_x0 * extra, x0, from_x0 * (1 + extra)), 1, x, from_x)
        if eta > 0:
            x = _combine(x, 1, noise(step + 1), sigma_next * (-np.expm1(-2 * eta * h)) ** 0.5)
        x0_last, h_last = x0, h


@torch.no_grad()
def dpmpp_2m(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: Union[bool, float] = True,
    callback: Optional[Callback] = None,
    *,
    dynamic_threshold: Optional[float] = None,
    start: Start = None,
) -> torch.Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): deterministic, second order, one network call a step.

    :func:`dpmpp_2m_sde` at eta 0; the same word on spacing. Arguments and result as for :func:`ddpm`; of the noise
    only draw 0 is used.
    """
    return dpmpp_2m_sde(
        denoise, schedule, noise, clip_x0, callback, eta=0.0, dynamic_threshold=dynamic_threshold, start=start
    )


@torch.no_grad()
def heun(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: Union[bool, float] = True,
    callback: Optional[Callback] = None,
    *,
    dynamic_threshold: Optional[float] = None,
    start: Start = None,
) -> torch.Tensor:
    """Heun's method in sigma (EDM, arXiv 2206.00364, algorithm 1): deterministic, two network calls a step.

    The last step, to sigma 0, is Euler's. Arguments and result as for :func:`ddpm`; of the noise only draw 0 is used.
    """
    predict = _predictor(denoise, schedule, clip_x0, dynamic_threshold)
    x = _first(schedule, noise, start)
    sigma = (1 / schedule.alpha_bar - 1) ** 0.5
    for step, t in enumerate(reversed(range(len(schedule)))):
        x0 = predict(x, t)
        if callback is not None:
            callback(step, x, x0)
        if t == 0:
            return x0
        # With z = x / sqrt(alpha_bar) and slope (z - x0) / sigma: an Euler step to z', a slope there, and the mean of
        # both. As z' - z is the Euler step, z'' = (z + z') / 2 + (sigma' - sigma) / (2 sigma') (z' - x0').
        ratio = sigma[t - 1] / sigma[t]
        alpha, alpha_next = schedule.alpha_bar[t] ** 0.5, schedule.alpha_bar[t - 1] ** 0.5
        euler = _combine(x0, (1 - ratio) * alpha_next, x, ratio * alpha_next / alpha)
        x0 = predict(euler, t - 1)
        x = _combine(
            _combine(x0, (1 / ratio - 1) / 2 * alpha_next, euler, 1 - 1 / (2 * ratio)), 1, x, alpha_next / alpha / 2
        )


class Sampler(NamedTuple):
    """A sampler, its cost and what it takes.

    Attributes:
        sample: the function.
        calls: network calls of each step but the last, which always takes one.
        takes_eta: whether it has a part of new noise in each step, ``eta``.
        noisy: whether it draws new noise in its steps where no ``eta`` says otherwise.
    """

    sample: Callable[..., torch.Tensor]
    calls: int = 1
    takes_eta: bool = False
    noisy: bool = False

    def nfe(self, steps: int) -> int:
        """Network calls (number of function evaluations) of ``steps`` steps."""
        return self.calls * (steps - 1) + 1


SAMPLERS: Dict[str, Sampler] = {
    "ddpm": Sampler(ddpm, noisy=True),
    "ddim": Sampler(ddim, takes_eta=True),
    "dpmpp_2m": Sampler(dpmpp_2m),
    "dpmpp_2m_sde": Sampler(dpmpp_2m_sde, takes_eta=True, noisy=True),
    "heun": Sampler(heun, calls=2),
}
"""The samplers by the name that options know them by; another one is another entry."""


STRIP_ELEMENTS = 2**20


def _strip_rows(x: torch.Tensor) -> int:
    return max(1, STRIP_ELEMENTS * x.shape[-2] // x.numel())


def _combine(y: torch.Tensor, a: float, x: torch.Tensor, b: float) -> torch.Tensor:
    """a y + b x, written into y strip by strip, so that no further tensor of the image's size is made."""
    rows = _strip_rows(y)
    for y_strip, x_strip in zip(y.split(rows, -2), x.split(rows, -2)):
        y_strip.mul_(float(a)).add_(x_strip * float(b))
    return y


def clamp_finite(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``x.clamp(low, high)`` with NaN where x is infinite: what has overflowed must not look like black or white."""
    return torch.where(x.isinf(), math.nan, x.clamp(low, high))


def _first(schedule: NoiseSchedule, noise: StepNoise, start: Start) -> torch.Tensor:
    """x_T, or the noised ``start``."""
    x = noise(0)
    if start is None:
        return x
    alpha_bar = schedule.alpha_bar[-1]
    start = torch.as_tensor(start, dtype=x.dtype, device=x.device).expand_as(x)
    return _combine(x * float((1 - alpha_bar) ** 0.5), 1, start, alpha_bar**0.5)


def _predictor(
    denoise: Denoiser, schedule: NoiseSchedule, clip_x0: Union[bool, float], dynamic_threshold: Optional[float]
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """(x_t, t) -> x_0, limited as asked, in the memory of the denoiser's result."""
    if dynamic_threshold is not None and not (clip_x0 and 0 < dynamic_threshold <= 1):
        raise ValueError(f"dynamic_threshold must be in (0, 1], and clip_x0 on: got {dynamic_threshold}, {clip_x0}")
    limit = float(clip_x0)

    def predict(x: torch.Tensor, t: int) -> torch.Tensor:
        alpha_bar = float(schedule.alpha_bar[t])
        eps = denoise(x, x.new_full((len(x),), alpha_bar**0.5)).to(x.dtype)
        x0 = _combine(eps, -((1 / alpha_bar - 1) ** 0.5), x, (1 / alpha_bar) ** 0.5)
        if not limit:
            return x0
        if dynamic_threshold is None:
            for strip in x0.split(_strip_rows(x0), -2):
                strip.copy_(clamp_finite(strip, -limit, limit))
            return x0
        size = x0.flatten(1).abs()
        rank = 1 + round(dynamic_threshold * (size.shape[1] - 1))
        # torch.quantile stops at 2**24 elements
        reached = size.kthvalue(rank).values.clamp(min=limit).view(-1, 1, 1, 1)
        return x0.clamp_(-reached, reached).div_(reached / limit)

    return predict
