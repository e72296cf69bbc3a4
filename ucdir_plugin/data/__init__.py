"""Datasets that BasicSR lacks, and data loading that can be resumed exactly."""

from ucdir_plugin.data.clean_dataset import CleanImageDataset
from ucdir_plugin.data.jpeg_dataset import JPEGDataset
from ucdir_plugin.data.low_light_dataset import LowLightDataset
from ucdir_plugin.data.mixed_dataset import MixedDegradationDataset
from ucdir_plugin.data.paired_dataset import PairedRestorationDataset
from ucdir_plugin.data.raw_dataset import RawPairDataset

__all__ = [
    "CleanImageDataset",
    "JPEGDataset",
    "LowLightDataset",
    "MixedDegradationDataset",
    "PairedRestorationDataset",
    "RawPairDataset",
]
