"""What BIR-D is asked to do, and how: tasks, the settings of a solver, and presets of them (Tu et al., 2024).

Paper: Taming Generative Diffusion Prior for Universal Blind Image Restoration, https://arxiv.org/abs/2408.11287
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch

from ucdir_plugin.diffusion.bird import data_steps, kernel_steps
from ucdir_plugin.diffusion.bird.data_steps import FixedScale
from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel, start_mask
from ucdir_plugin.diffusion.bird.operators import BlockMean, ChannelMean, Compose, HoleMask, Operator, Unsaturated
from ucdir_plugin.diffusion.bird.settings import PRESETS, Settings
from ucdir_plugin.utils.errors import UserError, did_you_mean

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
    if name == "gdp":
        settings = replace(settings, data=data_steps.Gradient(FixedScale(found.gdp_scale), found.gdp_colour))
    settings = found.adapted.get(name, _as_it_is)(settings)
    if name in ("default", "guided") and not found.blind:
        settings = settings.known()
    if name == "guided" and (found.holes or not found.simplex):
        settings = replace(settings, kernel_start="delta")
    if name in ("default", "guided") and not found.simplex:
        below = settings.kernel.below if isinstance(settings.kernel, kernel_steps.Gradient) else None
        step = kernel_steps.Gradient(mask_rate=0.05, mask_sigma=MASK_SIGMA, simplex=False, below=below)
        settings = replace(settings, kernel=step)
    if isinstance(settings.kernel, kernel_steps.LeastSquares):
        settings = replace(settings, kernel_size=LEAST_SQUARES_SIZE)
    return settings


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
        gdp_scale, gdp_colour: guidance scale, and weight of the colour's loss, of the preset gdp.
        adapted: preset -> what else its settings are for this task.
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
    gdp_scale: float = 6000.0
    gdp_colour: float = 0.0
    adapted: Mapping[str, Callable[[Settings], Settings]] = field(default_factory=dict)

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
        mask = start_mask(len(y), size, settings.mask_start, key).to(y.device)
        mask = mask if self.mask or settings.mask_always else None
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
        gains, below = exposure_gains(images), unsaturated(images)
        found = [
            replace(d, kernel=d.kernel / d.kernel.sum((3, 4), keepdim=True) * gain.view(-1, 1, 1, 1, 1), operator=op)
            for d, gain, op in zip(found, gains, map(Unsaturated, below))
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


def _as_it_is(settings: Settings) -> Settings:
    return settings


def _released_low_light(settings: Settings) -> Settings:
    kernel = replace(settings.kernel, rate=1.0, mask_rate=1.0, mask_per_pixel=False)
    data = data_steps.Gradient(FixedScale(62000.0))
    settings = replace(settings, data=data, kernel=kernel, noise_target=False, passes=1)
    return replace(settings, kernel_size=3, kernel_start="random")


def _released_multi(settings: Settings) -> Settings:
    return replace(settings, data=data_steps.Gradient(FixedScale(4500.0)))


def _gdp_low_light(settings: Settings) -> Settings:
    gain = kernel_steps.Gradient(rate=1.0, mask_rate=1.0, mask_per_pixel=False, simplex=False)
    return replace(settings, kernel=gain, kernel_size=1)


TASKS: Dict[str, Task] = {
    "blind": Task(),
    "deblur": Task(),
    "motion": Task(),
    "sr4": Task(blind=False, factor=4, gdp_scale=2000.0),
    "inpaint": Task(blind=False, holes=True, gdp_scale=4000.0),
    "colorize": Task(blind=False, gray=True, gdp_colour=1.0),
    "lowlight": Task(
        kernel_size=5,
        simplex=False,
        mask=True,
        gdp_scale=80000.0,
        adapted={"released": _released_low_light, "gdp": _gdp_low_light},
    ),
    "hdr": Task(kernel_size=5, simplex=False, mask=True, exposures=True),
    "multi": Task(gray=True, adapted={"released": _released_multi}),
}
"""The tasks by the name that options know them by; another one is another entry."""


def task_named(name: str) -> Task:
    """Look a task up by its name.

    Raises:
        UserError: for an unknown name.
    """
    if name not in TASKS:
        raise UserError(f"there is no task {name!r}; {did_you_mean(name, TASKS)}")
    return TASKS[name]
