"""What a run of BIR-D's solver records: each step, the whole trace, and the result."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import List, Optional

import torch

from ucdir_plugin.diffusion.bird import data_steps
from ucdir_plugin.diffusion.bird.data_steps import Observation


@dataclass
class StepRecord:
    """What one step did; tensors are (B, ...) in [-1, 1], and valid until the next step.

    Attributes:
        number: from 0.
        t: index of the level.
        x_t, x0: state, and the prior's estimate of x_0.
        mean_unguided, log_variance: of x_{t-1} by the prior alone; only for ancestral and ddim.
        data_step: what the data step did (the last one).
        mean: of x_{t-1}.
        x_prev: the new state.
        terms: of the adaptive scale, for each observation; without it empty.
    """

    number: int
    t: int
    x_t: torch.Tensor
    x0: torch.Tensor
    mean_unguided: Optional[torch.Tensor]
    log_variance: Optional[torch.Tensor]
    data_step: data_steps.DataStep
    mean: torch.Tensor
    x_prev: torch.Tensor
    terms: List[dict]


@dataclass
class Trace:
    """What was learned, step by step, on the CPU: lists with an entry for each step (paper, figures 11 and 12).

    Attributes:
        sigma: noise level on the scale of [0, 1].
        loss, scale, mask_mean: (observations, B) each; scale is NaN for data steps without one.
        kernel: for each observation (B, C, 1 or C, k, k).
    """

    sigma: List[float] = field(default_factory=list)
    loss: List[torch.Tensor] = field(default_factory=list)
    scale: List[torch.Tensor] = field(default_factory=list)
    mask_mean: List[torch.Tensor] = field(default_factory=list)
    kernel: List[List[torch.Tensor]] = field(default_factory=list)

    @property
    def kernel_sum(self) -> List[torch.Tensor]:
        """(observations, B, C) for each step: the gain of each channel."""
        return [torch.stack([k.sum((2, 3, 4)) for k in kernels]) for kernels in self.kernel]


@dataclass
class Result:
    """What a solver found.

    Attributes:
        image: (B, C, H, W) in [-1, 1] up to overshoot; NaN where it failed.
        observations: with what was learned of each degradation.
        degraded: D(image) for each observation, like y, in [-1, 1].
        trace: of the steps.
        failed: for each image, why it was given up; None where it was not.
    """

    image: torch.Tensor
    observations: List[Observation]
    degraded: List[torch.Tensor]
    trace: Trace
    failed: List[Optional[str]]
