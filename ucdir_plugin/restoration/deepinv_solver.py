"""Other zero-shot solvers with the same priors, for tables side by side: DDNM, DPS and DiffPIR, by way of deepinv.

The operator must be known. DPS and DiffPIR are deepinv's own; DDNM, which deepinv 0.5 does not have (its DDRM needs the
operator's singular vectors), is put together from its least squares. All start at the largest noise that the prior
knows, from y on the scene's grid, so that a denoiser is a prior too. Defaults are what did well in 16 and 50 steps with
FFDNet on two photographs; deepinv's own are a weight of 7 and zeta 0.1 for DiffPIR, and ``norm`` with weight 1 for DPS.

    degradation = Degradation(kernel, None, operator, padding="valid")
    result = ZeroShotSolver(prior, [(y, degradation)], DiffPIR(steps=50), noise).run()

Papers: DDNM, https://arxiv.org/abs/2212.00490; DPS, https://arxiv.org/abs/2209.14687; DiffPIR,
https://arxiv.org/abs/2305.08995. deepinv: https://deepinv.github.io
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Dict, List, Literal, Optional, Sequence, Tuple, Type

import numpy as np
import torch
from torch import nn

from ucdir_plugin.diffusion import bird, kernel
from ucdir_plugin.diffusion.bird import Noise, Result, Trace
from ucdir_plugin.diffusion.degradation import Degradation
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.diffusion.samplers import clamp_finite
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.diffusion.tasks import Settings
from ucdir_plugin.errors import NotAvailable, UserError

GUIDANCES = ("annealed", "norm")


def deepinv() -> ModuleType:
    """The package.

    Raises:
        NotAvailable: if it is not installed.
    """
    try:
        import deepinv as package
    except ImportError as err:
        raise NotAvailable(
            "DDNM, DPS and DiffPIR need deepinv and Python 3.10: pip install 'ucdir-plugin[deepinv]'"
        ) from err
    return package


@dataclass
class Problem:
    """One image's problem, in deepinv's terms: images in [0, 1].

    Attributes:
        denoise: (1, C, H, W) plus noise, its sigma -> x_0; differentiable.
        physics: a LinearPhysics, the degradations without their masks and with Gaussian noise.
        y: what it gave: all observations flattened and joined, (1, n).
        guess: y on the scene's grid, (1, C, H, W).
        x_t: the guess noised to the first level, (1, C, H, W) in [-1, 1] as in DDPM.
        schedule: as many levels as there are steps.
        levels: all of the prior's up to the first level.
        generator: of further noise.
    """

    denoise: Callable[[torch.Tensor, float], torch.Tensor]
    physics: Any
    y: torch.Tensor
    guess: torch.Tensor
    x_t: torch.Tensor
    schedule: NoiseSchedule
    levels: NoiseSchedule
    generator: torch.Generator


@dataclass(frozen=True)
class Method(abc.ABC):
    """What all methods have.

    Attributes:
        steps: network calls; at least 2.
        sigma_start: noise of the first level, of x_t / sqrt(alpha_bar) on the scale of [0, 1]. Default: the largest
            that the prior knows, with which a diffusion network starts from practically nothing but noise.
        noise: sigma_n, standard deviation of y's noise on that scale.

    Raises:
        UserError: for a value out of range.
    """

    steps: int = 16
    sigma_start: Optional[float] = None
    noise: float = 2 / 255

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"{type(self).__name__}: steps must be at least 2, got {self.steps}")
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise UserError(f"{type(self).__name__}: noise must be a number of at least 0, got {self.noise}")

    def check(self, sigma_start: float) -> None:
        """
        Raises:
            UserError: if y itself has as much noise as the first level.
        """
        if self.noise >= sigma_start:
            name = type(self).__name__
            raise UserError(f"{name}: y's noise {self.noise:.3g} must be below that of the start, {sigma_start:.3g}")

    @abc.abstractmethod
    def __call__(self, problem: Problem) -> torch.Tensor:
        """The restored image, (1, C, H, W) in [0, 1] up to overshoot. May draw from torch's global generator."""


def _check_weight(method: Method, weight: float) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"{type(method).__name__}: weight must be a number above 0, got {weight}")


@dataclass(frozen=True)
class DDNM(Method):
    """x_0 keeps what y says nothing about, and takes the rest from y; ancestral sampling (Wang et al., 2023).

    x_0 <- x_0 - F (A x_0 - y), with F the pseudo-inverse where y has no noise. With noise, DDNM+ (section 3.3) makes
    the correction of each singular value s small enough for the noise that it brings to fit into that of the step. F =
    A^T (A A^T + rho)^-1 with rho = (c1 2 sigma_n)^2 / var, c1 and var of q(x_{t-1} | x_t, x_0), does the same
    smoothly and needs no singular vectors; it brings in at most a quarter of the step's variance, on top of it.
    """

    def __call__(self, problem: Problem) -> torch.Tensor:
        schedule, x = problem.schedule, problem.x_t
        for t in reversed(range(len(schedule))):
            alpha_bar = float(schedule.alpha_bar[t])
            x0 = problem.denoise((x / alpha_bar**0.5 + 1) / 2, (1 / alpha_bar - 1) ** 0.5 / 2)
            if t == 0:
                break
            c1, c2 = float(schedule.posterior_mean_coef1[t]), float(schedule.posterior_mean_coef2[t])
            variance = float(schedule.posterior_variance[t])
            rho = max((c1 * 2 * self.noise) ** 2 / variance, 1e-8)  # 1e-8 is nothing, in float32
            x0 = problem.physics.prox_l2(x0, problem.y, 1 / rho)
            drawn = torch.randn(x.shape, generator=problem.generator, device=x.device)
            x = c1 * (x0 * 2 - 1) + c2 * x + variance**0.5 * drawn
        return x0


@dataclass(frozen=True)
class DPS(Method):
    """Ancestral sampling, led by the gradient of y's misfit through the network (Chung et al., 2023).

    Each step goes back through the network, which takes the memory of training.

    Attributes:
        weight: of the gradient. Beyond 2, ``annealed`` can diverge in few steps (for operators that amplify nothing).
        guidance: ``annealed``, the gradient of |A x_0 - y|^2 / (2 (sigma_n^2 + sigma^2)); ``norm``, the paper's, that
            of |A x_0 - y|, the weight of which must grow with the size and as the steps get fewer.
    """

    weight: float = 2.0
    guidance: Literal["annealed", "norm"] = "annealed"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self, self.weight)
        if self.guidance not in GUIDANCES:
            raise UserError(f"DPS: guidance {self.guidance!r} is not known: take one of {', '.join(GUIDANCES)}")

    def __call__(self, problem: Problem) -> torch.Tensor:
        sampling = deepinv().sampling
        # deepinv's class DPS is this on its own schedule, which need not be the prior's.
        sigmas = torch.from_numpy(np.append(0.0, (1 / problem.schedule.alpha_bar - 1) ** 0.5)).to(problem.x_t.device)
        process = sampling.EDMDiffusionSDE(
            sigma_t=lambda t: sigmas[t.long()], variance_preserving=True, device=problem.x_t.device
        )
        posterior = sampling.PosteriorDiffusion(
            data_fidelity=sampling.DPSDataFidelity(weight=self.weight, guidance=self.guidance),
            denoiser=problem.denoise,
            sde=process,
            solver=sampling.DDPMSolver(timesteps=torch.arange(len(problem.schedule), -1, -1), rng=problem.generator),
            device=problem.x_t.device,
        )
        return posterior(problem.y, problem.physics, x_init=problem.x_t.double()).float()


@dataclass(frozen=True)
class DiffPIR(Method):
    """Denoise, solve for y nearby, add noise: half-quadratic splitting (Zhu et al., 2023).

    The levels are deepinv's, denser where there is little noise. Its last network call changes nothing, and the image
    keeps the noise of the last level (0.005 of [0, 1] with DDPM's schedule).

    Attributes:
        weight: lambda, of the prior; 3 to 25 in the paper.
        zeta: part of new noise in what is added: 0 keeps the old, 1 is all new.
    """

    weight: float = 3.0
    zeta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(self, self.weight)
        if not 0 <= self.zeta <= 1:
            raise UserError(f"DiffPIR: zeta must be between 0 and 1, got {self.zeta}")

    def __call__(self, problem: Problem) -> torch.Tensor:
        package, levels, device = deepinv(), problem.levels, problem.x_t.device

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device, torch.float32)

        class Within(package.sampling.DiffPIR):
            """On the prior's schedule, and no further than the prior knows it."""

            def get_alpha_beta(self) -> Tuple[torch.Tensor, ...]:
                self.num_train_timesteps = len(levels)
                bar = levels.alpha_bar
                sigma = (1 / bar - 1) ** 0.5
                return tuple(map(tensor, ((1 - bar) ** 0.5, sigma, bar**0.5, bar**-0.5, sigma, levels.betas)))

            def get_alpha_prod(self, *_: Any) -> Tuple[torch.Tensor, torch.Tensor]:
                return self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod

        solver = Within(
            problem.denoise,
            package.optim.data_fidelity.L2(),
            sigma=self.noise,
            max_iter=self.steps,
            zeta=self.zeta,
            lambda_=self.weight,
            device=device,
        )
        return solver(problem.y, problem.physics, x_init=problem.guess)


METHODS: Dict[str, Type[Method]] = {"ddnm": DDNM, "dps": DPS, "diffpir": DiffPIR}
"""By their names in option files."""


@dataclass
class Call:
    """A network call for one image.

    Attributes:
        image: its place in the batch.
        number: from 0.
        sigma: noise level on the scale of [0, 1].
        x0: the prior's estimate, (1, C, H, W) in [-1, 1].
        loss: mean square of D(x0) - y on the scale of [0, 1], (observations,).
    """

    image: int
    number: int
    sigma: float
    x0: torch.Tensor
    loss: torch.Tensor


class _Lost(Exception):
    """An image has lost its numbers; says when."""


class _Lent(nn.Module):
    """A prior as deepinv calls denoisers: (1, C, H, W) in [0, 1] plus noise, its sigma -> x_0 in [0, 1].

    Args:
        denoise: as a prior, (x_t, level) -> eps, or eps and v.
        channels: of the images.
        record: called with sigma and x_0 in [0, 1].
    """

    def __init__(
        self,
        denoise: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        channels: int,
        record: Callable[[float, torch.Tensor], None],
    ):
        super().__init__()
        self.denoise, self.channels, self.record = denoise, channels, record

    def forward(self, x: torch.Tensor, sigma: float | torch.Tensor) -> torch.Tensor:
        sigma = float(sigma)
        level = (1 + 4 * sigma**2) ** -0.5
        x = x * 2 - 1
        eps = self.denoise(level * x, x.new_full((len(x),), level))[:, : self.channels]
        x0 = clamp_finite((x - 2 * sigma * eps + 1) / 2, 0, 1)
        self.record(sigma, x0.detach())
        return x0


def physics_of(
    observed: Sequence[Tuple[torch.Tensor, Degradation]], like: torch.Tensor, noise: float
) -> Tuple[Any, torch.Tensor]:
    """A linear operator of deepinv, and what it gave.

    Args:
        observed: y (B, c, h, w) in [0, 1] and its degradation, for each observation of one scene.
        like: the scene, (B, C, H, W); says shape and type.
        noise: standard deviation of y's.

    Returns:
        LinearPhysics from the scene to all values of all observations, (B, n), zero where nothing was observed; and y
        of that form, less what the masks M add.
    """
    parts = [(*d.maps(like), y.shape) for y, d in observed]

    def forward(x: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.cat([linear(x).flatten(1) for linear, _, _ in parts], 1)

    def adjoint(v: torch.Tensor, **_: Any) -> torch.Tensor:
        split = v.split([shape[1:].numel() for _, _, shape in parts], 1)
        return sum(back(part.view(shape)) for part, (_, back, shape) in zip(split, parts))

    given = []
    for y, d in observed:
        seen, offset = d.operator.observed(y), d(torch.zeros_like(like))
        given.append((y - offset if seen is None else (y - offset) * seen).flatten(1))
    physics = deepinv().physics
    return physics.LinearPhysics(
        A=forward,
        A_adjoint=adjoint,
        noise_model=physics.GaussianNoise(noise),
        implicit_backward_solver=False,
        device=like.device,
    ), torch.cat(given, 1)


class ZeroShotSolver(bird.Solver):
    """One batch of scenes at work, as with :class:`bird.Solver`, each image on its own as deepinv draws its noise.

    Args:
        prior, observed, noise, tile, overlap, tile_batch, merge, names, start, progress: as there; the kernels and
            masks are taken for true. Further noise is drawn from a generator that ``noise`` seeds.
        method: :class:`DDNM`, :class:`DPS` or :class:`DiffPIR`.

    Raises:
        NotAvailable: if deepinv is not installed.
        UserError: if something does not fit, as there; more noise at the start than the prior knows.
    """

    def __init__(
        self,
        prior: Prior,
        observed: Sequence[Tuple[torch.Tensor, Degradation]],
        method: Method,
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
        deepinv()
        self.method = method
        sigma_start = prior.sigma_max if method.sigma_start is None else method.sigma_start
        method.check(sigma_start)
        settings = Settings(
            kernel=kernel.Fixed(), steps=method.steps, levels="uniform", sigma_start=sigma_start, inner=1
        )
        super().__init__(
            prior,
            observed,
            settings,
            noise,
            tile=tile,
            overlap=overlap,
            tile_batch=tile_batch,
            merge=merge,
            names=names,
            start=start,
            progress=progress,
        )

    @torch.no_grad()
    def run(self, callback: Optional[Callable[[Call], None]] = None) -> Result:
        """All steps of all images.

        Args:
            callback: called after each network call.

        Returns:
            As of :class:`bird.Solver`. The trace has the misfit of the prior's own estimates; no scale, and the
            kernels as they were given.
        """
        seeds = self.noise((len(self.guess), 1), 0, "generator").cpu().view(torch.int32).flatten().tolist()
        x_t, images, calls = self.first(), [], []
        for image, seed in enumerate(seeds):
            calls.append([])
            images.append(self._one(image, seed, x_t[image : image + 1], calls[-1], callback))
        return self._result(torch.cat(images), self._trace(calls))

    def _one(
        self,
        image: int,
        seed: int,
        x_t: torch.Tensor,
        calls: List[Tuple[float, torch.Tensor]],
        callback: Optional[Callable[[Call], None]],
    ) -> torch.Tensor:
        """One scene, (1, C, H, W) in [-1, 1], its guess where it is lost; notes sigma and loss in ``calls``."""
        guess = self.guess[image : image + 1]
        observed = [((o.y[image : image + 1] + 1) / 2, o.degradation.of(image)) for o in self.observations]

        def record(sigma: float, x0: torch.Tensor) -> None:
            if not bool(x0.isfinite().all()):
                raise _Lost(f"in step {len(calls) + 1}")
            loss = torch.cat([d.loss(x0, y) for y, d in observed]).cpu()
            calls.append((sigma, loss))
            if callback is not None:
                callback(Call(image, len(calls) - 1, sigma, x0 * 2 - 1, loss))

        physics, y = physics_of(observed, guess, self.method.noise)
        known, most = self.prior.schedule, float(self.schedule.alpha_bar[-1])
        problem = Problem(
            _Lent(self.denoise, self.prior.channels, record),
            physics,
            y,
            (guess + 1) / 2,
            x_t,
            self.schedule,
            known.truncate(int((known.alpha_bar >= most * (1 - 1e-9)).sum())),
            torch.Generator(x_t.device).manual_seed(seed),
        )
        with torch.random.fork_rng([x_t.device] if x_t.is_cuda else []):
            torch.manual_seed(seed)
            try:
                x = self.method(problem)
                if not bool(x.isfinite().all()):
                    raise _Lost("in the end")
            except _Lost as when:
                self.failed[image] = f"{self.names[image]}: the image turned non-finite {when}"
                return guess
        return x * 2 - 1

    def _trace(self, calls: Sequence[Sequence[Tuple[float, torch.Tensor]]]) -> Trace:
        longest = max(calls, key=len)
        loss = torch.full((len(longest), len(self.observations), len(calls)), float("nan"))
        for image, of_image in enumerate(calls):
            for number, (_, one) in enumerate(of_image):
                loss[number, :, image] = one
        masks = [o.degradation.mask for o in self.observations]
        means = [torch.zeros(len(calls)) if m is None else m.flatten(1).mean(1).cpu() for m in masks]
        kernels = [o.degradation.kernel.cpu() for o in self.observations]
        return Trace(
            [sigma for sigma, _ in longest],
            list(loss),
            list(torch.full_like(loss, float("nan"))),
            [torch.stack(means)] * len(longest),
            [kernels] * len(longest),
        )
