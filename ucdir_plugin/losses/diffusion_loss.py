"""Losses on what a diffusion network predicts."""

from __future__ import annotations

from typing import Literal, Optional

import torch
from torch import nn

from ucdir_plugin.errors import UserError
from ucdir_plugin.registry import register


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
