"""Losses on what a diffusion network predicts."""

from __future__ import annotations

import math
from typing import Literal, Optional

import torch
from torch import nn

from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.registry import register
from ucdir_plugin.utils.errors import UserError


@register("loss")
class NoisePredictionLoss(nn.Module):
    """Distance between predicted and true noise (UCDIR, eq. 1), optionally weighted by noise level.

    Args:
        loss_weight: factor on the loss.
        criterion: 'l1' (UCDIR) or 'l2' (DDPM).
        weighting: 'none' (both papers); 'min_snr': min(SNR, gamma) / SNR (Hang et al., ICCV 2023, for predicted noise);
            'p2': 1 / (1 + SNR) ** gamma (Choi et al., CVPR 2022). SNR = level^2 / (1 - level^2).
        gamma: parameter of the weighting; default 5 for 'min_snr' and 1 for 'p2', as in their papers.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        criterion: Literal["l1", "l2"] = "l1",
        weighting: Literal["none", "min_snr", "p2"] = "none",
        gamma: Optional[float] = None,
    ):
        super().__init__()
        if criterion not in ("l1", "l2"):
            raise UserError(f"criterion {criterion!r}: known are l1, l2")
        if weighting not in ("none", "min_snr", "p2"):
            raise UserError(f"weighting {weighting!r}: known are none, min_snr, p2")
        self.loss_weight, self.criterion, self.weighting = loss_weight, criterion, weighting
        self.gamma = gamma if gamma is not None else {"min_snr": 5.0}.get(weighting, 1.0)

    def forward(
        self, pred: torch.Tensor, target: torch.Tensor, noise_level: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Mean over all elements, a scalar.

        Args:
            pred, target: (B, C, H, W).
            noise_level: sqrt(alpha_bar) of each image, (B,); needed for a weighting.
        """
        difference = pred.float() - target.float()
        error = (difference.abs() if self.criterion == "l1" else difference.square()).flatten(1).mean(1)
        if self.weighting != "none":
            if noise_level is None:
                raise UserError(f"weighting {self.weighting!r} needs the noise level, which this model does not give")
            squared = noise_level.flatten().float().square()
            snr = squared / (1 - squared).clamp(min=1e-12)
            error = error * (
                snr.clamp(max=self.gamma) / snr if self.weighting == "min_snr" else (1 + snr) ** -self.gamma
            )
        return self.loss_weight * error.mean()


@register("loss")
class VariationalBoundLoss(nn.Module):
    """Variational bound of the negative log likelihood, from which the variance is learned.

    Improved DDPM (arXiv 2102.09672), eqs. 3 to 7, 15 and 16: ``loss_weight`` is lambda of the hybrid loss. The log
    variance is f log(beta) + (1 - f) log(beta~) with f = (v + 1) / 2; beta~ of t = 0, which is none, is that of t = 1.

    Args:
        loss_weight: factor on the loss.
    """

    def __init__(self, loss_weight: float = 0.001):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(
        self,
        eps: torch.Tensor,
        v: torch.Tensor,
        noise: torch.Tensor,
        x0: torch.Tensor,
        timestep: torch.Tensor,
        schedule: NoiseSchedule,
    ) -> torch.Tensor:
        """Estimate from time steps drawn uniformly, a scalar; its gradient reaches v alone (their section 3.1)."""
        terms = variational_terms(eps.detach(), v, noise, x0, timestep, schedule)
        return self.loss_weight * len(schedule) * terms.mean()


def variational_terms(
    eps: torch.Tensor,
    v: torch.Tensor,
    noise: torch.Tensor,
    x0: torch.Tensor,
    timestep: torch.Tensor,
    schedule: NoiseSchedule,
) -> torch.Tensor:
    """The bound's term of each image's time step, in bits per number of the image: (B,).

    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 the code length of x_0 rounded to 8 bits. Its sum over all
    time steps and the term of x_T, which does not depend on the network, make the bound.

    Args:
        eps, noise: predicted and true noise of x_t, (B, C, H, W).
        v: predicted, of the same shape.
        x0: (B, C, H, W) in [-1, 1].
        timestep: (B,), whole numbers in 0 .. T - 1.
    """
    t = timestep.long().cpu()

    def column(values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.float64)[t].to(eps).view(-1, 1, 1, 1)

    betas, alpha_bar = torch.from_numpy(schedule.betas), torch.from_numpy(schedule.alpha_bar)
    low = torch.from_numpy(schedule.posterior_variance).clone()
    low[0] = low[1] if len(low) > 1 else betas[0]
    part, low = (v + 1) / 2, column(low.log())
    log_variance = part * column(betas.log()) + (1 - part) * low
    error = eps - noise
    # Means differ by c1 (x0 - x0') = beta / sqrt((1 - alpha_bar) alpha) (eps - noise).
    shift = column(betas / ((1 - alpha_bar) * (1 - betas)).sqrt()) * error
    gap = low - log_variance
    divergence = 0.5 * (gap.expm1() - gap + shift.square() * (-log_variance).exp())
    decoded = _code_length(shift, (0.5 * log_variance).exp(), x0)  # the mean at t = 0 is x0': x0 less the shift
    terms = torch.where((t == 0).to(eps.device).view(-1, 1, 1, 1), decoded, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def _code_length(offset: torch.Tensor, std: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """-log of the mass of N(x0 - offset, std^2) within 1/255 of x0; the outermost of 256 bins have no far end."""

    def below(edge: float) -> torch.Tensor:
        return torch.special.ndtr((offset + edge) / std)

    upper = torch.where(x0 > 0.999, torch.ones_like(std), below(1 / 255))
    lower = torch.where(x0 < -0.999, torch.zeros_like(std), below(-1 / 255))
    return -(upper - lower).clamp(min=1e-12).log()
