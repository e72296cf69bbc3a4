"""The metrics of option files as one metric of MMEngine."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from mmengine.evaluator import BaseMetric, Evaluator

from ucdir_plugin.compat import tensor2img
from ucdir_plugin.evaluation.measure import Evaluation
from ucdir_plugin.evaluation.tables import Results
from ucdir_plugin.options.calls import check_metric
from ucdir_plugin.registry import EVALUATORS, METRICS

_STAGES = {"lq": "input", "initial": "initial", "output": "restored"}


@METRICS.register_module()
class RestorationMetrics(BaseMetric):
    """``val_evaluator = dict(type="ucdir_plugin.RestorationMetrics", metrics=dict(loe=dict(type="calculate_loe")))``.

    A data sample is a mapping with ``key`` (unique name), ``output``, and where they are known ``gt``, ``lq`` and
    ``initial``: (C, H, W) or (1, C, H, W) RGB in [0, 1]. FID and KID are of all images of all processes.

    Args:
        metrics: name -> ``{type: registered name, keyword arguments}``, as ``val: metrics:`` of an option file.
        weights_dir: where weights are looked for first.
        collect_device, prefix: as in MMEngine.

    After an evaluation, the attribute ``measured`` has all numbers with their protocols (main process only).

    Raises:
        UserError: for unknown metrics or arguments.
    """

    def __init__(
        self,
        metrics: Dict[str, Dict[str, Any]],
        weights_dir: Optional[str] = None,
        collect_device: str = "cpu",
        prefix: Optional[str] = "restoration",
    ):
        super().__init__(collect_device=collect_device, prefix=prefix)
        for name, cfg in metrics.items():
            check_metric(cfg, f"metrics:{name}")
        self._evaluation = Evaluation(metrics, weights_dir)
        self.measured = None

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:
        """Measure a batch; what is needed of it later is kept, its images are not."""
        for sample in data_samples:
            images = {
                name: tensor2img([torch.as_tensor(sample[name])])
                for name in (*_STAGES, "gt")
                if sample.get(name) is not None
            }
            part = self._evaluation.empty()
            stages = {_STAGES[name]: image for name, image in images.items() if name in _STAGES}
            part.add(sample["key"], stages, images.get("gt"), images.get("lq"))
            self.results.append(part.share())

    def compute_metrics(self, results: List[Dict[str, Any]]) -> Dict[str, float]:
        """Means, FID and KID of the results under their names; of the other stages as ``input/NAME``."""
        whole = self._evaluation.empty()
        whole.merge(results)
        self.measured = whole.results()
        return flat(self.measured)


@EVALUATORS.register_module(name="RestorationMetrics")
class RestorationEvaluator(Evaluator):
    """:class:`RestorationMetrics` alone as an evaluator: MMEngine takes a mapping that has ``metrics`` for one.

    Args:
        metrics, more: those of :class:`RestorationMetrics`.
    """

    def __init__(self, metrics: Dict[str, Dict[str, Any]], **more: Any):
        super().__init__(RestorationMetrics(metrics, **more))


def flat(results: Results) -> Dict[str, float]:
    """Means, FID and KID under their names; of other stages than the result as ``input/NAME``."""
    return {
        name if stage == "restored" else f"{stage}/{name}": value
        for stage, values in results.summary().items()
        for name, value in values.items()
        if value is not None
    }
