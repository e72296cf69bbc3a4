"""Training and test loops, registered as BasicSR models."""

from ucdir_plugin.models.bird_model import BIRDModel
from ucdir_plugin.models.prior_model import DiffusionPriorModel
from ucdir_plugin.models.ucdir_model import UCDIRModel

__all__ = ["BIRDModel", "DiffusionPriorModel", "UCDIRModel"]
