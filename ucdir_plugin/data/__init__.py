"""Datasets that BasicSR lacks, and data loading that can be resumed exactly."""

from ucdir_plugin.data.jpeg_dataset import JPEGDataset
from ucdir_plugin.data.paired_dataset import PairedRestorationDataset

__all__ = ["JPEGDataset", "PairedRestorationDataset"]
