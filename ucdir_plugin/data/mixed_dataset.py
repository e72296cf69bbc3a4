"""Several degradations one after the other."""

from __future__ import annotations

import math
import os
from typing import Any, ClassVar, Dict, List, Optional

import numpy as np
import torch

from ucdir_plugin.data.clean_dataset import CleanImages
from ucdir_plugin.data.samples import option, some_of, to_sample
from ucdir_plugin.registry import register
from ucdir_plugin.utils.degradations import KINDS, Step, chain, degrade, shrinks
from ucdir_plugin.utils.errors import UserError
from ucdir_plugin.utils.image_reading import image_size
from ucdir_plugin.utils.option_types import Int


def _steps(opt: dict) -> tuple[Step, ...]:
    return chain(option(opt, "degradations"), f"datasets: {opt['name']}: degradations")


@register("dataset")
class MixedDegradationDataset(CleanImages):
    """A folder of photographs, degraded in a declared order with values drawn from declared ranges.

    Each sample's ``condition`` holds the values drawn: ``blur_sigma``, ``jpeg_quality``, ... In a test they and the
    noise of an image are a function of ``seed`` and its relative path. With ``holes``, ``known`` (1, H, W) is 0
    in them, and the image black; with ``block_mean`` the true image is cut to whole blocks.

    Args:
        opt: those of :class:`~ucdir_plugin.data.clean_dataset.CleanImages`; ``degradations``, see
            :func:`ucdir_plugin.utils.degradations.chain`; ``seed`` (0).

    Raises:
        UserError: as CleanImages; for a degradation that does not exist, or values out of its limits; for one in
            training that changes the size or leaves holes.
    """

    options: ClassVar[Dict[str, Any]] = {
        "degradations": Optional[List[Dict[str, Any]]],
        "seed": Optional[Int],
    }

    def __init__(self, opt: dict):
        self.steps = _steps(opt)
        super().__init__(opt)
        names = [step.name for step in self.steps if step.name.rstrip("0123456789") in ("holes", "block_mean")]
        if self.train and names:
            raise UserError(f"option datasets: {opt['name']}: {names[0]} is for tests of BIR-D; remove it")
        factor = shrinks(self.steps)
        for name in some_of(self.names) if factor > 1 else ():
            if min(image_size(os.path.join(self.root, name))) < factor:
                raise UserError(f"image {os.path.join(self.root, name)} has no block of {factor} pixels; remove it")

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that the samples give: name -> range."""
        ranges = CleanImages.condition_ranges(opt)
        for step in _steps(opt):
            left_out = (math.nan,) if step.probability < 1 else ()
            ranges.update((f"{step.name}_{key}", bounds + left_out) for key, bounds in step.ranges.items())
        return ranges

    @staticmethod
    def declared(opt: dict) -> list[dict[str, Any]]:
        """The chain of degradations."""
        return [dict(entry) for entry in option(opt, "degradations")]

    def __getitem__(self, index: int) -> dict[str, Any]:
        gt, path = self.read(index)
        factor = shrinks(self.steps)
        gt = gt[: len(gt) // factor * factor, : gt.shape[1] // factor * factor]
        lq, values = degrade(self.steps, gt, self.generator(index))
        known = np.isfinite(lq[..., 0])
        condition = {**self.condition, **values}
        sample = to_sample({"lq": np.nan_to_num(lq), "gt": gt}, {"lq": path, "gt": path}, self.names[index], condition)
        if any(step.kind is KINDS["holes"] for step in self.steps):
            sample["known"] = torch.from_numpy(known).float().unsqueeze(0)
        return sample
