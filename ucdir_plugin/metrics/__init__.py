"""Metrics that BasicSR lacks."""

from ucdir_plugin.metrics.seams import seam_score

__all__ = ["seam_score"]
