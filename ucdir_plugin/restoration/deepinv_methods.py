"""DDNM, DDRM, DPS and DiffPIR of deepinv: settings and guidance."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Callable, Dict, Literal, Optional, Sequence, Tuple, Type

import numpy as np
import torch

from ucdir_plugin.diffusion.bird.degradation import Degradation
from ucdir_plugin.diffusion.schedule import NoiseSchedule
from ucdir_plugin.restoration.singular_values import decompose
from ucdir_plugin.utils.errors import NotAvailable, UserError

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
            "DDNM, DDRM, DPS and DiffPIR need deepinv and Python 3.10: pip install 'ucdir-plugin[deepinv]'"
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
        observed: y (1, c, h, w) in [0, 1] and its degradation, of each observation, which ``physics`` was made of.
    """

    denoise: Callable[[torch.Tensor, float], torch.Tensor]
    physics: Any
    y: torch.Tensor
    guess: torch.Tensor
    x_t: torch.Tensor
    schedule: NoiseSchedule
    levels: NoiseSchedule
    generator: torch.Generator
    observed: Sequence[Tuple[torch.Tensor, Degradation]]


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
        """Refuse a start that is no noisier than y.

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


@dataclass(frozen=True)
class DDRM(Method):
    """Denoises, and mixes with y each coordinate of the operator's singular vectors (Kawar et al., 2022).

    It is deepinv's, whose noise is smaller than the paper's by the square root of 2. What it restores is the difference
    from the guess, so that a denoiser is a prior too. Singular values that y's noise hides even at the first level
    count as 0.

    Attributes:
        eta: part of new noise in coordinates that y does not see, and in those that its noise hides at this level.
        eta_b: part of y in the others.
    """

    eta: float = 0.85
    eta_b: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("eta", self.eta), ("eta_b", self.eta_b)):
            if not 0 <= value <= 1:
                raise UserError(f"DDRM: {name} must be between 0 and 1, got {value}")

    def __call__(self, problem: Problem) -> torch.Tensor:
        package, guess = deepinv(), problem.guess
        found = decompose(problem.physics, problem.observed, guess)
        sigmas = [float(sigma) for sigma in (1 / problem.schedule.alpha_bar[::-1] - 1) ** 0.5 / 2]
        values = torch.where(found.values * sigmas[0] > self.noise, found.values, torch.zeros_like(found.values))
        physics = package.physics.DecomposablePhysics(
            U=found.given,
            U_adjoint=found.seen,
            V=found.image,
            V_adjoint=found.coordinates,
            mask=values,
            noise_model=package.physics.GaussianNoise(self.noise),
            device=guess.device,
        )
        solver = package.sampling.DDRM(
            lambda x, sigma: problem.denoise(x + guess, sigma) - guess, sigmas, eta=self.eta, etab=self.eta_b
        )
        return solver(problem.y - problem.physics.A(guess), physics) + guess


METHODS: Dict[str, Type[Method]] = {"ddnm": DDNM, "ddrm": DDRM, "dps": DPS, "diffpir": DiffPIR}
"""By their names in option files."""
