"""Other zero-shot solvers with the same priors, for tables side by side: DDNM, DDRM, DPS and DiffPIR, by deepinv.

The operator must be known; DDRM takes only those whose singular vectors are. DPS, DDRM and DiffPIR are deepinv's own;
DDNM, which deepinv 0.5 does not have, is put together from its least squares. All start at the largest noise that the
prior knows, from y on the scene's grid, so that a denoiser is a prior too. Defaults are what did well in 16 and 50
steps with FFDNet on two photographs; deepinv's own are a weight of 7 and zeta 0.1 for DiffPIR, and ``norm`` with weight
1 for DPS.

    degradation = Degradation(kernel, None, operator, padding="valid")
    result = ZeroShotSolver(prior, [(y, degradation)], DiffPIR(steps=50), noise).run()

Papers: DDNM, https://arxiv.org/abs/2212.00490; DDRM, https://arxiv.org/abs/2201.11793; DPS,
https://arxiv.org/abs/2209.14687; DiffPIR, https://arxiv.org/abs/2305.08995. deepinv: https://deepinv.github.io
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, List, Optional, Sequence, Tuple

import torch
from torch import nn

from ucdir_plugin.diffusion.bird import kernel_steps, solver
from ucdir_plugin.diffusion.bird.degradation import Degradation
from ucdir_plugin.diffusion.bird.records import Result, Trace
from ucdir_plugin.diffusion.bird.settings import Settings
from ucdir_plugin.diffusion.bird.solver import Noise
from ucdir_plugin.diffusion.prior import Prior
from ucdir_plugin.diffusion.samplers import clamp_finite
from ucdir_plugin.restoration.deepinv_methods import Method, Problem, deepinv


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


class ZeroShotSolver(solver.Solver):
    """One batch of scenes at work, as with :class:`bird.Solver`, each image on its own as deepinv draws its noise.

    Args:
        prior, observed, noise, tile, overlap, tile_batch, merge, names, start, progress: as there; the kernels and
            masks are taken for true. Further noise is drawn from a generator that ``noise`` seeds.
        method: one of :data:`ucdir_plugin.restoration.deepinv_methods.METHODS`.

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
            kernel=kernel_steps.Fixed(), steps=method.steps, levels="uniform", sigma_start=sigma_start, inner=1
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
        observed = [((o.y[image : image + 1] + 1) / 2, o.degradation.for_image(image)) for o in self.observations]

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
            observed,
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
