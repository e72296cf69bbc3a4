"""Metrics that BasicSR lacks, all usable in ``val: metrics:``; docs/metrics.md has formulas, protocols and sources."""

from ucdir_plugin.metrics.consistency import calculate_consistency
from ucdir_plugin.metrics.distances import calculate_fid, calculate_kid
from ucdir_plugin.metrics.features import feature_network
from ucdir_plugin.metrics.order import calculate_loe
from ucdir_plugin.metrics.perception import calculate_nrqm, calculate_pi
from ucdir_plugin.metrics.perceptual import calculate_lpips, calculate_stlpips
from ucdir_plugin.metrics.seams import calculate_seam_score, seam_score

__all__ = [
    "calculate_consistency",
    "calculate_fid",
    "calculate_kid",
    "calculate_loe",
    "calculate_lpips",
    "calculate_nrqm",
    "calculate_pi",
    "calculate_seam_score",
    "calculate_stlpips",
    "feature_network",
    "seam_score",
]
