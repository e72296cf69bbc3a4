"""Kernel steps of BIR-D: how K and M follow from the estimate of x_0 and from y. Images are in [0, 1]."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import List, Optional, Sequence

import torch
import torch.nn.functional as F

from ucdir_plugin.diffusion.bird.degradation import Degradation, project_simplex
from ucdir_plugin.utils.errors import UserError, at_least


@dataclass(frozen=True)
class Fixed:
    """K and M stay as they are: the operator is known (non-blind; Model A and B of Table 5)."""

    learns = False

    def check(self, x: torch.Tensor, degradation: Degradation) -> None:
        """Nothing to find fault with."""

    def __call__(
        self, x: torch.Tensor, targets: Sequence[torch.Tensor], degradation: Degradation, sigma: float, error: float
    ) -> Degradation:
        return degradation


@dataclass(frozen=True)
class Gradient:
    """Gradient descent on the loss (BIR-D, Algorithm 1): K <- K - l_K dL/dK, M <- M - l_M dL/dM.

    Args:
        rate: l_K; stable below 2 / lambda_max of the loss, see :meth:`bound`. None: half of it, of each image.
        mask_rate: l_M; 0 leaves the mask as it is.
        mask_per_pixel: multiply dL/dM by the number of pixels: as the loss is a mean, a rate of 1 would hardly move it.
        mask_sigma: smooth the mask's step by a Gaussian of so many pixels: a mask free at each pixel takes details of
            the image over. 0: free.
        simplex: keep K non-negative with sum 1. Its gain and the image's brightness are interchangeable otherwise.
        iterations: gradient steps in one step of the reverse process.
        below: leave K and M as they are while the noise of the process, on the scale of [0, 1], is above it; None:
            learn always.
    """

    rate: Optional[float] = None
    mask_rate: float = 0.0
    mask_per_pixel: bool = True
    mask_sigma: float = 0.0
    simplex: bool = True
    iterations: int = 1
    below: Optional[float] = None

    learns = True

    def __post_init__(self) -> None:
        rates = {"rate": self.rate, "mask_rate": self.mask_rate, "mask_sigma": self.mask_sigma}
        at_least(0, "kernel step", **rates, below=self.below)
        if self.iterations < 1:
            raise UserError(f"kernel step: iterations must be at least 1, got {self.iterations}")

    @staticmethod
    def bound(x: torch.Tensor, degradation: Degradation) -> torch.Tensor:
        """Largest stable l_K of each image: 2 / ((2/C) k^2 P), as lambda_max is at most the Hessian's trace; (B,).

        P is the mean square of what an output channel is made of: of all channels together where K mixes them, else of
        the strongest, as each has its own kernel.

        Args:
            x: (B, C, H, W) in [0, 1].
        """
        power = x.square().mean((2, 3))
        power = (power.amax(1) if degradation.kernel.shape[2] == 1 else power.sum(1)).clamp(min=1e-8)
        return x.shape[1] / (degradation.size**2 * power)

    def check(self, x: torch.Tensor, degradation: Degradation) -> None:
        """Warn of a rate beyond the bound, with the bound; x (B, C, H, W) is a guess."""
        if self.rate is None:
            return
        bound = float(self.bound(x, degradation).min())
        if self.rate > bound:
            warnings.warn(
                f"kernel step: rate {self.rate:g} is beyond the stability bound {bound:.3g} of this image: take less"
            )

    def __call__(
        self, x: torch.Tensor, targets: Sequence[torch.Tensor], degradation: Degradation, sigma: float, error: float
    ) -> Degradation:
        if self.below is not None and sigma > self.below:
            return degradation
        for _ in range(self.iterations):
            degradation = self._descend(x, targets, degradation)
        return degradation

    @torch.no_grad()
    def _descend(self, x: torch.Tensor, targets: Sequence[torch.Tensor], degradation: Degradation) -> Degradation:
        kernel, mask = degradation.kernel, degradation.mask
        moves = mask is not None and degradation.mask_used and self.mask_rate > 0
        _, grads = degradation.gradients(x, targets, ("kernel", "mask") if moves else ("kernel",))
        rate = self.bound(x, degradation) / 2 if self.rate is None else x.new_full((len(x),), self.rate)
        kernel = kernel - rate.view(-1, 1, 1, 1, 1) * grads["kernel"].mean(0)
        if self.simplex:
            kernel = project_simplex(kernel)
        if moves:
            factor = mask.shape[-2] * mask.shape[-1] if self.mask_per_pixel else 1
            step = grads["mask"].mean(0)
            if self.mask_sigma:
                step = gaussian_smooth(step, self.mask_sigma)
            mask = mask - self.mask_rate * factor * step
        return degradation.learned(kernel, mask)


def gaussian_smooth(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A Gaussian of ``sigma`` pixels, up to 3 sigma, the image mirrored at its edges: (B, C, H, W) -> the same."""
    for dim in (-2, -1):
        half = min(math.ceil(3 * sigma), x.shape[dim] - 1)
        taps = torch.exp(-torch.arange(-half, half + 1, device=x.device, dtype=x.dtype).square() / (2 * sigma**2))
        weight = (taps / taps.sum()).view(1, 1, -1, 1) if dim == -2 else (taps / taps.sum()).view(1, 1, 1, -1)
        pads = (0, 0, half, half) if dim == -2 else (half, half, 0, 0)
        b, c, h, w = x.shape
        padded = F.pad(x, pads, mode="reflect")
        x = F.conv2d(padded.view(b * c, 1, *padded.shape[-2:]), weight).view(b, c, h, w)
    return x


LARGEST = 65
"""Side of a kernel for least squares, whose matrix has its fourth power of numbers."""


@dataclass(frozen=True)
class LeastSquares:
    """Ridge least squares on strong gradients, with the posterior covariance of x_0: one kernel for all channels.

    The estimate of x_0 is a posterior mean, smoother than the image: without its covariance (of a 1/f^2 prior whose
    power is taken from y) on the left side, K comes out far too sharp or not at all.

    Args:
        ridge: towards the last kernel, as a part of the matrix' diagonal.
        centroid: weight that keeps the kernel's centre of mass at its middle.
        quantile: gradients of x below this quantile of their size are left out.
        taper: width in pixels of the cosine window at the borders.
        threshold: taps below this part of the largest are made zero.
        covariance: False leaves the covariance out, for comparison.
    """

    ridge: float = 1e-3
    centroid: float = 1.0
    quantile: float = 0.7
    taper: int = 12
    threshold: float = 0.05
    covariance: bool = True

    learns = True

    def __post_init__(self) -> None:
        at_least(0, "least-squares kernel step", ridge=self.ridge, centroid=self.centroid, taper=self.taper)
        for name in ("quantile", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"least-squares kernel step: {name} must be in [0, 1), got {getattr(self, name)}")

    def check(self, x: torch.Tensor, degradation: Degradation) -> None:
        """Refuse what the normal equations cannot be solved for.

        Raises:
            UserError: if A does not commute with a convolution, or the kernel mixes channels.
        """
        if not degradation.operator.commutes:
            raise UserError(
                "the least-squares kernel step needs y of the image's size without holes: take gradient or fixed"
            )
        if degradation.kernel.shape[2] != 1:
            raise UserError("the least-squares kernel step gives one kernel for all channels: take gradient for mixing")
        size, (height, width) = degradation.size, (side - 2 * degradation.border for side in x.shape[-2:])
        if size > LARGEST:
            raise UserError(f"kernel_size {size} is too much for the least-squares kernel step: take at most {LARGEST}")
        if size > min(height, width):
            raise UserError(
                f"an image of {width}x{height} is smaller than its kernel of {size}x{size}: take a smaller one"
            )

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, targets: Sequence[torch.Tensor], degradation: Degradation, sigma: float, error: float
    ) -> Degradation:
        """K from x and y.

        Args:
            x: (B, C, H, W) in [0, 1], of the size of y or larger by ``degradation.border`` on each side.
            targets: y, (B, c, h, w); the mean of several.
            sigma: noise level of the estimate x, on the scale of [0, 1]; 0 if it is exact.
            error: standard deviation of y about K * x, on the same scale.
        """
        self.check(x, degradation)
        y = (torch.stack(list(targets)).mean(0)).double()
        if degradation.mask is not None:
            y = y - degradation.operator(degradation.mask.double().expand(-1, x.shape[1], -1, -1))
        border = degradation.border
        inner = x[..., border : x.shape[-2] - border, border : x.shape[-1] - border]
        x = degradation.operator(inner.double())
        height, width = y.shape[-2:]
        window = torch.outer(_taper(height, self.taper), _taper(width, self.taper)).to(y.device)
        gx, hy = _gradients(x), _gradients(y)
        size = (gx[0].square() + gx[1].square()).sum(1, keepdim=True).sqrt()
        rank = max(1, round(self.quantile * size[0].numel()))
        limit = size.flatten(1).kthvalue(rank).values.view(-1, 1, 1, 1)
        strong = window * (size > limit)
        cross = power = 0
        for g, h in zip(gx, hy):
            g, h = torch.fft.rfft2(strong * g), torch.fft.rfft2(window * h)
            power = power + g.abs().square().sum(1)
            cross = cross + (g * h.conj()).sum(1)  # sum_i g[i + m] h[i]
        old = degradation.kernel.double().mean((1, 2))
        if self.covariance and sigma > 0:
            weight = window.square().sum()
            power = power + x.shape[1] * weight * _covariance(y, old, window, sigma, error)
        auto, cross = (torch.fft.irfft2(spectrum, s=(height, width)) for spectrum in (power, cross))
        kernel = self._solve(auto, cross, old)
        kernel = project_simplex(kernel, self.threshold).to(degradation.kernel)
        return degradation.learned(kernel[:, None, None].expand_as(degradation.kernel).clone(), degradation.mask)

    def _solve(self, auto: torch.Tensor, cross: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        size = old.shape[-1]
        taps = torch.arange(size, device=old.device) - size // 2
        my, mx = (m.flatten() for m in torch.meshgrid(taps, taps, indexing="ij"))
        # A[m, n] = sum_i g[i + m] g[i + n]
        matrix = auto[:, (my[:, None] - my) % auto.shape[-2], (mx[:, None] - mx) % auto.shape[-1]]
        right = cross[:, my % auto.shape[-2], mx % auto.shape[-1]]
        scale = auto[:, 0, 0].clamp(min=1e-20).view(-1, 1, 1)
        spread = torch.outer(my, my) + torch.outer(mx, mx)
        ridge = self.ridge * torch.eye(size**2, device=old.device, dtype=old.dtype)
        matrix = matrix + scale * (ridge + self.centroid * spread.to(old))
        right = right + self.ridge * scale[:, :, 0] * old.flatten(1)
        # Positive definite. Besides, torch's LU of a batch breaks on two threads (oneMKL: DLASWP, torch 2.14.1, CPU).
        factor, fault = torch.linalg.cholesky_ex(matrix)
        found = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        return found.masked_fill((fault != 0).unsqueeze(-1), math.nan).view_as(old)  # which stops this image alone


def _taper(size: int, width: int) -> torch.Tensor:
    """(size,): a rise and a fall of half a cosine over ``width`` pixels."""
    position = torch.arange(size, dtype=torch.float64) + 0.5
    ramp = (torch.minimum(position, size - position) / max(min(width, size / 2), 1e-9)).clamp(max=1)
    return (1 - torch.cos(math.pi * ramp)) / 2


def _gradients(image: torch.Tensor) -> List[torch.Tensor]:
    """Circular differences along both axes; the window hides where they wrap."""
    return [image.roll(-1, dim) - image for dim in (-1, -2)]


def _covariance(
    y: torch.Tensor, kernel: torch.Tensor, window: torch.Tensor, sigma: float, error: float
) -> torch.Tensor:
    """Power spectrum of the gradients that the estimate of x_0 lacks, as of rfft2: (B, H, W // 2 + 1).

    With S(f) = a / (f^2 + (1/H)^2) fitted to y: V = S sigma^2 / (S + sigma^2) is what the denoiser leaves,
    1 / (|K|^2 / error^2 + 1 / V) what the data leave of it, and |D|^2 turns it into that of the gradients.
    """
    height, width = y.shape[-2:]
    fy = torch.fft.fftfreq(height, device=y.device, dtype=y.dtype)[:, None]
    fx = torch.fft.fftfreq(width, device=y.device, dtype=y.dtype)
    square = fy.square() + fx.square()
    low = 1 / math.sqrt(height * width)
    gray = y.mean(1)
    mean = (gray * window).sum((-2, -1), keepdim=True) / window.sum()
    seen = torch.fft.fft2(window * (gray - mean)).abs().square() / window.square().sum()
    band = (square > (1.5 * low) ** 2) & (square < 0.06**2)
    if not bool(band.any()):  # a small image
        band = (square > 0) & (square < 0.25**2)
    if not bool(band.any()):
        band = square > 0
    a = (square * seen)[:, band].mean(1).clamp(min=1e-12).view(-1, 1, 1)
    fx = fx[: width // 2 + 1]
    square = square[:, : width // 2 + 1]
    prior = a / (square + low**2)
    left = prior * sigma**2 / (prior + sigma**2)
    gain = torch.fft.rfft2(kernel, s=(height, width)).abs().square()
    rest = 1 / (gain / max(error, 1e-6) ** 2 + 1 / left)
    return rest * (4 - 2 * torch.cos(2 * math.pi * fy) - 2 * torch.cos(2 * math.pi * fx))
