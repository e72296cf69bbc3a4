"""BIR-D: an image and its unknown degradation together, from a diffusion prior (Tu et al., 2024).

Paper: Taming Generative Diffusion Prior for Universal Blind Image Restoration, https://arxiv.org/abs/2408.11287

A solver is a prior, a data step and a kernel step in a reverse process; a preset names a choice of them:

    settings, task = preset("default"), TASKS["blind"]
    result = Solver(prior, [(y, task.degradation(y, settings))], settings, noise).run()
    result.image, result.observations[0].degradation.kernel
"""

from __future__ import annotations

import math
from typing import Callable, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.nn.functional as F

from ucdir_plugin.diffusion import tiling
from ucdir_plugin.diffusion.bird import data_steps
from ucdir_plugin.diffusion.bird.data_steps import AdaptiveScale, Level, Observation
from ucdir_plugin.diffusion.bird.degradation import Degradation, start_kernel
from ucdir_plugin.diffusion.bird.records import Result, StepRecord, Trace
from ucdir_plugin.diffusion.bird.settings import Settings
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.diffusion.samplers import clamp_finite
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.utils.errors import UserError, at_least_one

Noise = Callable[..., torch.Tensor]
"""(shape, draw, further parts of the key) -> standard normal noise, as of ``sampling.image_noise``."""


def log_sigma_schedule(start: float, end: float, steps: int) -> NoiseSchedule:
    """Levels of noise equally spaced in log(sigma), sigma of x_t / sqrt(alpha_bar) on the scale of [0, 1].

    Raises:
        UserError: unless start > end > 0, or start = end and one step; for levels beyond those of a schedule.
    """
    at_least_one(steps=steps)
    if steps > 100_000:
        raise UserError(f"steps: {steps} passes of the prior are asked for; take at most 100000")
    if not (start > end > 0 or (start == end > 0 and steps == 1)):
        raise UserError(
            f"the noise must fall: sigma_start {start:.4g} must be above sigma_end {end:.4g}, and that above 0"
        )
    sigma = np.exp(np.linspace(math.log(end), math.log(start), steps)) if steps > 1 else np.array([start])
    alpha_bar = 1 / (1 + 4 * sigma**2)
    try:
        return NoiseSchedule.from_alpha_bar(alpha_bar)
    except ValueError as err:
        raise UserError(f"sigma_start {start:.4g} to sigma_end {end:.4g}: {err}") from err


def reverse_schedule(prior: Prior, settings: Settings) -> NoiseSchedule:
    """The levels that a reverse process goes through.

    Raises:
        UserError: for more noise, or more steps, than the prior knows.
    """
    known = prior.schedule
    if settings.start == "noise" and not prior.generates:
        raise UserError(
            f"this prior knows noise up to sigma {prior.sigma_max:.3g} only and cannot start from pure noise:"
            " set start to warm, or take a diffusion network"
        )
    most = prior.sigma_max
    start = settings.sigma_start
    if start is not None and start > most * (1 + 1e-6):
        raise UserError(f"sigma_start {start:.4g} is more than the prior's {most:.4g}: take less")
    if start is None:
        start = most if settings.start == "noise" else min(most, 75 / 255)
    if settings.levels == "log_sigma":
        return log_sigma_schedule(start, settings.sigma_end, settings.steps)
    sigmas = (1 / known.alpha_bar - 1) ** 0.5 / 2
    within = max(1, int(np.searchsorted(sigmas, start * (1 + 1e-6), "right")))
    if settings.steps > within:
        raise UserError(f"steps {settings.steps} is more than the prior's {within} levels up to sigma {start:.3g}")
    return known.truncate(within).respace(settings.steps, settings.levels)


class Solver:
    """One batch of scenes at work.

    Args:
        prior: of images.
        observed: y (B, c, h, w) in [-1, 1] and its degradation, for each observation of the scenes.
        settings: see :class:`Settings`.
        noise: all the randomness: draw 0 starts, draw k is of the k-th step.
        tile, overlap, tile_batch, merge: patches for the prior, as of ``tiling``, where the image is larger than
            ``tile``; everything else sees all of it. Default: the prior's ``size``, else whole.
        names: of the images, for messages.
        start: a guess at the images, (B, C, H, W) in [-1, 1], to start from instead of y.
        progress: called after each network call with the pixels that it computed.

    Raises:
        UserError: if something does not fit: channels, sizes, a constant y, more noise than the prior knows.
    """

    def __init__(
        self,
        prior: Prior,
        observed: Sequence[Tuple[torch.Tensor, Degradation]],
        settings: Settings,
        noise: Noise,
        *,
        tile: Optional[int] = None,
        overlap: int = 0,
        tile_batch: int = 1,
        merge: str = "drop",
        names: Optional[Sequence[str]] = None,
        start: Optional[torch.Tensor] = None,
        progress: Optional[Callable[[int], None]] = None,
    ):
        if not observed:
            raise UserError("there is no observation: give at least one y")
        self.prior, self.settings, self.noise, self.progress = prior, settings, noise, progress
        self.names = list(names) if names is not None else [str(i) for i in range(len(observed[0][0]))]
        self.border = observed[0][1].border
        flat = [y.flatten(1) for y, _ in observed]
        constant = torch.stack([y.amax(1) == y.amin(1) for y in flat]).all(0)  # in all observations
        for name, lost in zip(self.names, constant.tolist()):
            if lost:
                raise UserError(f"{name}: all pixels are equal, there is nothing to restore")
        self.observations = [self._observation(y, degradation) for y, degradation in observed]
        shapes = {tuple(o.guess.shape) for o in self.observations}
        if len(shapes) > 1:
            sizes = " and ".join(f"{s[-1]}x{s[-2]}" for s in sorted(shapes))
            raise UserError(f"observations of one scene must have one size, these give scenes of {sizes}")
        self.guess = self._joined()
        if start is not None:
            self.guess = self._enlarge(start)
            if self.guess.shape != self.observations[0].guess.shape:
                raise UserError(
                    f"the start is {tuple(start.shape)}, the scene {tuple(self.guess.shape)}: sizes must agree"
                )
        for number, observation in enumerate(self.observations):
            settings.kernel.check((self.guess + 1) / 2, observation.degradation)
            self._check_fit(number, observation)
        self.schedule = reverse_schedule(prior, settings)
        self.previous: Optional[torch.Tensor] = None
        self.failed: List[Optional[str]] = [None] * len(self.guess)
        self.denoise = self._tiled(tile, overlap, tile_batch, merge)

    def _observation(self, y: torch.Tensor, degradation: Degradation) -> Observation:
        if len(degradation.kernel) != len(y):
            raise ValueError(f"{len(degradation.kernel)} kernels for {len(y)} images")
        if degradation.kernel.shape[1] != self.prior.channels:
            raise UserError(f"the prior has {self.prior.channels} channels, the kernel {degradation.kernel.shape[1]}")
        if degradation.border != self.border:
            raise UserError("observations of one scene need kernels of one size with padding valid")
        guess = degradation.operator.lift((y + 1) / 2, self.prior.channels) * 2 - 1
        if guess.shape[1] != self.prior.channels:
            raise UserError(f"the prior is for {self.prior.channels} channels, y has {y.shape[1]}")
        return Observation(y, degradation, self._enlarge(guess))

    def _brightened(self, observation: Observation) -> torch.Tensor:
        """The guess without the gain of the kernel, where that is not 1."""
        gain = observation.degradation.kernel.sum((2, 3, 4)).mean(1).view(-1, 1, 1, 1)
        if self.settings.start == "noise" or bool((gain - 1).abs().max() < 1e-3):
            return observation.guess
        return ((observation.guess + 1) / gain.clamp(min=1e-3) - 1).clamp(-1, 1)

    def _joined(self) -> torch.Tensor:
        """A guess at the scene from all observations, each the more the brighter it is, as its noise matters less."""
        if len(self.observations) == 1:
            return self._brightened(self.observations[0])
        total = weights = 0
        for o in self.observations:
            weight = o.degradation.kernel.sum((2, 3, 4)).mean(1).square().view(-1, 1, 1, 1)
            seen = o.degradation.operator.observed(o.y)
            if seen is not None and seen.shape[-2:] == o.y.shape[-2:]:
                weight = weight * self._enlarge(seen.expand(len(o.y), 1, *seen.shape[-2:]).clamp(min=1e-6))
            total, weights = total + weight * self._brightened(o), weights + weight
        return total / weights

    def _enlarge(self, image: torch.Tensor) -> torch.Tensor:
        border = self.border
        if not border:
            return image
        mode = "reflect" if border < min(image.shape[-2:]) else "replicate"
        return F.pad(image, (border,) * 4, mode=mode)

    def _crop(self, image: torch.Tensor) -> torch.Tensor:
        border = self.border
        return image[..., border : image.shape[-2] - border, border : image.shape[-1] - border]

    def _check_fit(self, number: int, observation: Observation) -> None:
        seen = observation.degradation((self.guess + 1) / 2)
        if seen.shape != observation.y.shape:
            raise UserError(
                f"observation {number} has {tuple(observation.y.shape[1:])} values, its degradation gives"
                f" {tuple(seen.shape[1:])}: channels or size do not fit the task"
            )

    def _tiled(self, tile: Optional[int], overlap: int, tile_batch: int, merge: str):
        height, width = self.guess.shape[-2:]
        tile = self.prior.size if tile is None else tile

        def call(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
            out = self.prior(x, level)
            if self.progress is not None:
                self.progress(len(x) * x.shape[-2] * x.shape[-1])
            return out

        if tile is None or max(height, width) <= tile:
            return call
        grid = tiling.Grid.aligned(height, width, tile, overlap, self.prior.stride)
        return tiling.split(call, grid, tile_batch=tile_batch, merge=merge)

    @torch.no_grad()
    def predict(self, x_t: torch.Tensor, t: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        """The prior's x_0 and, if it has learned it, v: (B, C, H, W) each."""
        alpha_bar = float(self.schedule.alpha_bar[t])
        out = self.denoise(x_t, x_t.new_full((len(x_t),), alpha_bar**0.5))
        eps, v = out[:, : self.prior.channels], out[:, self.prior.channels :]
        x0 = x_t / alpha_bar**0.5 - (1 / alpha_bar - 1) ** 0.5 * eps
        return (clamp_finite(x0, -1, 1) if self.settings.clip_x0 else x0), (v if self.prior.learned_variance else None)

    def log_variance(self, x_t: torch.Tensor, v: Optional[torch.Tensor], t: int) -> torch.Tensor:
        """Log-variance of x_{t-1}: f log(beta) + (1 - f) log(beta~) with f = (v + 1) / 2; log(beta~) without v."""
        schedule = self.schedule
        floor = schedule.posterior_variance[1] if len(schedule) > 1 else schedule.betas[0]
        low = math.log(schedule.posterior_variance[t] if t else floor)  # that of t = 0 is none
        if v is None or self.settings.variance == "posterior":
            return torch.full_like(x_t, low)
        part = (v + 1) / 2
        return part * math.log(schedule.betas[t]) + (1 - part) * low

    def first(self) -> torch.Tensor:
        """The state that the process starts from."""
        noise = self.noise(self.guess.shape, 0).to(self.guess)
        if self.settings.start == "noise":
            return noise
        alpha_bar = float(self.schedule.alpha_bar[-1])
        return alpha_bar**0.5 * self.guess + (1 - alpha_bar) ** 0.5 * noise

    @torch.no_grad()
    def step(self, number: int, x_t: torch.Tensor, t: int) -> StepRecord:
        """One step of the reverse process, from x_t at level t.

        Args:
            number: from 0; the key of its noise.
            x_t: (B, C, H, W).
            t: index into ``schedule``.
        """
        settings, schedule = self.settings, self.schedule
        alpha_bar, alpha_bar_prev = float(schedule.alpha_bar[t]), float(schedule.alpha_bar_prev[t])
        c1, c2 = float(schedule.posterior_mean_coef1[t]), float(schedule.posterior_mean_coef2[t])
        level = Level((1 / alpha_bar - 1) ** 0.5 / 2, c1, len(schedule))
        x0, v = self.predict(x_t, t)
        fresh = settings.transition == "fresh"
        adaptive = isinstance(settings.data, data_steps.Gradient) and isinstance(settings.data.scale, AdaptiveScale)
        log_variance = None if fresh and not adaptive else self.log_variance(x_t, v, t)
        unguided = None if fresh and not adaptive else c1 * x0 + c2 * x_t
        self._aim(number, x_t, alpha_bar, adaptive, log_variance)
        error = settings.data.error(level.sigma) if isinstance(settings.data, data_steps.Proximal) else level.sigma
        for _ in range(settings.inner):
            data_step = settings.data(x0, self.observations, level)
            image = ((x0 if settings.simultaneous else data_step.x0) + 1) / 2
            for o in self.observations:
                o.degradation = settings.kernel(image, o.targets, o.degradation, level.sigma, error)
        mean, spread = data_step.x0, 0.0
        if fresh:
            if t:
                mean, spread = alpha_bar_prev**0.5 * data_step.x0, (1 - alpha_bar_prev) ** 0.5
        elif settings.transition == "ancestral":
            mean = c1 * data_step.x0 + c2 * x_t
            spread = (log_variance / 2).exp()
        else:
            variance = settings.eta**2 * float(schedule.posterior_variance[t])
            from_x = ((1 - alpha_bar_prev - variance) / (1 - alpha_bar)) ** 0.5
            mean = (alpha_bar_prev**0.5 - from_x * alpha_bar**0.5) * data_step.x0 + from_x * x_t
            spread = variance**0.5
        x_prev = mean
        if t and (isinstance(spread, torch.Tensor) or spread):
            x_prev = mean + spread * self.noise(x_t.shape, number + 1).to(mean)
        terms = []
        if adaptive:
            rule = settings.data.scale
            for o, shift in zip(self.observations, data_step.shift):
                last = self.previous
                terms.append(
                    rule.update(
                        o, shift[-1], x_t, mean, x_prev, rule.log_variance(log_variance), rule.log_variance(last)
                    )
                )
            self.previous = log_variance
        return StepRecord(number, t, x_t, x0, unguided, log_variance, data_step, mean, x_prev, terms)

    def _aim(
        self, number: int, x_t: torch.Tensor, alpha_bar: float, adaptive: bool, log_variance: Optional[torch.Tensor]
    ) -> None:
        """Targets of this step, and what the adaptive scale needs of a step before the first."""
        for index, o in enumerate(self.observations):
            o.targets = [(o.y + 1) / 2]
            if self.settings.noise_target:
                key = (index,) if index else ()
                drawn = (
                    self.noise(o.y.shape, number + 1, "target", p, *key).to(o.y) for p in range(self.settings.passes)
                )
                o.targets = [(alpha_bar**0.5 * o.y + (1 - alpha_bar) ** 0.5 * n + 1) / 2 for n in drawn]
        if not adaptive:
            return
        rule = self.settings.data.scale
        if self.previous is None:
            ones = rule.first_previous == "ones"
            self.previous = torch.ones_like(log_variance) if ones else log_variance
        if rule.initial is None:
            for o in self.observations:
                if o.numerator is None:  # mu = x_T
                    density = data_steps.log_density(o.guess - x_t, rule.log_variance(log_variance))
                    o.numerator = 2 * density

    @torch.no_grad()
    def run(self, callback: Optional[Callable[[StepRecord], None]] = None) -> Result:
        """All steps, unless every image has failed before.

        Args:
            callback: called after each step.
        """
        x, trace = self.first(), Trace()
        for number, t in enumerate(reversed(range(len(self.schedule)))):
            done = self.step(number, x, t)
            x = self._finite(done)
            self._record(trace, done)
            if callback is not None:
                callback(done)
            if None not in self.failed:
                break
        return self._result(x, trace)

    def _result(self, x: torch.Tensor, trace: Trace) -> Result:
        image = self._crop(x)
        whole = [o.degradation.shown((x + 1) / 2) * 2 - 1 for o in self.observations]
        lost = torch.tensor([f is not None for f in self.failed], device=x.device).view(-1, 1, 1, 1)
        nan = image.new_tensor(float("nan"))
        return Result(torch.where(lost, nan, image), self.observations, whole, trace, list(self.failed))

    def _finite(self, done: StepRecord) -> torch.Tensor:
        """The new state; an image that has lost its numbers is given up, and goes on as its guess, harmlessly."""
        named = {
            "the prior's prediction": done.x0.isfinite().flatten(1).all(1),
            "the image": done.x_prev.isfinite().flatten(1).all(1),
        }
        for guided_loss, o in zip(done.data_step.loss, self.observations):
            named["the loss"] = named.get("the loss", True) & guided_loss.isfinite().all(0)
            named["the kernel"] = named.get("the kernel", True) & o.degradation.kernel.isfinite().flatten(1).all(1)
            if o.scale is not None:
                named["the guidance scale"] = named.get("the guidance scale", True) & o.scale.isfinite()
        for what in ("the prior's prediction", "the guidance scale", "the loss", "the kernel", "the image"):
            for i, good in enumerate(named[what].tolist() if what in named else []):
                if not good and self.failed[i] is None:
                    self.failed[i] = f"{self.names[i]}: {what} turned non-finite in step {done.number + 1}"
        fine = torch.stack(list(named.values())).all(0)
        if bool(fine.all()):
            return done.x_prev
        start = start_kernel(1, self.observations[0].degradation.size).to(done.x_prev)
        for o in self.observations:
            kernels = o.degradation.kernel
            harmless = start[:, :1].expand_as(kernels) if kernels.shape[2] == 1 else torch.zeros_like(kernels)
            mask = o.degradation.mask
            if mask is not None:
                mask = torch.where(fine.view(-1, 1, 1, 1), mask, torch.zeros_like(mask))
            o.degradation = o.degradation.learned(torch.where(fine.view(-1, 1, 1, 1, 1), kernels, harmless), mask)
            for name in ("scale", "numerator"):
                value = getattr(o, name)
                if value is not None:
                    setattr(o, name, torch.where(fine, value, torch.zeros_like(value)))
        if self.previous is not None:
            self.previous = torch.where(fine.view(-1, 1, 1, 1), self.previous, torch.ones_like(self.previous))
        return torch.where(fine.view(-1, 1, 1, 1), done.x_prev, self.guess)

    def _record(self, trace: Trace, done: StepRecord) -> None:
        trace.sigma.append(float((1 / self.schedule.alpha_bar[done.t] - 1) ** 0.5 / 2))
        trace.loss.append(torch.stack([loss.mean(0) for loss in done.data_step.loss]).cpu())
        nothing = torch.full((len(done.x0),), float("nan"))
        scales = done.data_step.scale or [nothing] * len(self.observations)
        trace.scale.append(torch.stack([s.cpu() for s in scales]))
        masks = [o.degradation.mask for o in self.observations]
        means = [torch.zeros(len(done.x0)) if m is None else m.flatten(1).mean(1).cpu() for m in masks]
        trace.mask_mean.append(torch.stack(means))
        trace.kernel.append([o.degradation.kernel.cpu() for o in self.observations])
