"""Several degradations one after the other."""

from __future__ import annotations

import math
from typing import Any

from ucdir_plugin.data.clean_dataset import CleanImages
from ucdir_plugin.data.degradations import Step, chain, degrade
from ucdir_plugin.data.paired_dataset import option, to_sample
from ucdir_plugin.registry import register


def _steps(opt: dict) -> tuple[Step, ...]:
    return chain(option(opt, "degradations"), f"datasets: {opt['name']}: degradations")


@register("dataset")
class MixedDegradationDataset(CleanImages):
    """A folder of photographs, degraded in a declared order with values drawn from declared ranges.

    Each sample's ``condition`` holds the values drawn: ``blur_sigma``, ``jpeg_quality``, ... In a test they and the
    noise of an image are a function of ``seed`` and its relative path.

    Args:
        opt: those of :class:`~ucdir_plugin.data.clean_dataset.CleanImages`; ``degradations``, see
            :func:`ucdir_plugin.data.degradations.chain`; ``seed`` (0).

    Raises:
        UserError: as CleanImages; for a degradation that does not exist, or values out of its limits.
    """

    def __init__(self, opt: dict):
        self.steps = _steps(opt)
        super().__init__(opt)

    @staticmethod
    def tells(opt: dict) -> dict[str, tuple]:
        told = CleanImages.tells(opt)
        for step in _steps(opt):
            left_out = (math.nan,) if step.probability < 1 else ()
            told.update((f"{step.name}_{key}", bounds + left_out) for key, bounds in step.ranges.items())
        return told

    def __getitem__(self, index: int) -> dict[str, Any]:
        gt, path = self.read(index)
        lq, values = degrade(self.steps, gt, self.generator(index))
        condition = {**self.condition, **values}
        return to_sample({"lq": lq, "gt": gt}, {"lq": path, "gt": path}, self.names[index], condition)
