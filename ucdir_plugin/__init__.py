"""UCDIR and BIR-D as a plugin for BasicSR and MMEngine. Importing it registers everything; twice does no harm."""

__version__ = "0.1.0"

from ucdir_plugin import compat  # noqa: F401  (first: BasicSR cannot be imported before it)

# isort: split
from ucdir_plugin import archs, data, losses, models  # noqa: F401


def __getattr__(name: str):
    """``load_model`` and ``restore``, imported when they are first used: the import stays quick."""
    if name in ("load_model", "restore"):
        from ucdir_plugin import restorer

        return getattr(restorer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
