"""Extreme low light from photographs, for those without raw files."""

from __future__ import annotations

from typing import Any, ClassVar, Dict, Optional, Tuple, Union

from ucdir_plugin.data.clean_dataset import CleanImages
from ucdir_plugin.data.samples import to_sample
from ucdir_plugin.registry import register
from ucdir_plugin.utils.degradations import draw, low_light, value_range
from ucdir_plugin.utils.option_types import Int, PositiveInt

LIMITS = {"ratio": (1.0, 10000.0), "electrons": (1.0, 1e6), "read": (0.0, 1000.0), "row": (0.0, 1000.0)}
DEFAULTS = {"ratio": (100.0, 300.0), "electrons": (1000.0, 15000.0), "read": (1.0, 4.0), "row": (0.0, 1.0)}
BITS = 14


def _ranges(opt: dict) -> dict[str, tuple[float, float]]:
    where = f"datasets: {opt['name']}"
    return {key: value_range(opt.get(key, DEFAULTS[key]), LIMITS[key], f"{where}: {key}") for key in LIMITS}


@register("dataset")
class LowLightDataset(CleanImages):
    """A folder of photographs and what a far too short exposure, amplified, would have made of them.

    See :func:`ucdir_plugin.utils.degradations.low_light`. Each sample's ``condition`` is its ``ratio``. In a test the
    values and the noise of an image are a function of ``seed`` and its relative path.

    Args:
        opt: those of :class:`~ucdir_plugin.data.clean_dataset.CleanImages`; ``ratio``, ``electrons``, ``read`` and
            ``row``, each a number or [low, high] to draw from (default: :data:`DEFAULTS`); ``bits`` (14); ``seed`` (0).

    Raises:
        UserError: as CleanImages; for values out of :data:`LIMITS`.
    """

    options: ClassVar[Dict[str, Any]] = {
        "ratio": Union[float, Tuple[float, float], None],
        "electrons": Union[float, Tuple[float, float], None],
        "read": Union[float, Tuple[float, float], None],
        "row": Union[float, Tuple[float, float], None],
        "bits": Optional[PositiveInt],
        "seed": Optional[Int],
    }

    def __init__(self, opt: dict):
        self.ranges = _ranges(opt)
        self.bits = value_range(opt.get("bits", BITS), (1, 24), f"datasets: {opt['name']}: bits")[0]
        super().__init__(opt)

    @staticmethod
    def condition_ranges(opt: dict) -> dict[str, tuple]:
        """Conditions that the samples give: name -> range."""
        return {**CleanImages.condition_ranges(opt), "ratio": _ranges(opt)["ratio"]}

    def __getitem__(self, index: int) -> dict[str, Any]:
        gt, path = self.read(index)
        rng = self.generator(index)
        values = {key: draw((float(low), float(high)), rng) for key, (low, high) in self.ranges.items()}
        lq = low_light(gt, **values, bits=self.bits, rng=rng)
        condition = {**self.condition, "ratio": values["ratio"]}
        return to_sample({"lq": lq, "gt": gt}, {"lq": path, "gt": path}, self.names[index], condition)
