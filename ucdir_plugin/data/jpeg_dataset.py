"""JPEG compression on the fly."""

from __future__ import annotations

import random
from typing import Any, ClassVar, Dict, Tuple, Union

from ucdir_plugin.data.clean_dataset import CleanImages
from ucdir_plugin.data.samples import option, to_sample
from ucdir_plugin.registry import register
from ucdir_plugin.utils.degradations import KINDS, jpeg, value_range


def _quality(opt: dict) -> tuple[int, int]:
    return value_range(option(opt, "quality"), KINDS["jpeg"].limits["quality"], f"datasets: {opt['name']}: quality")


@register("dataset")
class JPEGDataset(CleanImages):
    """A folder of photographs and their JPEG-compressed versions; each sample's ``condition`` is its ``quality``.

    In training a random crop is compressed, so that blocks start at the crop's corner, as they start at an image's
    corner in the test, where the whole image is compressed.

    Args:
        opt: those of :class:`~ucdir_plugin.data.clean_dataset.CleanImages`; ``quality``: 1 .. 100, or [low, high] to
            draw from in training (the test takes the middle).

    Raises:
        UserError: as CleanImages; for a wrong quality.
    """

    options: ClassVar[Dict[str, Any]] = {
        "quality": Union[int, Tuple[int, int], None],
    }

    def __init__(self, opt: dict):
        self.quality = _quality(opt)
        super().__init__(opt)

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that the samples give: name -> range."""
        return {**CleanImages.condition_ranges(opt), "quality": _quality(opt)}

    @staticmethod
    def declared(opt: dict) -> list[dict[str, Any]]:
        """What a test does to images, as a chain of degradations."""
        return [{"type": "jpeg", "quality": sum(_quality(opt)) // 2}]

    def __getitem__(self, index: int) -> dict[str, Any]:
        gt, path = self.read(index)
        quality = random.randint(*self.quality) if self.train else sum(self.quality) // 2
        condition = {**self.condition, "quality": quality}
        return to_sample({"lq": jpeg(gt, quality), "gt": gt}, {"lq": path, "gt": path}, self.names[index], condition)
