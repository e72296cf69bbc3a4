"""UCDIR and BIR-D as a plugin for BasicSR and MMEngine. Importing it registers everything; twice does no harm."""

from ucdir_plugin import compat  # noqa: F401  (first: BasicSR cannot be imported before it)

# isort: split
from ucdir_plugin import archs, data, losses, metrics, mm, models  # noqa: F401
from ucdir_plugin.utils.versions import __version__

__all__ = ["__version__", "load_model", "restore"]


def __getattr__(name: str):
    """``load_model`` and ``restore``, imported when they are first used: the import stays quick."""
    if name in ("load_model", "restore"):
        from ucdir_plugin.restoration import load, restore

        return {"load_model": load.load_model, "restore": restore.restore}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
