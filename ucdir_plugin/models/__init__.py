"""Training and test loops, registered as BasicSR models."""

from ucdir_plugin.models.prior_model import DiffusionPriorModel
from ucdir_plugin.models.ucdir_model import UCDIRModel

__all__ = ["DiffusionPriorModel", "UCDIRModel"]
