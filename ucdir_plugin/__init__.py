"""UCDIR and BIR-D as a plugin for BasicSR and MMEngine. Importing it registers everything; twice does no harm."""

from ucdir_plugin import compat  # noqa: F401  (first: BasicSR cannot be imported before it)

# isort: split
from ucdir_plugin import archs, data, losses, metrics, models  # noqa: F401
from ucdir_plugin.restoration.load import load_model
from ucdir_plugin.restoration.restore import restore
from ucdir_plugin.utils.versions import __version__

__all__ = ["__version__", "load_model", "restore"]
