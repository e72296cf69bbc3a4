"""What MMEngine has its own interfaces for."""

from ucdir_plugin.mm.metrics import RestorationMetrics

__all__ = ["RestorationMetrics"]
