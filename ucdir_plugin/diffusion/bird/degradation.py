"""The degradation y = A(K * x + M): a learnable kernel and mask, and a known operator (BIR-D, section 4.1).

Images are in [0, 1] here, the scale on which a mask is added and a kernel may have any sum. Everything is linear up to
the mask, differentiable, of any size, and has its own kernel and mask for each image of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Callable, Dict, Literal, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len

from ucdir_plugin.diffusion.bird.operators import Operator
from ucdir_plugin.diffusion.noise import generator
from ucdir_plugin.utils.errors import UserError

Padding = Literal["reflect", "zeros", "valid"]
PADDINGS = ("reflect", "zeros", "valid")
FFT_SIZE = 5
"""Side of the smallest kernel that is applied by FFT where it is applied often."""

KERNEL_STARTS = ("delta", "gaussian", "edges", "random")


def convolve(x: torch.Tensor, kernel: torch.Tensor, padding: Padding = "reflect") -> torch.Tensor:
    """Each image with its own kernel; correlation, as networks have it: y[i] = sum_m K[m] x[i + m], m around 0.

    Args:
        x: (B, C, H, W).
        kernel: (B, C, 1, k, k) for each channel its own, or (B, C, C, k, k), mixing them.
        padding: ``reflect`` (by repeating the edge where the image is too small) or ``zeros`` keep the size;
            ``valid`` makes it smaller by k - 1 and needs no model of what is beyond.

    Returns:
        (B, C, H, W) or (B, C, H - k + 1, W - k + 1).
    """
    b, c, h, w = x.shape
    size = kernel.shape[-1]
    half = size // 2
    if padding == "reflect" and half:
        x = F.pad(x, (half,) * 4, mode="reflect" if half < min(h, w) else "replicate")
    elif padding == "zeros":
        x = F.pad(x, (half,) * 4)
    groups = b * c if kernel.shape[2] == 1 else b
    y = F.conv2d(x.reshape(1, b * c, *x.shape[-2:]), kernel.reshape(b * c, -1, size, size).to(x), groups=groups)
    return y.view(b, c, *y.shape[-2:])


def start_mask(batch: int, size: Tuple[int, int], start: Literal["zero", "random"], key: Tuple = (0,)) -> torch.Tensor:
    """A mask to start from, (batch, 1, *size) on the scale of [0, 1].

    Args:
        start: ``zero``, or ``random``, uniform in [0, 1e-4), the same for each image, as in the release.
        key: of the random numbers.
    """
    if start == "zero":
        return torch.zeros(batch, 1, *size)
    return torch.rand((1, *size), generator=generator(*key, "mask")).expand(batch, 1, *size).clone() / 10_000


def start_kernel(
    batch: int,
    size: int,
    start: Literal["delta", "gaussian", "edges", "random"] = "delta",
    *,
    channels: int = 3,
    mixing: bool = False,
    sigma: float = 2.0,
    total: Optional[float] = 1.0,
    key: Tuple = (0,),
) -> torch.Tensor:
    """A kernel to start from.

    Args:
        size: odd.
        start: ``delta``; ``gaussian`` of ``sigma`` pixels; ``edges``, the release's, made of the differences d of the
            normal distribution at equally spaced edges over +-(sigma + sigma / size + 1 / (2 size)) as
            sqrt(d d^T) / sum; ``random``, uniform in [0, 1).
        mixing: one kernel for each pair of channels, the start on the diagonal (random: everywhere).
        total: sum of the kernel; None leaves a random one as it is drawn, divided by 100, as in the release.
        key: of the random numbers.

    Returns:
        (batch, channels, 1 or channels, size, size).

    Raises:
        UserError: for an even size or an unknown start.
    """
    check_kernel_size(size)
    if start not in KERNEL_STARTS:
        raise UserError(f"kernel start {start!r} is not known: take one of {', '.join(KERNEL_STARTS)}")
    if start == "random":
        shape = (batch, channels, channels if mixing else 1, size, size)
        drawn = torch.rand(shape[1:], generator=generator(*key, "kernel")).expand(shape).clone() / 100
        return drawn if total is None else drawn * total / drawn.sum((2, 3, 4), keepdim=True)
    taps = torch.arange(size, dtype=torch.float64) - size // 2
    if start == "delta":
        one = (taps == 0).double()
    elif start == "gaussian":
        one = torch.exp(-taps.square() / (2 * sigma**2))
    else:
        reach = sigma + (2 * sigma + 1) / (2 * size)
        one = torch.special.ndtr(torch.linspace(-reach, reach, size + 1, dtype=torch.float64)).diff().sqrt()
    plane = torch.outer(one, one)
    plane = (plane / plane.sum() * (1.0 if total is None else total)).float()
    if not mixing:
        return plane.expand(batch, channels, 1, size, size).clone()
    return (torch.eye(channels)[..., None, None] * plane).expand(batch, channels, channels, size, size).clone()


def check_kernel_size(size: int) -> None:
    """Refuse a size that no blur kernel has.

    Raises:
        UserError: if it is even, below 1, or far above what blurs are.
    """
    if size > 1023:
        raise UserError(f"a kernel of {size}x{size} pixels is asked for; take at most 1023")
    if size < 1 or size % 2 == 0:
        raise UserError(f"a kernel has a centre, so an odd size: got {size}, take {max(size - 1, 1)} or {size + 1}")


def project_simplex(kernel: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """The nearest kernel without negative taps and of sum 1 (Duchi et al., ICML 2008, figure 1).

    Args:
        kernel: (..., k, k), or with a dimension of channels that are mixed before these: (B, C, c, k, k), where the
            taps of all c together have sum 1.
        threshold: taps below this part of the largest are then made zero.
    """
    flat = kernel.flatten(2) if kernel.dim() == 5 else kernel.flatten(-2)
    order = flat.sort(-1, descending=True).values
    excess = (order.cumsum(-1) - 1) / torch.arange(1, flat.shape[-1] + 1, device=flat.device, dtype=flat.dtype)
    count = (order > excess).sum(-1, keepdim=True).clamp(min=1)
    flat = (flat - excess.gather(-1, count - 1)).clamp(min=0)
    if threshold:
        flat = torch.where(flat < threshold * flat.amax(-1, keepdim=True), torch.zeros_like(flat), flat)
    return (flat / flat.sum(-1, keepdim=True).clamp(min=1e-12)).view(kernel.shape)


@dataclass(frozen=True)
class Degradation:
    """y = A(K * x + M) for a batch of images; what is learned makes a new one of it.

    Attributes:
        kernel: (B, C, 1 or C, k, k).
        mask: (B, 1, H, W), on the scale of [0, 1]; None for none.
        operator: A.
        padding: of the convolution.
        mask_used: False carries a mask without adding it, as the release does in all tasks but low light (it is still
            in the denominator of its adaptive scale).

    Raises:
        UserError: for an even kernel, or a mask or operator of another size when called.
    """

    kernel: torch.Tensor
    mask: Optional[torch.Tensor] = None
    operator: Operator = Operator()  # noqa: RUF009  (it has no state)
    padding: Padding = "reflect"
    mask_used: bool = True

    def __post_init__(self) -> None:
        if self.kernel.dim() != 5 or self.kernel.shape[-1] != self.kernel.shape[-2]:
            raise ValueError(f"a kernel is (B, C, 1 or C, k, k), got {tuple(self.kernel.shape)}")
        check_kernel_size(self.kernel.shape[-1])
        if self.padding not in PADDINGS:
            raise UserError(f"padding {self.padding!r} is not known: take one of {', '.join(PADDINGS)}")

    @property
    def size(self) -> int:
        """Side k of the kernel, in pixels."""
        return self.kernel.shape[-1]

    @property
    def border(self) -> int:
        """How much larger x is than K * x, on each side."""
        return self.size // 2 if self.padding == "valid" else 0

    def learned(self, kernel: torch.Tensor, mask: Optional[torch.Tensor]) -> Degradation:
        """The degradation with another kernel and mask."""
        return replace(self, kernel=kernel, mask=mask)

    def for_image(self, image: int) -> Degradation:
        """The degradation of one image of the batch."""
        one = slice(image, image + 1)
        mask = None if self.mask is None else self.mask[one]
        return replace(self, kernel=self.kernel[one], mask=mask, operator=self.operator.for_image(image))

    def blur(self, x: torch.Tensor) -> torch.Tensor:
        """K * x + M: (B, C, H, W) -> the same, smaller with ``valid``."""
        y = convolve(x, self.kernel, self.padding)
        if self.mask is None or not self.mask_used:
            return y
        if self.mask.shape[-2:] != y.shape[-2:]:
            raise UserError(f"the mask is {tuple(self.mask.shape[-2:])}, K * x {tuple(y.shape[-2:])}: they must agree")
        return y + self.mask.to(y)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.operator(self.blur(x))

    def shown(self, x: torch.Tensor) -> torch.Tensor:
        """D(x) as it would look: (B, C, H, W) -> like y."""
        return self.operator.shown(self.blur(x))

    def linear(self) -> Degradation:
        """The degradation without its mask."""
        return replace(self, mask=None)

    def adjoint(self, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """The adjoint of the linear part, by automatic differentiation: v like y -> like x, which says the shape."""
        with torch.enable_grad():
            point = torch.zeros_like(x).requires_grad_()
            y = self.linear()(point)

        return lambda v: torch.autograd.grad(y, point, v, retain_graph=True)[0]

    def maps(self, x: torch.Tensor) -> Tuple[Callable, Callable]:
        """The linear part and its adjoint, for many images like x: blurs by FFT, their kernel's transform kept.

        Args:
            x: (B, C, H, W), which says shape and type.

        Returns:
            image -> like y, and like y -> image.
        """
        if self.kernel.shape[2] != 1 or self.padding == "reflect" or self.size < FFT_SIZE:
            return self.linear(), self.adjoint(x)
        (h, w), half = x.shape[-2:], self.size // 2
        inset = 0 if self.padding == "valid" else half  # zeros: the border is made of them
        out = (h + 2 * inset - 2 * half, w + 2 * inset - 2 * half)
        if min(out) < 1:
            return self.linear(), self.adjoint(x)
        grid = tuple(next_fast_len(s + 2 * inset, real=True) for s in (h, w))
        transform = torch.fft.rfft2(self.kernel[:, :, 0].to(x), s=grid)

        def filtered(v: torch.Tensor, by: torch.Tensor, inset: int, size: Sequence[int]) -> torch.Tensor:
            v = F.pad(v, (inset, grid[1] - inset - v.shape[-1], inset, grid[0] - inset - v.shape[-2]))
            return torch.fft.irfft2(torch.fft.rfft2(v) * by, s=grid)[..., : size[0], : size[1]]

        operator = self.operator
        lift = operator.adjoint(x.new_zeros(*x.shape[:2], *out))

        def forward(v: torch.Tensor) -> torch.Tensor:
            return operator(filtered(v, transform.conj(), inset, out))  # a correlation, see convolve

        def adjoint(v: torch.Tensor) -> torch.Tensor:
            full = filtered(lift(v), transform, 0, (h + 2 * inset, w + 2 * inset))
            return full[..., inset : inset + h, inset : inset + w]

        return forward, adjoint

    def residual(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """D(x) - y, zero where nothing was observed."""
        r = self(x) - y
        seen = self.operator.observed(y)
        return r if seen is None else r * seen

    def count(self, y: torch.Tensor) -> torch.Tensor:
        """Observed values of each image, (B,)."""
        seen = self.operator.observed(y)
        if seen is None:
            return y.new_full((len(y),), float(y[0].numel()))
        return seen.expand(y.shape).flatten(1).sum(1).clamp(min=1)

    def gradients(
        self, x: torch.Tensor, targets: Sequence[torch.Tensor], of: Sequence[str]
    ) -> Tuple[torch.Tensor, Dict[str, torch.Tensor]]:
        """Loss of each target, and its gradients; each image has its own loss, so that none knows the others.

        Args:
            x: (B, C, H, W).
            targets: P of them, (B, c, h, w).
            of: what with respect to: some of ``x``, ``kernel`` and ``mask``.

        Returns:
            loss (P, B), and the gradients by name with P in front.
        """
        values = {"x": x, "kernel": self.kernel, "mask": self.mask}
        losses, found = [], []
        for y in targets:
            leaves = {name: values[name].detach().requires_grad_() for name in of}
            with torch.enable_grad():
                here = replace(self, kernel=leaves.get("kernel", self.kernel), mask=leaves.get("mask", self.mask))
                loss = here.loss(leaves.get("x", x), y)
                found.append(torch.autograd.grad(loss.sum(), list(leaves.values())))
            losses.append(loss.detach())
        return torch.stack(losses), {name: torch.stack(g) for name, g in zip(of, zip(*found))}

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Mean square of D(x) - y over what was observed, of each image: (B,)."""
        return self.residual(x, y).square().flatten(1).sum(1) / self.count(y)
