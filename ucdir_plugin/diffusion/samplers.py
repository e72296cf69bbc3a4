"""Samplers: one function each, the same signature, any denoiser given as a callable."""

from __future__ import annotations

from typing import Callable, Optional

import torch

from ucdir_plugin.diffusion.schedule import NoiseSchedule

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x_t of shape (B, C, H, W), noise level sqrt(alpha_bar) of shape (B,)) -> predicted noise eps, shape of x_t."""

StepNoise = Callable[[int], torch.Tensor]
"""draw number -> standard normal noise with the shape of x_t. Draw 0 is x_T, draw k the noise of the k-th step."""


@torch.no_grad()
def ddpm(
    denoise: Denoiser,
    schedule: NoiseSchedule,
    noise: StepNoise,
    clip_x0: bool = True,
    callback: Optional[Callable[[int, torch.Tensor, torch.Tensor], None]] = None,
) -> torch.Tensor:
    """Ancestral sampling with the posterior variance (DDPM, algorithm 2).

    Args:
        denoise: predicts the noise in x_t.
        schedule: one network call per step of it.
        noise: all the randomness; ``len(schedule)`` draws.
        clip_x0: clamp each prediction of x_0 to [-1, 1].
        callback: called as ``callback(step, x_t, x0)`` after each prediction, step counting from 0.

    Returns:
        x_0, (B, C, H, W), in the range of the training data ([-1, 1] for images; residuals too, as clamped).
    """
    x = noise(0)
    for step, t in enumerate(reversed(range(len(schedule)))):
        alpha_bar = float(schedule.alpha_bar[t])
        eps = denoise(x, x.new_full((len(x),), alpha_bar**0.5))
        x0 = (1 / alpha_bar) ** 0.5 * x - (1 / alpha_bar - 1) ** 0.5 * eps
        if clip_x0:
            x0 = x0.clamp(-1, 1)
        if callback is not None:
            callback(step, x, x0)
        x = float(schedule.posterior_mean_coef1[t]) * x0 + float(schedule.posterior_mean_coef2[t]) * x
        if t > 0:
            x = x + float(schedule.posterior_variance[t]) ** 0.5 * noise(step + 1)
    return x
