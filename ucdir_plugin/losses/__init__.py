"""Losses, registered for BasicSR and MMEngine."""

from ucdir_plugin.losses.diffusion_loss import NoisePredictionLoss, VariationalBoundLoss
from ucdir_plugin.losses.relative_loss import RelativeMSELoss

__all__ = ["NoisePredictionLoss", "RelativeMSELoss", "VariationalBoundLoss"]
