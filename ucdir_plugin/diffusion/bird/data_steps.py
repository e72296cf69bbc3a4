"""Data steps of BIR-D: how the estimate of x_0 follows from y. Nothing flows through the network.

Estimates are in [-1, 1], degradations in [0, 1] (degradation.py); D(x_0) stands for D((x_0 + 1) / 2). Losses, scales
and steps are those of each image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import List, Literal, Optional, Sequence, Union

import torch

from ucdir_plugin.diffusion.bird.degradation import Degradation
from ucdir_plugin.utils.errors import UserError, at_least, at_least_one


@dataclass
class Observation:
    """One y of a scene, and what is known and learned of it.

    Attributes:
        y: (B, c, h, w) in [-1, 1].
        degradation: how it came from the scene.
        guess: y on the scene's grid, (B, C, H, W) in [-1, 1].
        targets: what the loss compares with in this step, each (B, c, h, w) in [0, 1].
        scale: guidance scale s of each image, (B,); positive descends.
        numerator: (x_t - mu)^T g + C + log N of the last step, (B,) (eq. 11); None before there is one.
    """

    y: torch.Tensor
    degradation: Degradation
    guess: torch.Tensor
    targets: List[torch.Tensor] = field(default_factory=list)
    scale: Optional[torch.Tensor] = None
    numerator: Optional[torch.Tensor] = None


@dataclass(frozen=True)
class Level:
    """Where in the reverse process a step is.

    Attributes:
        sigma: noise of x_t / sqrt(alpha_bar) on the scale of [0, 1].
        c1: weight of x_0 in the mean of x_{t-1} (DDPM, eq. 7).
        steps: of the whole process.
    """

    sigma: float
    c1: float
    steps: int


@dataclass
class DataStep:
    """What a data step did.

    Attributes:
        x0: the new estimate, (B, C, H, W).
        loss: (P, B) for each observation: P targets.
        gradient: dL/dx_0, (P, B, C, H, W) for each observation; empty for :class:`Proximal`.
        scale: used, (B,) for each observation; empty for :class:`Proximal`.
        shift: what moved the mean of x_{t-1}, for each observation and target, like ``gradient``.
    """

    x0: torch.Tensor
    loss: List[torch.Tensor]
    gradient: List[torch.Tensor] = field(default_factory=list)
    scale: List[torch.Tensor] = field(default_factory=list)
    shift: List[torch.Tensor] = field(default_factory=list)


def _image(values: torch.Tensor) -> torch.Tensor:
    """One value for each image, to multiply images with."""
    return values.view(-1, 1, 1, 1)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).flatten(1).sum(1)


@dataclass(frozen=True)
class FixedScale:
    """A guidance scale s that is the same in all steps.

    Args:
        scale: s. Default: of ``eta``.
        eta: s / (2 N) with N = C H W, which does not depend on the size: the mean loss's gradient has 1 / N in it.
    """

    scale: Optional[float] = None
    eta: float = 1.0

    def __call__(self, observation: Observation, loss: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        return loss.new_full((len(x0),), 2 * x0[0].numel() * self.eta if self.scale is None else self.scale)


@dataclass(frozen=True)
class AdaptiveScale:
    """The paper's empirical formula (eqs. 8 to 11): s = -((x_t - mu)^T g + C + log N) / L.

    Neither paper nor release says what the densities are; as released, they are
    G(r, l) = -sum((r / l)^2) / 2 - log(2 pi sum(l^2)) / 2 with l the log variance of the step: C = G(y - mu, l) and
    log N = G(y - x_{t+1}, l of the last step).

    Args:
        initial: s of the first step, where it has no last one; None: from x_T alone, with ``denominator: x0``.
        denominator: ``x0``: L(D(x_0), y) of the step that s is for (eq. 11). ``noisy``: 18 times the mean square of
            K * x_{t-1} + M - y in [-1, 1], as released.
        absolute: of the numerator, so that guidance always descends; else the formula's own sign.
        min_log_variance: least magnitude of l, which comes near zero where few steps are taken.
        first_previous: l of the step before the first: ``current`` as of the first, or ``ones`` (release).
        cap: largest eta = s / (2 N); None for none.
        reference_steps: multiply s by this over the number of steps, as all steps together guide more the more they
            are; None for not.
    """

    initial: Optional[float] = 3000.0
    denominator: Literal["x0", "noisy"] = "noisy"
    absolute: bool = True
    min_log_variance: float = 1.0
    first_previous: Literal["current", "ones"] = "current"
    cap: Optional[float] = 1.0
    reference_steps: Optional[int] = None

    def __post_init__(self) -> None:
        if self.initial is None and self.denominator != "x0":
            raise UserError("adaptive scale: without an initial scale take denominator x0")

    def __call__(self, observation: Observation, loss: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        if self.denominator == "x0" and observation.numerator is not None:
            observation.scale = self._signed(observation.numerator) / loss.mean(0)
        if observation.scale is None:
            observation.scale = loss.new_full((len(x0),), self.initial)
        return observation.scale

    def limited(self, scale: torch.Tensor, x0: torch.Tensor, steps: int) -> torch.Tensor:
        """As it is used: normalised and capped."""
        if self.reference_steps is not None:
            scale = scale * (self.reference_steps / steps)
        return scale if self.cap is None else scale.clamp(max=2 * x0[0].numel() * self.cap)

    def log_variance(self, log_variance: torch.Tensor) -> torch.Tensor:
        """l, away from zero."""
        least = self.min_log_variance
        if not least:
            return log_variance
        return torch.where(log_variance < 0, log_variance.clamp(max=-least), log_variance.clamp(min=least))

    def _signed(self, numerator: torch.Tensor) -> torch.Tensor:
        return numerator.abs() if self.absolute else -numerator

    def update(
        self,
        observation: Observation,
        shift: torch.Tensor,
        x_t: torch.Tensor,
        mean: torch.Tensor,
        x_prev: torch.Tensor,
        log_variance: torch.Tensor,
        previous: torch.Tensor,
    ) -> dict:
        """s for the next step, into the observation; the terms of the formula by name.

        Args:
            shift: of the mean in this step, by the last target; all (B, C, H, W) in [-1, 1].
            mean: of x_{t-1}, with guidance.
            log_variance, previous: of this step and the last.
        """
        inner = _dot(shift, x_prev - mean)
        c = log_density(observation.guess - mean, log_variance)
        log_n = log_density(observation.guess - x_t, previous)
        observation.numerator = inner + c + log_n
        terms = {"inner": inner, "C": c, "logN": log_n}
        if self.denominator == "noisy":
            degradation, y = replace(observation.degradation, mask_used=True), observation.y
            error = degradation.residual(x_prev, y).square().flatten(1).sum(1) / degradation.count(y)
            terms["denominator"] = 18 * error
            observation.scale = self._signed(observation.numerator) / terms["denominator"]
        return terms


def log_density(residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """G(r, l) of :class:`AdaptiveScale`, of each image: (B, C, H, W) twice -> (B,)."""
    quotient = (residual / scale).square().flatten(1).sum(1)
    return -quotient / 2 - (2 * math.pi * scale.square().flatten(1).sum(1)).log() / 2


@dataclass(frozen=True)
class LineSearch:
    """x_0 <- x_0 - s g with s = |g|^2 / (|K g|^2 + rho |g|^2), g = K^T (K x_0 - y): the best step of one gradient.

    Args:
        weight: lambda of rho = lambda sigma_n^2 / sigma^2.
        noise: sigma_n, standard deviation of y's noise on the scale of [0, 1].
    """

    weight: float = 1.0
    noise: float = 2 / 255


@dataclass(frozen=True)
class Gradient:
    """Gradient guidance: mu <- mu - s dL/dx_0, which is x_0 <- x_0 - (s / c1) dL/dx_0 (Algorithm 1).

    Args:
        scale: how s is chosen.
        colour: weight of a colour term, the squared differences of the channels' means (Zero-DCE, arXiv 2001.06826,
            eq. 6), which GDP adds.
    """

    scale: Union[FixedScale, AdaptiveScale, LineSearch] = AdaptiveScale()
    colour: float = 0.0

    def __call__(self, x0: torch.Tensor, observations: Sequence[Observation], level: Level) -> DataStep:
        done = DataStep(x0, [])
        for observation in observations:
            image = (x0 + 1) / 2
            loss, grads = observation.degradation.gradients(image, observation.targets, ("x",))
            gradient = grads["x"] / 2  # x_0 is twice as wide as the image
            if self.colour:
                gradient = gradient + self.colour * _colour_gradient(image) / 2
            done.loss.append(loss)
            done.gradient.append(gradient)
            if isinstance(self.scale, LineSearch):
                scale = level.c1 * self._search(gradient.mean(0), observation, level)
            else:
                scale = self.scale(observation, loss, x0)
                if isinstance(self.scale, AdaptiveScale):
                    scale = self.scale.limited(scale, x0, level.steps)
            done.scale.append(scale)
            done.shift.append(-_image(scale) * gradient)
        for shift in done.shift:
            done.x0 = done.x0 + shift.mean(0) / level.c1
        return done

    def _search(self, gradient: torch.Tensor, observation: Observation, level: Level) -> torch.Tensor:
        """The step along dL/dx_0 = K^T r 2 / n / 2, with n values in r."""
        linear, count = observation.degradation.linear(), observation.degradation.count(observation.y)
        square = gradient.square().flatten(1).sum(1)
        seen = observation.degradation.operator.observed(observation.y)
        image = linear(gradient) if seen is None else linear(gradient) * seen
        rho = self.scale.weight * (self.scale.noise / level.sigma) ** 2
        below = image.square().flatten(1).sum(1) + rho * square
        # x_0 - x = -step K^T r / n with images half as wide as x_0, so step / n = 2 s.
        return 2 * count * square / below.clamp(min=1e-30)


def _colour_gradient(image: torch.Tensor) -> torch.Tensor:
    means = image.mean((2, 3), keepdim=True)
    pixels = image.shape[-2] * image.shape[-1]
    return (2 * (image.shape[1] * means - means.sum(1, keepdim=True)) / pixels).expand_as(image)


@dataclass(frozen=True)
class Proximal:
    """x_0 <- argmin |D(x) - y|^2 + rho |x - x_0|^2 by conjugate gradients (DiffPIR, arXiv 2305.08995, eq. 12).

    rho = lambda sigma_e^2 / sigma^2 with sigma_e = max(sigma_n, c_e |K|_1 sigma): while K is not known yet, its error
    counts as noise of the data, which falls with that of the process; of a dark image (low light) it is as much
    smaller as the image is. Of several observations each has its own rho.

    Args:
        weight: lambda.
        noise: sigma_n, standard deviation of y's noise on the scale of [0, 1].
        kernel_error: c_e; 0 where K is known.
        iterations: of the conjugate gradients, from x_0.
    """

    weight: float = 1.0
    noise: float = 2 / 255
    kernel_error: float = 0.3
    iterations: int = 10

    def __post_init__(self) -> None:
        at_least(0, "data step", weight=self.weight, noise=self.noise, kernel_error=self.kernel_error)
        at_least_one(iterations=self.iterations)

    def error(self, sigma: float) -> float:
        """sigma_e of a kernel of sum 1."""
        return max(self.noise, self.kernel_error * sigma)

    def _rho(self, degradation: Degradation, sigma: float) -> torch.Tensor:
        """Weight of the prior's x_0, (B, 1, 1, 1)."""
        gain = degradation.kernel.abs().sum((2, 3, 4)).mean(1)
        return self.weight * _image((self.kernel_error * gain).clamp(min=self.noise / sigma).square())

    def __call__(self, x0: torch.Tensor, observations: Sequence[Observation], level: Level) -> DataStep:
        image = (x0 + 1) / 2
        parts = []
        right = torch.zeros_like(image)
        losses = []
        for observation in observations:
            degradation, y = observation.degradation, torch.stack(observation.targets).mean(0)
            (linear, adjoint), seen = degradation.maps(image), degradation.operator.observed(y)
            weight = 1 / self._rho(degradation, level.sigma).clamp(min=1e-12)
            parts.append((linear, adjoint, seen, weight))
            residual = degradation.residual(image, y)
            losses.append((residual.square().flatten(1).sum(1) / degradation.count(y)).unsqueeze(0))
            right = right - weight * adjoint(residual)

        def normal(v: torch.Tensor) -> torch.Tensor:
            total = v
            for linear, adjoint, seen, weight in parts:
                image = linear(v)
                total = total + weight * adjoint(image if seen is None else image * seen)
            return total

        step = conjugate_gradients(normal, right, self.iterations)
        return DataStep(x0 + 2 * step, losses)


def conjugate_gradients(normal, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """Solve normal(x) = right from 0, each image on its own.

    Args:
        normal: symmetric and positive, (B, C, H, W) -> the same.
        right: (B, C, H, W).
    """
    x, r = torch.zeros_like(right), right
    p, square = r, _dot(r, r)
    for _ in range(iterations):
        image = normal(p)
        step = square / _dot(p, image).clamp(min=1e-30)
        x, r = x + _image(step) * p, r - _image(step) * image
        last, square = square, _dot(r, r)
        p = r + _image(square / last.clamp(min=1e-30)) * p
    return x
