"""Training and test loops, registered as BasicSR models."""

from ucdir_plugin.models.bird_model import BIRDModel
from ucdir_plugin.models.prior_model import DiffusionPriorModel
from ucdir_plugin.models.student_model import UCDIRStudentModel
from ucdir_plugin.models.ucdir_model import UCDIRModel
from ucdir_plugin.training import basicsr_commands  # noqa: F401  (it takes over how BasicSR reads option files)

__all__ = ["BIRDModel", "DiffusionPriorModel", "UCDIRModel", "UCDIRStudentModel"]
