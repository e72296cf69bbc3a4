"""Noise schedules of Gaussian diffusion, with the continuous noise level of WaveGrad that UCDIR uses."""

from __future__ import annotations

from typing import Optional

import numpy as np
import torch

SPACINGS = ("uniform", "trailing", "quadratic")
"""The ways of :meth:`NoiseSchedule.respace` to choose levels."""

LEAST_ALPHA_BAR = 1e-12
"""Of a schedule's noisiest level. Below, the x_0 that is predicted from x_t is lost in rounding of float32."""


class NoiseSchedule:
    """The constants of q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I) for t = 0 .. T-1.

    All arrays are float64 numpy arrays of length T, computed once.

    Args:
        betas: variances of the forward steps, each in (0, 1).
        alpha_bar: cumulated product of 1 - beta, of a schedule made from it; else it is computed.

    Raises:
        ValueError: if ``betas`` is empty or leaves (0, 1), or if alpha_bar does not fall in each step from below 1 to
            :data:`LEAST_ALPHA_BAR` at least, as numbers of float64.

    Attributes:
        alpha_bar: cumulated product of 1 - beta.
        alpha_bar_prev: the same one step earlier, starting at 1.
        posterior_variance, posterior_log_variance_clipped, posterior_mean_coef1, posterior_mean_coef2: of
            q(x_{t-1} | x_t, x_0) (DDPM, eqs. 6 and 7).
        levels: noise levels sqrt(alpha_bar), length T + 1 with 1 (no noise) in front.
    """

    def __init__(self, betas: np.ndarray, alpha_bar: Optional[np.ndarray] = None):
        self.betas = np.asarray(betas, dtype=np.float64)
        if self.betas.ndim != 1 or not len(self.betas) or not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError("betas must be a non-empty list of numbers between 0 and 1")
        self.alpha_bar = np.cumprod(1 - self.betas) if alpha_bar is None else np.asarray(alpha_bar, dtype=np.float64)
        if self.alpha_bar[-1] < LEAST_ALPHA_BAR:
            raise ValueError(
                f"{len(self.betas)} steps with betas up to {self.betas.max():g} leave {self.alpha_bar[-1]:.1e} of the"
                f" image (alpha_bar), less than {LEAST_ALPHA_BAR:.0e}: take fewer steps or smaller betas"
            )
        if not (np.diff(self.alpha_bar, prepend=1.0) < 0).all():
            raise ValueError(f"betas down to {self.betas.min():g} are too small: alpha_bar does not fall in each step")
        self.alpha_bar_prev = np.append(1.0, self.alpha_bar[:-1])
        alphas = self.alpha_bar / self.alpha_bar_prev
        self.posterior_variance = self.betas * (1 - self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.posterior_log_variance_clipped = np.log(np.maximum(self.posterior_variance, 1e-20))
        self.posterior_mean_coef1 = self.betas * np.sqrt(self.alpha_bar_prev) / (1 - self.alpha_bar)
        self.posterior_mean_coef2 = (1 - self.alpha_bar_prev) * np.sqrt(alphas) / (1 - self.alpha_bar)
        self.levels = np.sqrt(np.append(1.0, self.alpha_bar))

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: np.ndarray) -> NoiseSchedule:
        """The steps between these levels, which it has exactly.

        Args:
            alpha_bar: falling, within (0, 1).
        """
        return cls(1 - alpha_bar / np.append(1.0, alpha_bar[:-1]), alpha_bar)

    @classmethod
    def linear(cls, timesteps: int, start: float, end: float) -> NoiseSchedule:
        """Betas equally spaced from ``start`` to ``end`` (DDPM; UCDIR trains with 2000 steps, 1e-6 to 1e-2)."""
        return cls(np.linspace(start, end, timesteps, dtype=np.float64))

    @classmethod
    def cosine(cls, timesteps: int) -> NoiseSchedule:
        """alpha_bar = f(t) / f(0) with f(t) = cos^2((t / T + 0.008) / 1.008 * pi / 2), betas at most 0.999.

        Improved DDPM (arXiv 2102.09672), eq. 17.
        """
        ramp = np.cos((np.arange(timesteps + 1) / timesteps + 0.008) / 1.008 * np.pi / 2) ** 2
        return cls(np.minimum(1 - ramp[1:] / ramp[:-1], 0.999))

    def respace(self, steps: int, spacing: str = "uniform") -> NoiseSchedule:
        """A schedule of ``steps`` steps at some of this one's noise levels, always with the noisiest.

        Args:
            steps: 1 .. T.
            spacing: ``uniform``, indices round(linspace(0, T-1, steps)), the paper's "50 steps by uniform
                interpolation"; ``trailing``, round(T k / steps) - 1 for k = 1 .. steps, which spends no step on the
                cleanest level (arXiv 2305.08891); ``quadratic``, round((T-1) linspace(0, 1, steps)^2), denser at
                small noise (DDIM, arXiv 2010.02502), moved apart where that would take a level twice.

        Raises:
            ValueError: if ``steps`` is not in 1 .. T, or at an unknown spacing.
        """
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps must be between 1 and the schedule's {len(self)}, got {steps}")
        if spacing == "uniform":
            indices = np.round(np.linspace(len(self) - 1, 0, steps))[::-1]
        elif spacing == "trailing":
            indices = np.round(len(self) * np.arange(1, steps + 1) / steps) - 1
        elif spacing == "quadratic":
            order, ramp = np.arange(steps), np.linspace(1, 0, steps)[::-1]
            indices = np.maximum.accumulate(np.round((len(self) - 1) * ramp**2) - order) + order
        else:
            raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
        alpha_bar = self.alpha_bar[indices.astype(int)]
        return NoiseSchedule.from_alpha_bar(alpha_bar)

    def truncate(self, timesteps: int) -> NoiseSchedule:
        """The first (cleanest) ``timesteps`` steps: where a sampler starts from a noised guess at t* < T.

        ``schedule.truncate(t).respace(steps)`` has its noisiest level at t; pass ``start`` to the sampler with it.

        Raises:
            ValueError: if ``timesteps`` is not in 1 .. T.
        """
        if not 1 <= timesteps <= len(self):
            raise ValueError(f"timesteps must be between 1 and the schedule's {len(self)}, got {timesteps}")
        return NoiseSchedule(self.betas[:timesteps])

    def sample_level(self, generator: torch.Generator) -> float:
        """Draw one continuous noise level: t uniform in 1 .. T, then uniform between its two levels."""
        t = int(torch.randint(1, len(self) + 1, (1,), generator=generator))
        u = float(torch.rand(1, generator=generator, dtype=torch.float64))
        return float(self.levels[t] + u * (self.levels[t - 1] - self.levels[t]))

    def sample_timestep(self, generator: torch.Generator) -> int:
        """Draw t, uniform in 0 .. T - 1."""
        return int(torch.randint(len(self), (1,), generator=generator))


def diffuse(x0: torch.Tensor, level: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """x_t = level * x0 + sqrt(1 - level^2) * noise (UCDIR eq. 1, gamma = level^2).

    Args:
        x0, noise: (B, C, H, W).
        level: (B,), sqrt(alpha_bar) in (0, 1].
    """
    level = level.view(-1, 1, 1, 1).to(x0.dtype)
    return level * x0 + (1 - level.square()).clamp(min=0).sqrt() * noise
