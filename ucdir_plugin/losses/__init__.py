"""Losses, registered for BasicSR and MMEngine."""

from ucdir_plugin.losses.diffusion_loss import NoisePredictionLoss, VariationalBoundLoss

__all__ = ["NoisePredictionLoss", "VariationalBoundLoss"]
