"""Pairs of raw files, developed when they are read."""

from __future__ import annotations

from typing import Any, ClassVar, Dict, Optional, Tuple, Union

import numpy as np
from torch.utils.data import Dataset

from ucdir_plugin.compat import augment, paired_random_crop
from ucdir_plugin.data.low_light_dataset import LIMITS
from ucdir_plugin.data.raw import develop, read_pairs
from ucdir_plugin.data.samples import check_crop, constant, flips, option, to_sample
from ucdir_plugin.registry import register
from ucdir_plugin.utils.degradations import value_range


@register("dataset")
class RawPairDataset(Dataset):
    """Short and long exposures of SID from their raw files, as :func:`ucdir_plugin.data.raw.develop` makes them.

    What ``datasets/prepare_sid.py`` writes, without the files in between, and slower. Each sample's ``condition`` is
    the exposure ``ratio``.

    Args:
        opt: ``dataroot_gt`` (folder that the list's paths start from); ``meta_info_file`` (official list); ``ratio``
            (only pairs of this exposure ratio, or of a range; default: all); ``gt_size`` (crop, in training),
            ``use_hflip``, ``use_rot``; ``condition`` (values that are the same for all samples).

    Raises:
        UserError: as :func:`ucdir_plugin.data.raw.read_pairs` and ``develop``; for a crop larger than an image.
    """

    options: ClassVar[Dict[str, Any]] = {
        "meta_info_file": Optional[str],
        "ratio": Union[float, Tuple[float, float], None],
    }

    def __init__(self, opt: dict):
        self.opt = opt
        self.train = opt["phase"] == "train"
        self.crop = option(opt, "gt_size") if self.train else None
        where = f"datasets: {opt['name']}: ratio"
        ratio = None if opt.get("ratio") is None else value_range(opt["ratio"], LIMITS["ratio"], where)
        self.pairs = read_pairs(option(opt, "meta_info_file"), option(opt, "dataroot_gt"), ratio)

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that the samples give: name -> range."""
        return {**constant(opt), "ratio": ()}  # the list says which

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        lq, gt = (
            develop(path, ratio).astype(np.float32) / 65535.0
            for path, ratio in ((pair.short, pair.ratio), (pair.long, 1.0))
        )
        if self.train:
            check_crop(gt.shape[:2], self.crop, pair.long)
            gt, lq = paired_random_crop(gt, lq, self.crop, 1, pair.long)
            gt, lq = augment([gt, lq], *flips(self.opt))
        condition = {**self.opt.get("condition", {}), "ratio": pair.ratio}
        paths = {"lq": pair.short, "gt": pair.long}
        return to_sample({"lq": lq, "gt": gt}, paths, f"{pair.key}.png", condition)  # as of the prepared image

    def __len__(self) -> int:
        return len(self.pairs)
