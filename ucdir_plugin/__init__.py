"""UCDIR and BIR-D as a plugin for BasicSR and MMEngine. Importing it registers everything; twice does no harm."""

__version__ = "0.1.0"

from ucdir_plugin import compat  # noqa: F401  (first: BasicSR cannot be imported before it)

# isort: split
from ucdir_plugin import archs, data, losses, models  # noqa: F401
