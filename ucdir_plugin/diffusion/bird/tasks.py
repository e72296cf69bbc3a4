"""What BIR-D is asked to do, and how: tasks, the settings of a solver, and presets of them (Tu et al., 2024).

Paper: Taming Generative Diffusion Prior for Universal Blind Image Restoration, https://arxiv.org/abs/2408.11287
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Dict, List, Literal, Optional, Sequence, Tuple, Union

import torch

from ucdir_plugin.diffusion import guidance, kernel
from ucdir_plugin.diffusion.degradation import (
    BlockMean,
    ChannelMean,
    Compose,
    Degradation,
    HoleMask,
    Operator,
    Padding,
    Unsaturated,
    start_kernel,
)
from ucdir_plugin.diffusion.guidance import AdaptiveScale, FixedScale
from ucdir_plugin.errors import UserError, at_least_one, did_you_mean


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
        padding: of the convolution; ``valid`` makes x larger than y by k // 2 on each side, and crops it at the end.
    """

    data: Union[guidance.Proximal, guidance.Gradient] = guidance.Proximal()  # noqa: RUF009  (frozen)
    kernel: Union[kernel.LeastSquares, kernel.Gradient, kernel.Fixed] = kernel.LeastSquares()  # noqa: RUF009
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
        """The same for a known operator: K is not learned, and its error is none."""
        data = self.data
        if isinstance(data, guidance.Proximal):
            data = replace(data, kernel_error=0.0)
        return replace(self, data=data, kernel=kernel.Fixed(), inner=1)


_REVERSE = {"levels": "uniform", "start": "noise", "transition": "ancestral", "inner": 1, "simultaneous": True}

PRESETS: Dict[str, Settings] = {
    # What measured best: proximal data step, least squares with the posterior covariance, fresh noise, warm start.
    "default": Settings(),
    # The paper's gradient guidance with its open points mended: among them, fewer steps guide as much as 1000, and
    # nothing is learned of an x_0 that is no image yet.
    "guided": Settings(
        data=guidance.Gradient(AdaptiveScale(reference_steps=1000)),
        kernel=kernel.Gradient(mask_rate=0.05, below=1.0),
        steps=250,
        kernel_start="edges",
        padding="reflect",
        **_REVERSE,
    ),
    # Algorithm 1, in standard DDPM symbols.
    "paper": Settings(
        data=guidance.Gradient(AdaptiveScale(initial=None, denominator="x0", absolute=False, cap=None)),
        kernel=kernel.Gradient(rate=0.01, mask_rate=0.01, mask_per_pixel=False, simplex=False),
        steps=1000,
        variance="posterior",
        clip_x0=False,
        kernel_start="random",
        padding="zeros",
        **_REVERSE,
    ),
    # The deblurring script as it was released: its first step ascends.
    "released": Settings(
        data=guidance.Gradient(AdaptiveScale(initial=-3000.0, min_log_variance=0.0, first_previous="ones", cap=None)),
        kernel=kernel.Gradient(rate=0.01, simplex=False),
        steps=1000,
        noise_target=True,
        passes=4,
        kernel_start="edges",
        padding="zeros",
        **_REVERSE,
    ),
    # Generative Diffusion Prior (arXiv 2304.01247): the operator known, the scale fixed.
    "gdp": Settings(
        data=guidance.Gradient(FixedScale(6000.0)), kernel=kernel.Fixed(), steps=1000, padding="zeros", **_REVERSE
    ),
}

LEAST_SQUARES_SIZE = 15
"""Of a kernel that least squares estimate: a size that is too small for a motion loses most of the gain."""

BLACK = 1e-3
"""Mean brightness, of [0, 1], below which an exposure is black."""

SATURATED = 0.98
"""From here on, of [0, 1], a pixel of an exposure may have been brighter."""

GRAY_WORLD = 0.5
"""Mean brightness that a dark image is supposed to have had, for the gain to start from."""

MASK_SIGMA = 8.0
"""Pixels over which the mask of low light and HDR is smooth."""

GDP_SCALES = {"sr4": 2000.0, "inpaint": 4000.0, "lowlight": 80000.0}
"""Guidance scales of GDP where they are not 6000."""


def preset(name: str, task: Optional[str] = None) -> Settings:
    """A named choice of settings, as it is for a task of :data:`TASKS`.

    Raises:
        UserError: for an unknown preset or task.
    """
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}; {did_you_mean(name, PRESETS)}")
    settings = PRESETS[name]
    if task is None:
        return settings
    found = task_named(task)
    if name == "released":
        if task == "lowlight":
            still = replace(settings.kernel, rate=1.0, mask_rate=1.0, mask_per_pixel=False)
            data = guidance.Gradient(FixedScale(62000.0))
            settings = replace(settings, data=data, kernel=still, noise_target=False, passes=1)
            return replace(settings, kernel_size=3, kernel_start="random")
        if task == "multi":
            return replace(settings, data=guidance.Gradient(FixedScale(4500.0)))
    if name == "gdp":
        colour = 1.0 if task == "colorize" else 0.0
        settings = replace(settings, data=guidance.Gradient(FixedScale(GDP_SCALES.get(task, 6000.0)), colour))
        if task == "lowlight":
            gain = kernel.Gradient(rate=1.0, mask_rate=1.0, mask_per_pixel=False, simplex=False)
            settings = replace(settings, kernel=gain, kernel_size=1)
    if name in ("default", "guided") and not found.blind:
        settings = settings.known()
    if name == "guided" and (found.holes or not found.simplex):
        settings = replace(settings, kernel_start="delta")
    if name in ("default", "guided") and not found.simplex:
        below = settings.kernel.below if isinstance(settings.kernel, kernel.Gradient) else None
        step = kernel.Gradient(mask_rate=0.05, mask_sigma=MASK_SIGMA, simplex=False, below=below)
        settings = replace(settings, kernel=step)
    if isinstance(settings.kernel, kernel.LeastSquares):
        settings = replace(settings, kernel_size=LEAST_SQUARES_SIZE)
    return settings


def ablation(settings: Settings, model: Literal["A", "B", "C", "D"]) -> Settings:
    """Models of Table 5: A neither learns K nor adapts s, B adapts s, C learns K, D does both (BIR-D).

    Args:
        settings: with gradient guidance, such as the preset ``guided``.

    Raises:
        UserError: for another model, or settings without a guidance scale.
    """
    if model not in ("A", "B", "C", "D"):
        raise UserError(f"ablation model {model!r} is not known: take A, B, C or D")
    if not isinstance(settings.data, guidance.Gradient) or not settings.kernel.learns:
        raise UserError(
            "the ablation models are of gradient guidance with a learned kernel: take the preset guided or paper"
        )
    fixed_scale = isinstance(settings.data.scale, AdaptiveScale) and model in "AC"
    if fixed_scale:
        settings = replace(settings, data=replace(settings.data, scale=FixedScale()))
    return replace(settings, kernel=kernel.Fixed()) if model in "AB" else settings


@dataclass(frozen=True)
class Task:
    """What is known of a degradation y = A(K * x + M) before y is looked at.

    Attributes:
        blind: K is to be learned by the presets default and guided; the others always learn it.
        kernel_size: of K, where the settings leave it open.
        sigma: of a start that is ``gaussian`` or ``edges``, in pixels.
        simplex: K is a blur; not for low light, where its sum is the gain.
        mask: M is learned.
        factor: of super-resolution.
        gray: A takes the channels' mean.
        holes: A has a hole mask.
        exposures: observations differ in their exposure: pixels at the upper end of the range tell nothing, but in the
            darkest one.
    """

    blind: bool = True
    kernel_size: int = 9
    sigma: float = 2.0
    simplex: bool = True
    mask: bool = False
    factor: int = 1
    gray: bool = False
    holes: bool = False
    exposures: bool = False

    def operator(self, known: Optional[torch.Tensor] = None) -> Operator:
        """A.

        Args:
            known: (1 or B, 1, H, W) of 0 and 1, for ``holes``.

        Raises:
            UserError: if a mask is missing, or means nothing here.
        """
        if self.holes == (known is None):
            raise UserError("this task needs a hole mask" if self.holes else "only inpainting takes a hole mask")
        parts = [BlockMean(self.factor)] if self.factor > 1 else []
        parts += [ChannelMean()] if self.gray else []
        parts += [HoleMask(known)] if known is not None else []
        return parts[0] if len(parts) == 1 else Compose(parts) if parts else Operator()

    def degradation(
        self,
        y: torch.Tensor,
        settings: Settings,
        known: Optional[torch.Tensor] = None,
        channels: int = 3,
        key: Tuple = (0,),
    ) -> Degradation:
        """The degradation to start from, for y (B, c, h, w) in [-1, 1].

        The sum of K is 1, except where it is the gain (not ``simplex``): there it is as drawn for a ``random`` start,
        and makes the scene's mean 0.5 for the others, as K = 1 and x = y would agree already.
        """
        size = settings.kernel_size or self.kernel_size
        total = None if settings.kernel_start == "random" and not self.simplex else 1.0
        start = start_kernel(
            len(y), size, settings.kernel_start, channels=channels, sigma=self.sigma, total=total, key=key
        ).to(y.device)
        if not self.simplex and total is not None:
            gain = (y.flatten(1).mean(1) + 1) / 2 / GRAY_WORLD
            start = start * gain.clamp(0.02, 1).view(-1, 1, 1, 1, 1)
        operator = self.operator(known)
        size = (y.shape[-2] * operator.shrinks, y.shape[-1] * operator.shrinks)
        mask = y.new_zeros(len(y), 1, *size) if self.mask else None
        return Degradation(start, mask, operator, settings.padding)

    def degradations(
        self,
        observed: Sequence[torch.Tensor],
        settings: Settings,
        known: Optional[torch.Tensor] = None,
        channels: int = 3,
        key: Tuple = (0,),
    ) -> List[Degradation]:
        """:meth:`degradation` of all observations of a scene; those of ``exposures`` are seen together."""
        found = [self.degradation(y, settings, known, channels, (*key, i)) for i, y in enumerate(observed)]
        if not self.exposures or len(found) == 1 or settings.kernel_start == "random":
            return found
        images = [(y + 1) / 2 for y in observed]
        gains, told = exposure_gains(images), unsaturated(images)
        found = [
            replace(d, kernel=d.kernel / d.kernel.sum((3, 4), keepdim=True) * gain.view(-1, 1, 1, 1, 1), operator=op)
            for d, gain, op in zip(found, gains, map(Unsaturated, told))
        ]
        return found


def unsaturated(images: Sequence[torch.Tensor]) -> List[torch.Tensor]:
    """Which pixels of exposures (B, C, H, W) in [0, 1] are below the upper end of the range, (B, 1, H, W) each.

    Of the darkest exposure of each scene, but black ones, all are taken: no other knows more.
    """
    brightness = torch.stack([image.flatten(1).mean(1) for image in images])
    darkest = torch.where(brightness < BLACK, float("inf"), brightness).argmin(0)
    found = []
    for number, image in enumerate(images):
        below = image.amax(1, keepdim=True) < SATURATED
        found.append((below | (darkest == number).view(-1, 1, 1, 1)).float())
    return found


def exposure_gains(images: Sequence[torch.Tensor]) -> torch.Tensor:
    """How bright each exposure is, beside a scene that is as bright as the one nearest to middle gray.

    Exposures that are neighbours in brightness are compared (least squares), where neither is near an end of the range.
    A scene of which more than 1 % would be too bright for [0, 1] is darker then, to at most half.

    Args:
        images: (B, C, H, W) in [0, 1], of one scene each.

    Returns:
        (O, B)
    """
    count, batch = len(images), len(images[0])
    gains = torch.ones(count, batch, dtype=torch.float64)
    for b in range(batch):
        one = [image[b].double().cpu() for image in images]
        order = sorted(range(count), key=lambda i: float(one[i].mean()))
        black = [i for i in order if float(one[i].mean()) < BLACK]
        order = order[len(black) :] or order
        for dark, bright in zip(order, order[1:]):
            both = (one[dark] > 0.02) & (one[bright] < 0.95)
            if int(both.sum()) < 16:
                both = torch.ones_like(both)
            x, y = one[dark][both], one[bright][both]
            gains[bright, b] = gains[dark, b] * float((x * y).sum() / (x * x).sum().clamp(min=1e-12))
        middle = min(order, key=lambda i: abs(float(one[i].mean()) - GRAY_WORLD))
        gains[:, b] = gains[:, b] / gains[middle, b]
        darkest = one[order[0]].amax(0) / gains[order[0], b]
        highlight = float(darkest.flatten().kthvalue(max(1, round(0.99 * darkest.numel()))).values)
        gains[:, b] *= min(max(highlight, 1.0), 2.0)
        if len(black) < count:
            gains[black, b] = 1e-3 * gains[order[0], b]  # they tell nothing
    return gains.to(images[0])


TASKS: Dict[str, Task] = {
    "blind": Task(),
    "deblur": Task(),
    "motion": Task(),
    "sr4": Task(blind=False, factor=4),
    "inpaint": Task(blind=False, holes=True),
    "colorize": Task(blind=False, gray=True),
    "lowlight": Task(kernel_size=5, simplex=False, mask=True),
    "hdr": Task(kernel_size=5, simplex=False, mask=True, exposures=True),
    "multi": Task(gray=True),
}


def task_named(name: str) -> Task:
    """
    Raises:
        UserError: for an unknown name.
    """
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]
