"""Settings of BIR-D's solver: its presets, and the ablations of the paper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, Literal, Optional, Union

from ucdir_plugin.diffusion.bird import data_steps, kernel_steps
from ucdir_plugin.diffusion.bird.data_steps import AdaptiveScale, FixedScale
from ucdir_plugin.diffusion.bird.degradation import Padding
from ucdir_plugin.utils.errors import UserError, at_least_one


@dataclass(frozen=True)
class Settings:
    """A reverse process and its steps.

    Attributes:
        data: how x_0 follows from y.
        kernel: how K and M do.
        steps: of the reverse process, one network call each.
        levels: ``log_sigma``, noise equally spaced in log(sigma) from ``sigma_start`` to ``sigma_end``; or some of the
            prior's own levels, spaced as in :meth:`NoiseSchedule.respace`.
        sigma_start: noise of the first level, of x_t / sqrt(alpha_bar) on the scale of [0, 1]. Default: 75 / 255, or
            all that the prior knows with ``start: noise``.
        sigma_end: noise of the last level with ``log_sigma``.
        start: ``warm``, y noised to the first level, or pure ``noise``.
        transition: ``fresh``, x_{t-1} of x_0 and entirely new noise (DiffPIR with zeta 1); ``ancestral``, of
            q(x_{t-1} | x_t, x_0) (DDPM); ``ddim``, with eps re-derived from the guided x_0.
        eta: of ddim: 0 deterministic, 1 as ancestral with the posterior variance.
        variance: of ancestral: ``learned`` by the network where it has, or ``posterior``.
        inner: data and kernel steps for each network call.
        simultaneous: the kernel step sees x_0 as it was before the data step.
        clip_x0: clamp the prior's x_0 to [-1, 1].
        noise_target: compare with y noised as x_t (3 of the 4 released scripts) instead of y itself (paper).
        passes: with ``noise_target``, how often in a step, each with its own noise, the mean of which counts.
        kernel_size, kernel_start: see :func:`start_kernel`; the size is the task's if None.
        mask_start: ``zero``, or ``random``, uniform in [0, 1e-4) as in the released low-light script.
        mask_always: M is of every task (Algorithm 1), and not only of those that have one.
        padding: of the convolution; ``valid`` makes x larger than y by k // 2 on each side, and crops it at the end.
    """

    data: Union[data_steps.Proximal, data_steps.Gradient] = data_steps.Proximal()  # noqa: RUF009  (frozen)
    kernel: Union[kernel_steps.LeastSquares, kernel_steps.Gradient, kernel_steps.Fixed] = kernel_steps.LeastSquares()  # noqa: RUF009
    steps: int = 16
    levels: Literal["log_sigma", "uniform", "trailing", "quadratic"] = "log_sigma"
    sigma_start: Optional[float] = None
    sigma_end: float = 0.01
    start: Literal["warm", "noise"] = "warm"
    transition: Literal["fresh", "ancestral", "ddim"] = "fresh"
    eta: float = 0.0
    variance: Literal["learned", "posterior"] = "learned"
    inner: int = 3
    simultaneous: bool = False
    clip_x0: bool = True
    noise_target: bool = False
    passes: int = 1
    kernel_size: Optional[int] = None
    kernel_start: Literal["delta", "gaussian", "edges", "random"] = "delta"
    mask_start: Literal["zero", "random"] = "zero"
    mask_always: bool = False
    padding: Padding = "valid"

    def __post_init__(self) -> None:
        at_least_one(steps=self.steps, inner=self.inner, passes=self.passes)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta must be between 0 and 1, got {self.eta}")
        if self.passes > 1 and not self.noise_target:
            raise UserError("passes differ only in the noise of their targets: set noise_target, or passes to 1")
        if not self.simultaneous or self.inner == 1:
            return
        raise UserError("simultaneous steps cannot be repeated: set inner to 1")

    def known(self) -> Settings:
        """The settings for a known operator: K is not learned, and its error is none."""
        data = self.data
        if isinstance(data, data_steps.Proximal):
            data = replace(data, kernel_error=0.0)
        return replace(self, data=data, kernel=kernel_steps.Fixed(), inner=1)


_REVERSE = {"levels": "uniform", "start": "noise", "transition": "ancestral", "inner": 1, "simultaneous": True}

PRESETS: Dict[str, Settings] = {
    # What measured best: proximal data step, least squares with the posterior covariance, fresh noise, warm start.
    "default": Settings(),
    # The paper's gradient guidance with its open points mended: among them, fewer steps guide as much as 1000, and
    # nothing is learned of an x_0 that is no image yet.
    "guided": Settings(
        data=data_steps.Gradient(AdaptiveScale(reference_steps=1000)),
        kernel=kernel_steps.Gradient(mask_rate=0.05, below=1.0),
        steps=250,
        kernel_start="edges",
        padding="reflect",
        **_REVERSE,
    ),
    # Algorithm 1, in standard DDPM symbols: K and a mask for each task, both random at first.
    "paper": Settings(
        data=data_steps.Gradient(AdaptiveScale(initial=None, denominator="x0", absolute=False, cap=None)),
        kernel=kernel_steps.Gradient(rate=0.01, mask_rate=0.01, mask_per_pixel=False, simplex=False),
        steps=1000,
        variance="posterior",
        clip_x0=False,
        kernel_start="random",
        mask_start="random",
        mask_always=True,
        padding="zeros",
        **_REVERSE,
    ),
    # The deblurring script as it was released: its first step ascends.
    "released": Settings(
        data=data_steps.Gradient(AdaptiveScale(initial=-3000.0, min_log_variance=0.0, first_previous="ones", cap=None)),
        kernel=kernel_steps.Gradient(rate=0.01, simplex=False),
        steps=1000,
        noise_target=True,
        passes=4,
        kernel_start="edges",
        mask_start="random",
        padding="zeros",
        **_REVERSE,
    ),
    # Generative Diffusion Prior (arXiv 2304.01247): the operator known, the scale fixed.
    "gdp": Settings(
        data=data_steps.Gradient(FixedScale(6000.0)),
        kernel=kernel_steps.Fixed(),
        steps=1000,
        padding="zeros",
        **_REVERSE,
    ),
}


ABOUT: Dict[str, str] = {
    "default": "a plug-and-play diffusion loop with a proximal data step and a kernel step by least squares; beyond the"
    " paper, whose own way is guided",
    "guided": "the paper's gradient guidance with its adaptive scale, its open points mended",
    "paper": "Algorithm 1 of the paper to the letter; tried here, all results were worse than the input (docs/bird.md)",
    "released": "the released scripts, bug for bug; tried here, all results were worse than the input (docs/bird.md)",
    "gdp": "Generative Diffusion Prior (arXiv 2304.01247): the operator is known, the scale fixed",
}
"""What each preset is, for its user."""


def ablation(settings: Settings, model: Literal["A", "B", "C", "D"]) -> Settings:
    """Models of Table 5: A neither learns K nor adapts s, B adapts s, C learns K, D does both (BIR-D).

    Args:
        settings: with gradient guidance, such as the preset ``guided``.

    Raises:
        UserError: for another model, or settings without a guidance scale.
    """
    if model not in ("A", "B", "C", "D"):
        raise UserError(f"ablation model {model!r} is not known: take A, B, C or D")
    if not isinstance(settings.data, data_steps.Gradient) or not settings.kernel.learns:
        raise UserError(
            "the ablation models are of gradient guidance with a learned kernel: take the preset guided or paper"
        )
    fixed_scale = isinstance(settings.data.scale, AdaptiveScale) and model in "AC"
    if fixed_scale:
        settings = replace(settings, data=replace(settings.data, scale=FixedScale()))
    return replace(settings, kernel=kernel_steps.Fixed()) if model in "AB" else settings
