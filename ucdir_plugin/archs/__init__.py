"""Networks, registered for BasicSR and MMEngine."""

from ucdir_plugin.archs.adm_arch import ADMUNet
from ucdir_plugin.archs.ffdnet_arch import FFDNet
from ucdir_plugin.archs.predictor_arch import SIDUNet
from ucdir_plugin.archs.spandrel_arch import Spandrel
from ucdir_plugin.archs.ucdir_arch import UCDIR, UCDIRDenoiser

__all__ = ["UCDIR", "ADMUNet", "FFDNet", "SIDUNet", "Spandrel", "UCDIRDenoiser"]
