"""Networks, registered for BasicSR and MMEngine."""

from ucdir_plugin.archs.predictor_arch import SIDUNet
from ucdir_plugin.archs.ucdir_arch import UCDIR, UCDIRDenoiser

__all__ = ["UCDIR", "SIDUNet", "UCDIRDenoiser"]
