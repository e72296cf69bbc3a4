"""BasicSR's datasets, ours and others, folders and LMDBs, for MMEngine's runners."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any, Dict, Mapping, Union

from mmengine.dist import get_dist_info
from torch.utils.data import Dataset

from ucdir_plugin.compat import build_dataset
from ucdir_plugin.data.loader import EndlessSampler, KeyedDataset
from ucdir_plugin.data.samples import sample_key
from ucdir_plugin.options.schema import DatasetOptions
from ucdir_plugin.registry import DATA_SAMPLERS, DATASETS


@DATASETS.register_module()
class BasicSRDataset(KeyedDataset):
    """Any dataset of BasicSR: ``dict(type="ucdir_plugin.BasicSRDataset", opt=dict(type="JPEGDataset", ...))``.

    Args:
        opt: as in an option file's ``datasets``; ``io_backend: {type: lmdb}`` reads LMDBs.
        phase: train, val or test.
        scale: output size / input size.
        seed: of what is random in training, with the sample number.

    A sample has what the dataset gives: ``lq``, ``gt``, (C, H, W) in [0, 1], and, asked for by
    :class:`KeyedSampler`, ``sample_number``; else ``key``, its relative path.
    """

    def __init__(self, opt: Mapping[str, Any], phase: str = "train", scale: int = 1, seed: int = 0):
        defaults = DatasetOptions(name=phase, type=opt["type"]).model_dump(exclude_none=True)
        opt = {**defaults, **deepcopy(dict(opt)), "phase": phase, "scale": scale}  # BasicSR's datasets change theirs
        super().__init__(build_dataset(opt), seed)
        self.metainfo: Dict[str, Any] = {"name": opt["name"]}

    def __getitem__(self, key: Union[int, tuple[int, int]]) -> Any:
        if isinstance(key, tuple):
            return super().__getitem__(key)
        sample = self.dataset[key]
        if "key" in sample or "lq_path" not in sample:
            return sample
        return {**sample, "key": sample_key({"lq_path": [sample["lq_path"]]}, self.opt)}


@DATA_SAMPLERS.register_module()
class KeyedSampler(EndlessSampler):
    """``sampler=dict(type="ucdir_plugin.KeyedSampler", batch=4)``: an :class:`EndlessSampler` of this process.

    Args:
        dataset: of which the runner makes a loader.
        batch: the loader's batch_size.
        seed: of the order; the runner's own if it has one.
    """

    def __init__(self, dataset: Dataset, batch: int, seed: int = 0):
        super().__init__(len(dataset), batch, *get_dist_info(), seed or 0)

    def __len__(self) -> int:
        """Samples of an epoch on this process, whole batches."""
        return math.ceil(self.size / (self.batch * self.world_size)) * self.batch
