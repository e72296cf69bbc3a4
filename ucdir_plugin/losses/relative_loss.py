"""Losses that are a share of what is to be predicted."""

from __future__ import annotations

import torch
from torch import nn

from ucdir_plugin.registry import register


@register("loss")
class RelativeMSELoss(nn.Module):
    """Squared error over the target's mean square: the share of the target's power that is not explained.

    It is 1 for a prediction of 0, whatever the target's scale, and 0 for the target itself.

    Args:
        loss_weight: factor on the loss.
    """

    def __init__(self, loss_weight: float = 1.0):
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Of a whole batch, a scalar.

        Args:
            pred, target: (B, C, H, W).
        """
        pred, target = pred.float(), target.float()
        power = target.square().mean().clamp(min=1e-12)
        return self.loss_weight * (pred - target).square().mean() / power
